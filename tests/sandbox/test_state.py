"""Files and shells over snapshot, fork and reset, and what `changes` tells."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import Change, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests import footprint
from tests.sandbox.test_teardown import alive, gone
from tests.support import seconds

MIB = 1 << 20


@pytest.fixture
def forked(sandbox: Sandbox) -> Iterator[Callable[..., list[Sandbox]]]:
    """Forks that are closed after the test: `forked(2)` of `sandbox`, or `forked(2, other)`."""
    made: list[Sandbox] = []

    def fork(n: int, parent: Sandbox = sandbox) -> list[Sandbox]:
        children = parent.fork(n)
        made.extend(children)
        return children

    yield fork
    for child in made:
        child.close()


Forked = Callable[..., list[Sandbox]]


# Fork


def test_each_child_starts_from_the_parents_files_and_no_one_sees_later_writes(
    sandbox: Sandbox, forked: Forked
) -> None:
    sandbox.run("echo parent > made; echo changed > lower.txt; rm -r src; mkdir src; echo x > src/new; chmod 700 src")
    one, two = forked(2)
    look = "cat made lower.txt; ls -A src; stat -c %a src; ls"
    expected = "parent\nchanged\nnew\n700\nlower.txt\nmade\nsrc\n"
    assert [each.run(look).output for each in (sandbox, one, two)] == [expected] * 3
    sandbox.run("echo p > made; echo p > of-parent; rm lower.txt")
    one.run("echo 1 > made; echo 1 > of-one; rm -r src")
    two.run("echo 2 > made; echo 2 > src/new; echo 2 >> lower.txt")
    assert sandbox.run("cat made; ls; cat src/new").output == "p\nmade\nof-parent\nsrc\nx\n"
    assert one.run("cat made; ls").output == "1\nlower.txt\nmade\nof-one\n"
    assert two.run("cat made; ls; cat src/new lower.txt").output == "2\nlower.txt\nmade\nsrc\n2\nchanged\n2\n"


def test_a_childs_shell_goes_on_where_the_parents_is(sandbox: Sandbox, forked: Forked) -> None:
    shell, other = sandbox.shell(), sandbox.shell(cwd="/")
    shell.run("mkdir 'odd \"dir'; cd 'odd \"dir'; export TOKEN=$'a\\nb'; PLAIN=1; greet() { echo \"hi $1\"; }")
    other.run("export OTHER=1")
    (child,) = forked(1)
    assert len(child.shells) == len(sandbox.shells) == 2
    look = "pwd; echo \"$TOKEN\"; greet you; echo [$OTHER]"
    expected = '/testbed/odd "dir\na\nb\nhi you\n[]\n'
    assert child.shells[0].run(look).output == expected
    assert shell.run(look).output == expected
    assert child.shells[1].run("pwd; echo $OTHER$TOKEN").output == "/\n1\n"
    child.shells[0].run("cd /; export TOKEN=child; greet() { echo other; }")
    assert shell.run(look).output == expected


def test_the_exit_code_of_the_last_command_is_the_childs_too(sandbox: Sandbox, forked: Forked) -> None:
    shell = sandbox.shell()
    shell.run("(exit 7)")
    (child,) = forked(1)
    assert child.shells[0].run("echo $?").output == "7\n"
    assert shell.run("echo $?").output == "7\n"


def test_a_directory_that_is_gone_is_no_obstacle(sandbox: Sandbox, forked: Forked) -> None:
    shell = sandbox.shell()
    shell.run("mkdir gone; cd gone; rmdir /testbed/gone; X=1")
    (child,) = forked(1)
    assert child.shells[0].run("echo on").output == "on\n"
    assert shell.run("echo on").output == "on\n"


def test_background_jobs_end_and_are_named(sandbox: Sandbox, forked: Forked) -> None:
    shell = sandbox.shell()
    shell.run("sleep 12345 & (setsid sleep 12346 &); until [ $(pgrep -cx sleep) = 2 ]; do :; done")
    (child,) = forked(1)
    for each in (shell, child.shells[0]):
        result = each.run("ps ax -o args= | grep -c '[s]leep 1234'")
        assert result.output == "0\n"
        assert "`sleep 12345`" in result.notice and "`sleep 12346`" in result.notice
        assert each.run("true").notice == ""


def test_a_fork_of_a_sandbox_without_shells_or_changes(sandbox: Sandbox, forked: Forked) -> None:
    one, two = forked(2)
    assert (one.shells, one.changes()) == ((), [])
    assert one.pid != two.pid != sandbox.pid
    assert [each.run("cat lower.txt").output for each in (one, two, sandbox)] == ["from the layer\n"] * 3


def test_children_live_on_when_their_parent_is_closed_and_the_other_way_round(
    spec: SandboxSpec, launcher: LauncherClient
) -> None:
    parent = Sandbox(spec, launcher)
    parent.run("echo of-parent > file")
    one, two = parent.fork(2)
    parent.close()
    assert one.run("cat file").output == "of-parent\n"
    (grandchild,) = one.fork(1)
    one.close()
    two.close()
    gc.collect()
    assert grandchild.run("cat file lower.txt").output == "of-parent\nfrom the layer\n"
    pid = grandchild.pid
    grandchild.close()
    assert not alive(pid)


def test_forks_leave_nothing_behind(spec: SandboxSpec, launcher: LauncherClient) -> None:
    with Sandbox(spec, launcher) as warm:
        for child in warm.fork(1):
            child.close()
    gc.collect()
    before = footprint.resting()
    for _ in range(5):
        with Sandbox(spec, launcher) as sandbox:
            sandbox.shell().run("echo x > file")
            for child in sandbox.fork(2):
                child.run("echo y > file")
                child.close()
            sandbox.snapshot()
            sandbox.reset()
    gc.collect()
    Sandbox(spec, launcher).close()  # what was released goes with the next end of a sandbox
    after = footprint.settled(before)
    print(after.table(before))
    assert after.more(before) == []


@pytest.mark.parametrize("deep", [8, pytest.param(64, marks=pytest.mark.ci)])
def test_the_deepest_of_a_chain_of_forks_sees_what_each_wrote(
    deep: int, spec: SandboxSpec, launcher: LauncherClient
) -> None:
    sandbox = Sandbox(spec, launcher)
    sandbox.shell().run("export DEPTH=0")
    for depth in range(deep):
        # Every one adds, replaces and removes: a file each, one that all write, one that the one before made.
        told = sandbox.shells[0].run(
            f"echo {depth} > file{depth}; echo {depth} > last; rm -f passing*; echo x > passing{depth}; "
            "export DEPTH=$((DEPTH+1)); echo $DEPTH"
        )
        assert told.output == f"{depth + 1}\n"
        (child,) = sandbox.fork(1)
        sandbox.close()
        sandbox = child
    files = " ".join(f"file{depth}" for depth in range(deep))
    result = sandbox.shells[0].run(f"cat {files} last; ls -d passing* lower.txt; echo $DEPTH", timeout=seconds(30))
    expected = [*map(str, range(deep)), str(deep - 1), "lower.txt", f"passing{deep - 1}", str(deep)]
    assert result.output.splitlines() == expected
    found = {change.path for change in sandbox.changes()}
    assert {f"/testbed/file{depth}" for depth in range(deep)} <= found
    assert not any("passing" in path for path in found - {f"/testbed/passing{deep - 1}"})
    sandbox.close()


# Reset


def test_reset_drops_files_processes_and_what_shells_knew(sandbox: Sandbox) -> None:
    shell = sandbox.shell()
    shell.run("echo x > new; rm lower.txt; rm -r src; cd /tmp; export X=1; f() { :; }; sleep 12345 &")
    sandbox.write_file("/dev/shm/left", b"x")
    old = sandbox.pid
    sandbox.reset()
    assert gone([old]) and sandbox.pid != old
    assert sandbox.changes() == []
    assert shell.run("pwd; echo [$X]; type -t f; ls; ls /dev/shm; cat lower.txt").output == (
        "/testbed\n[]\nlower.txt\nsrc\nfrom the layer\n"
    )
    assert sandbox.run("ps ax -o args= | grep -c '[s]leep 12345'").output == "0\n"


def test_reset_goes_back_to_the_specs_layers_over_snapshots(sandbox: Sandbox) -> None:
    sandbox.run("echo 1 > one")
    sandbox.snapshot()
    sandbox.run("echo 2 > two")
    sandbox.reset()
    assert sandbox.run("ls").output == "lower.txt\nsrc\n"


# Snapshot


def test_a_snapshot_is_a_layer_for_others_after_its_sandbox_closed(spec: SandboxSpec, launcher: LauncherClient) -> None:
    first = Sandbox(spec, launcher)
    first.run("echo kept > kept; chmod 4755 kept; ln -s kept link")
    first.run("rm lower.txt; rm -r src; mkdir src; echo x > src/new")
    snapshot = first.snapshot()
    first.run("echo later > kept; echo later > later")
    assert first.run("cat kept").output == "later\n"
    first.close()
    gc.collect()
    with Sandbox(dataclasses.replace(spec, layers=snapshot.layers), launcher) as second:
        assert second.run("ls; cat link; ls src; stat -c %a kept").output == "kept\nlink\nsrc\nkept\nnew\n4755\n"
        assert second.changes() == []
        second.run("echo second > kept")
        with Sandbox(dataclasses.replace(spec, layers=snapshot.layers), launcher) as third:
            assert third.run("cat kept").output == "kept\n"


def test_a_snapshot_names_what_it_ended_and_the_shell_goes_on(sandbox: Sandbox) -> None:
    shell = sandbox.shell()
    shell.run("cd src; export X=1; sleep 12345 & until pgrep -x sleep >/dev/null; do :; done")
    snapshot = sandbox.snapshot()
    assert "sleep 12345" in snapshot.ended
    assert not any("bash --noprofile" in line for line in snapshot.ended)
    result = shell.run("pwd; echo $X")
    assert result.output == "/testbed/src\n1\n" and "`sleep 12345`" in result.notice


def test_a_snapshot_does_not_outlive_its_launcher(spec: SandboxSpec) -> None:
    client = LauncherClient()
    sandbox = Sandbox(spec, client)
    snapshot = sandbox.snapshot()
    sandbox.close()
    client.close()
    with pytest.raises(SandboxError, match="launcher has ended"):
        Sandbox(dataclasses.replace(spec, layers=snapshot.layers))


def test_a_closed_sandbox_has_no_state(spec: SandboxSpec) -> None:
    sandbox = Sandbox(spec)
    sandbox.close()
    for act in (sandbox.snapshot, sandbox.fork, sandbox.reset, sandbox.changes):
        with pytest.raises(SandboxGone):
            act()


@pytest.mark.parametrize("place", ["usual", "disk"])
def test_what_was_frozen_still_counts_as_disk(spec: SandboxSpec, tmp_path: Path, place: str) -> None:
    limits = dataclasses.replace(spec.limits, disk=32 * MIB)
    upper = tmp_path / "upper" if place == "disk" else None
    with Sandbox(dataclasses.replace(spec, limits=limits, upper=upper)) as sandbox:
        assert sandbox.run("head -c 20M /dev/zero > big").exit_code == 0
        (child,) = sandbox.fork(1)
        for each in (child, sandbox):
            result = each.run("head -c 20M /dev/zero > more")
            assert result.exit_code != 0 and result.disk_full, result
            assert each.run("wc -c < big").output == f"{20 * MIB}\n"
        child.close()


# Changes

CASES: dict[str, tuple[str, set[tuple[str, str]]]] = {
    "nothing": ("cat lower.txt; ls -R / >/dev/null 2>&1; true", set()),
    "a file": ("echo x > new", {("new", "added")}),
    "a directory": ("mkdir -p a/b; echo x > a/b/c", {("a", "added"), ("a/b", "added"), ("a/b/c", "added")}),
    "contents": ("echo x > lower.txt", {("lower.txt", "modified")}),
    "contents of the same length": ("printf 'FROM THE LAYER\\n' > lower.txt", {("lower.txt", "modified")}),
    "an untouched copy-up": (": >> lower.txt; touch src/module.py", set()),
    "mode": ("chmod 600 lower.txt", {("lower.txt", "modified")}),
    "mode of a directory": ("chmod 700 src", {("src", "modified")}),
    "mode there and back": ("chmod 600 lower.txt; chmod 644 lower.txt", set()),
    "rename": ("mv lower.txt renamed", {("lower.txt", "removed"), ("renamed", "added")}),
    "rename of a directory": (
        "mv src moved", {("src", "removed"), ("moved", "added"), ("moved/module.py", "added")}
    ),
    "rename over another": ("mv lower.txt src/module.py", {("lower.txt", "removed"), ("src/module.py", "modified")}),
    "rename there and back": ("mv lower.txt x; mv x lower.txt", set()),
    "removed": ("rm lower.txt", {("lower.txt", "removed")}),
    "removed and made again": ("cp -p lower.txt x; rm lower.txt; cat x > lower.txt; rm x", set()),
    "a deleted directory": ("rm -r src", {("src", "removed")}),
    "a directory made anew is opaque": (
        "rm -r src; mkdir src; echo x > src/new", {("src/module.py", "removed"), ("src/new", "added")}
    ),
    "a directory made anew as it was": ("cp -a src x; rm -r src; mkdir src; cp x/module.py src/; rm -r x", set()),
    "a directory replaced by a file": ("rm -r src; echo x > src", {("src", "modified")}),
    "a file replaced by a directory": (
        "rm lower.txt; mkdir lower.txt; echo x > lower.txt/in", {("lower.txt", "modified"), ("lower.txt/in", "added")}
    ),
    "a symlink": ("ln -s /etc/passwd link; ln -s nowhere dangling", {("link", "added"), ("dangling", "added")}),
    "a file replaced by a symlink": ("rm lower.txt; ln -s src lower.txt", {("lower.txt", "modified")}),
    "a hard link": ("ln lower.txt hard", {("hard", "added")}),
    "a FIFO": ("mkfifo pipe", {("pipe", "added")}),
    "made and gone": ("mkdir x; echo x > x/y; rm -r x", set()),
    "an odd name": ("touch $'a\\nb' $'\\xff'", {("a\nb", "added"), ("\udcff", "added")}),
}


@pytest.mark.parametrize("case", CASES)
def test_changes_tells_exactly_what_differs(case: str, sandbox: Sandbox) -> None:
    command, expected = CASES[case]
    done = sandbox.run(command)
    assert done.exit_code == 0, done.output
    found = sandbox.changes()
    assert found == sorted(found, key=lambda change: os.fsencode(change.path)), "sorted, parents first"
    assert {(change.path.removeprefix("/testbed/"), change.kind) for change in found} == expected


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_changes_tells_the_same_over_a_fork(case: str, sandbox: Sandbox, forked: Forked) -> None:
    """What the parent wrote lies in a layer of its own then; half of it before, and a bit after."""
    command, expected = CASES[case]
    sandbox.run("echo before > before")
    (child,) = forked(1)
    assert child.run(command).exit_code == 0
    (grandchild,) = forked(1, child)
    grandchild.run("rm before; echo after > after")
    found = {(change.path.removeprefix("/testbed/"), change.kind) for change in grandchild.changes()}
    assert found == expected | {("after", "added")}
    found = {(change.path.removeprefix("/testbed/"), change.kind) for change in child.changes()}
    assert found == expected | {("before", "added")}


def test_changes_beyond_the_limit_are_an_error_not_a_part(sandbox: Sandbox) -> None:
    sandbox.run("touch {1..50}")
    assert len(sandbox.changes(limit=50)) == 50
    with pytest.raises(OSError, match=r"[Ll]arge"):
        sandbox.changes(limit=49)
    assert sandbox.run("echo on").output == "on\n"


def test_a_change_is_plain_data() -> None:
    assert Change("/x", "added") == Change("/x", "added")
    assert dataclasses.asdict(Change("/x", "added")) == {"path": "/x", "kind": "added"}
