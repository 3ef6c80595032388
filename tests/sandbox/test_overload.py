"""More shells and sandboxes than processors, with busy work in between: every answer is the one that was asked for."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, Shell
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests import footprint
from tests.machine import living_processes
from tests.support import needs, seconds

# What a shell does between two answers: nothing, arithmetic, a pipeline, a job in the background whose output comes
# in this result or in none, output in both streams, files.
BUSY = (
    "echo {token}",
    "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo {token}",
    "seq 2000 | sort -rn | tail -1 >/dev/null; echo {token}",
    "(sleep 0.05; echo late-{token}) & echo {token}",
    "echo {token} >&2",
    "printf '%s\\n' {token} > /tmp/$$; cat /tmp/$$",
    "X=$(echo {token}); export X; echo $X",
    "head -c 20000 /dev/zero | tr '\\0' x >/dev/null; echo {token}; (exit 3)",
)


def _work(shell: Shell, name: str, commands: int, counts: collections.Counter[str], wrong: list[str]) -> None:
    for turn in range(commands):
        token = f"{name}-{turn}-{secrets.token_hex(8)}"
        command = BUSY[turn % len(BUSY)].replace("{token}", token)
        counts["asked"] += 1
        try:
            result = shell.run(command, timeout=seconds(60))
        except BaseException as error:
            wrong.append(f"{command}: {error!r}")
            return
        code = 3 if "exit 3" in command else 0
        if result.timed_out:
            counts["hung"] += 1
        elif result.output == "":
            counts["lost"] += 1
        if result.output.replace(f"late-{token}\n", "") != f"{token}\n" or result.exit_code != code:
            wrong.append(f"{command}: {result}")
        counts["answered"] += 1


@pytest.mark.parametrize(
    ("sandboxes", "shells", "commands"),
    [(4, 16, 24), pytest.param(32, 64, 160, marks=pytest.mark.ci)],
)
def test_no_answer_is_wrong_lost_or_late_under_overload(
    sandboxes: int, shells: int, commands: int, spec: SandboxSpec, launcher: LauncherClient
) -> None:
    """Shells of one sandbox take turns; those of different ones do not wait for each other."""
    made = [Sandbox(spec, launcher) for _ in range(sandboxes)]
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    threads = [
        threading.Thread(
            target=_work, args=(made[number % sandboxes].shell(), f"s{number}", commands, counts, wrong), daemon=True
        )
        for number in range(shells)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds(300))
    spent = time.monotonic() - started
    print(
        f"{shells} shells in {sandboxes} sandboxes on {os.cpu_count()} processors: {counts['answered']} commands in "
        f"{spent:.1f} s ({counts['answered'] / spent:.0f}/s): {len(wrong)} wrong, {counts['lost']} lost, "
        f"{counts['hung']} hung"
    )
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert counts["answered"] == shells * commands
    assert counts["lost"] == counts["hung"] == 0
    for sandbox in made:
        sandbox.close()


@pytest.mark.parametrize("held", range(2))
def test_every_shell_of_many_answers_whatever_numbers_init_has_for_its_descriptors(
    held: int, spec: SandboxSpec, launcher: LauncherClient
) -> None:
    """A shell has its descriptors at fixed numbers, and one of init's can already be there."""
    with Sandbox(spec, launcher) as sandbox:
        for _ in range(held):  # a background job holds its output: from here on numbers are odd where they were even
            sandbox.shell().run("sleep 1000 &", timeout=seconds(20))
        for number in range(24):
            result = sandbox.shell().run(f"echo {number}", timeout=seconds(20))
            assert (result.output, result.exit_code) == (f"{number}\n", 0)


INOTIFY = """
import ctypes, sys
libc = ctypes.CDLL(None)
held = 0
while held < 1000 and libc.inotify_init() >= 0:
    held += 1
print(held, flush=True)
sys.stdin.readline()
"""


@needs("root")
def test_what_the_kernel_counts_per_user_is_each_sandboxs_own(spec: SandboxSpec, launcher: LauncherClient) -> None:
    """128 inotify instances by default: used up by one, neither the machine nor another sandbox lacks them."""
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        pytest.skip("no system Python to run inside")
    with Sandbox(spec, launcher) as one, Sandbox(spec, launcher) as two:
        shell = one.shell()
        shell.run(f"mkfifo in; {python} -c '{INOTIFY}' < in > out & exec 3>in; until [ -s out ]; do :; done")
        held = int(shell.run("cat out").output)
        assert held > 0
        fd = ctypes.CDLL(None).inotify_init()
        assert fd >= 0
        os.close(fd)
        assert two.run([python, "-c", INOTIFY], timeout=seconds(20)).output == f"{held}\n"


