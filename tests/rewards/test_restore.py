"""What steers the runner is as the image has it, however the patch changed it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.rewards.restore import DoesNotGoIn, bring_tests, restore, restore_tests, tests_fit
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks.task import Task, Tests
from tests.rewards.conftest import RECIPE, Opener


def task(files: tuple[str, ...] = ("tests/check.sh", "tests/new.sh"), patch: str = "") -> Task:
    tests = Tests(patch=patch, files=files, command="bash tests/check.sh", fail_to_pass=("a",), pass_to_pass=())
    return Task(id="t", problem_statement="p", recipe=RECIPE, tests=tests, gold_patch="x")


def listing(sandbox: Sandbox) -> str:
    """Every path with its type, mode, link and content."""
    command = r"find . -path ./.git -prune -o -printf '%p %y %m %l\n' | sort; find . -path ./.git -prune -o -type f " \
        "-print0 | sort -z | xargs -0 sha256sum"  # fmt: skip
    done = sandbox.run(command, cwd="/srv")
    assert done.exit_code == 0, done.output
    return done.stdout.decode()


SPOILT = [
    "echo x > tests/check.sh",
    "rm tests/check.sh; mkdir -p tests/check.sh/deep; echo x > tests/check.sh/deep/file",
    "rm -r tests; echo x > tests",
    "rm -r tests; ln -s pkg tests; echo x > pkg/check.sh; rm pkg/check.sh",
    "rm -r tests",
    "ln -sf /etc/passwd tests/check.sh",
    "echo x > tests/new.sh; echo y > tests/helper.sh; ln -s ../pkg tests/link",
    "echo x > conftest.py; echo x > pkg/conftest.py; ln -s a.py pkg/sitecustomize.py; mkdir usercustomize; "
    "echo > usercustomize/__init__.py",
    "mkdir new.egg-info; echo '[pytest11]' > new.egg-info/entry_points.txt; rm pkg/tracked.pyc",
    "chmod 777 tests/check.sh; printf 'odd' > $'tests/line\\nbreak'; printf 'odd' > $'tests/\\xff\\xfe'",
    "git mv tests/check.sh pkg/moved.sh 2>/dev/null; rm -f pkg/moved.sh",
    "echo '* working-tree-encoding=UTF-16 eol=crlf' > .gitattributes; cp .gitattributes tests; echo x > tests/check.sh",
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_the_tree_is_that_of_the_image_again(spoil: str, open_sandbox: Opener) -> None:
    with open_sandbox() as pristine:
        before = listing(pristine)
    sandbox = open_sandbox()
    done = sandbox.run(spoil, cwd="/srv")
    assert done.exit_code == 0, done.output
    restore(task(), sandbox, open_sandbox, ())
    assert listing(sandbox) == before


def test_what_does_not_steer_stays(open_sandbox: Opener) -> None:
    sandbox = open_sandbox()
    sandbox.run("echo x > conftest.py; echo 'a = 2' > pkg/a.py; echo new > pkg/new.py; rm keep.txt", cwd="/srv")
    assert restore(task(), sandbox, open_sandbox, ()) == ("conftest.py",)
    assert sandbox.run("cat pkg/a.py pkg/new.py; ls", cwd="/srv").output.split() == [
        "a", "=", "2", "new", "data.bin", "link", "pkg", "tests",
    ]  # fmt: skip


def test_what_the_gold_patch_touches_stays(open_sandbox: Opener) -> None:
    sandbox = open_sandbox()
    sandbox.run("echo x > conftest.py; echo y > pyproject.toml", cwd="/srv")
    assert restore(task(), sandbox, open_sandbox, ("pyproject.toml",)) == ("conftest.py",)
    assert sandbox.read_file("/srv/pyproject.toml") == b"y\n"


def test_files_of_the_image_that_its_repository_does_not_know_come_back(open_sandbox: Opener) -> None:
    """As `*.egg-info` of an installed project does. Here the image is one whose HEAD has lost a file."""

    def forgetful() -> Sandbox:
        sandbox = open_sandbox()
        git = "git -c user.name=t -c user.email=t@example.invalid"
        done = sandbox.run(
            "mkdir x.egg-info && echo '[pytest11]' > x.egg-info/entry_points.txt && ln -s entry_points.txt "
            f"x.egg-info/link && {git} rm -q --cached tests/check.sh && {git} commit -q -m forget",
            cwd="/srv",
        )
        assert done.exit_code == 0, done.output
        return sandbox

    with forgetful() as pristine:
        before = listing(pristine)
    sandbox = forgetful()
    spoil = "echo evil > x.egg-info/entry_points.txt; rm x.egg-info/link tests/check.sh; echo x > tests/y"
    sandbox.run(spoil, cwd="/srv")
    touched = restore(task(("tests/other.sh",)), sandbox, forgetful, ())
    assert "x.egg-info/entry_points.txt" in touched
    assert listing(sandbox) == before


def test_an_honest_patch_costs_no_second_sandbox(open_sandbox: Opener) -> None:
    sandbox = open_sandbox()
    opened: list[Callable[[], Sandbox]] = []

    def counted() -> Sandbox:
        opened.append(open_sandbox)
        return open_sandbox()

    assert restore(task(), sandbox, counted, ()) == ()
    sandbox.run("echo 'a = 2' > pkg/a.py", cwd="/srv")
    assert restore(task(), sandbox, counted, ()) == ()
    assert len(opened) == 0


def test_a_sandbox_of_the_image_itself_that_dies_is_ours(open_sandbox: Opener) -> None:
    sandbox = open_sandbox()
    sandbox.run("rm -r tests", cwd="/srv")

    def dead() -> Sandbox:
        made = open_sandbox()
        made.close()
        return made

    with pytest.raises(SandboxError, match="died before any patch was in") as caught:
        restore(task(), sandbox, dead, ())
    assert not isinstance(caught.value, SandboxGone)


def test_test_files_alone_are_restored_by_the_official_way(open_sandbox: Opener) -> None:
    sandbox = open_sandbox()
    sandbox.run("echo x > tests/check.sh; echo x > tests/new.sh; echo x > conftest.py", cwd="/srv")
    restore_tests(task(), sandbox)
    assert sandbox.run("cat tests/check.sh; ls tests; cat conftest.py", cwd="/srv").output.split() == [
        "old", "check.sh", "x",
    ]  # fmt: skip


def test_hidden_tests_that_do_not_fit_the_image_are_told_apart_from_those_that_a_patch_keeps_out(
    open_sandbox: Opener,
) -> None:
    bad = "diff --git a/keep.txt b/keep.txt\n--- a/keep.txt\n+++ b/keep.txt\n@@ -1 +1 @@\n-none\n+some\n"
    good = bad.replace("-none", "-one").replace("@@ -1 +1 @@", "@@ -1,3 +1,3 @@") + " two\n three\n"
    assert not tests_fit(task(patch=bad), open_sandbox)
    assert tests_fit(task(patch=good), open_sandbox)
    sandbox = open_sandbox()
    sandbox.run("echo other > keep.txt", cwd="/srv")
    with pytest.raises(DoesNotGoIn, match=r"keep\.txt"):
        bring_tests(task(patch=good), sandbox)