def _make(count: int, parallel: int, spec: SandboxSpec, launcher: LauncherClient) -> list[Sandbox]:
    """`count` sandboxes, `parallel` at a time."""
    made: list[Sandbox] = []
    failed: list[BaseException] = []
    numbers = iter(range(count))
    lock = threading.Lock()

    def make() -> None:
        while True:
            with lock:
                if failed or next(numbers, None) is None:
                    return
            try:
                made.append(Sandbox(spec, launcher))
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(parallel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [], f"after {len(made)} sandboxes: {failed[0]!r}"
    return made


@pytest.mark.parametrize(
    "count", [pytest.param(200, marks=pytest.mark.ci), pytest.param(1000, marks=pytest.mark.night)]
)
def test_very_many_live_sandboxes_each_answer_and_all_go(
    count: int, spec: SandboxSpec, launcher: LauncherClient
) -> None:
    """1,000 at once on the night tier: each has a shell that answers, then all of them end."""
    spec = dataclasses.replace(spec, limits=dataclasses.replace(spec.limits, processes=64))
    Sandbox(spec, launcher).close()
    before = footprint.resting()
    started = time.monotonic()
    made = _make(count, 32, spec, launcher)
    spent = time.monotonic() - started
    print(f"{count} made, 32 at a time, in {spent:.1f} s: {count / spent:.0f}/s")
    started = time.monotonic()
    answers = [sandbox.shell().run(f"echo {number}").output for number, sandbox in enumerate(made)]
    print(f"each answered in its shell in {time.monotonic() - started:.1f} s")
    assert answers == [f"{number}\n" for number in range(count)]
    during = footprint.Footprint.take()
    print(during.table(before))
    grown = during.grown(before)
    print(f"{grown / count / 1024:.0f} kB of the machine's memory for each with its shell")
    pids = {sandbox.pid for sandbox in made}
    assert len(pids) == count
    started = time.monotonic()
    for sandbox in made:
        sandbox.close()
    print(f"all closed in {time.monotonic() - started:.1f} s")
    assert not pids & living_processes().keys()
    after = footprint.settled(before)
    print(after.table(before))
    assert after.more(before) == []


EMFILE = """
import resource, sys
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch")
made = [Sandbox(spec)]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    while len(made) < 60:
        made.append(Sandbox(spec))
except SandboxError as error:
    print(len(made), error.message, error.hint)
else:
    print("no error")
made.pop().close()
made.pop().close()
made.append(Sandbox(spec))
print([sandbox.run("echo on").output for sandbox in made] == ["on\\n"] * len(made))
"""


def test_an_owner_without_descriptors_is_told_so_and_goes_on(layer: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EMFILE, str(layer)], cwd=Path(__file__).resolve().parents[2],
        capture_output=True, text=True, timeout=seconds(120), check=False,
    )
    assert done.returncode == 0, done.stderr
    told, went_on = done.stdout.splitlines()
    assert "descriptor" in told and "ulimit -n" in told, told
    assert went_on == "True"


def test_a_40_layer_image_shows_every_layer_and_the_topmost_wins(
    spec: SandboxSpec, tmp_path: Path, launcher: LauncherClient
) -> None:
    layers = [path for path in spec.layers if isinstance(path, Path)]
    # Long paths, as a store has: a mount takes 4 KiB of options.
    top = tmp_path / secrets.token_hex(32) / secrets.token_hex(32)
    for number in range(1, 41):
        layer = top / f"{number:02}-{secrets.token_hex(30)}"
        layer.mkdir(parents=True, mode=0o755)
        (layer / f"layer{number}").write_text(f"{number}\n")
        (layer / "mark").write_text(f"{number}\n")
        layers.append(layer)
    for directory in (tmp_path, *top.parents, top):
        if directory.is_relative_to(tmp_path):
            directory.chmod(0o755)
    with Sandbox(dataclasses.replace(spec, layers=tuple(layers)), launcher) as sandbox:
        result = sandbox.run("cat /mark; cat $(ls -d /layer* | sort -V) | tr '\\n' ' '", cwd="/")
        assert result.output == "40\n" + "".join(f"{number} " for number in range(1, 41))
        assert sandbox.run("rm /mark && echo new > /layer7 && cat /layer7 && ls /mark").output.startswith("new\n")
    assert (layers[-1] / "mark").read_text() == "40\n" and (layers[7] / "layer7").read_text() == "7\n"
