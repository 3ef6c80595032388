"""Who may end at any moment: the owner in each way, its forked child, the launcher, a thread, another thread's call.

What is simplest of this (kill -9 of an idle owner, a dropped sandbox) is in test_teardown.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests import footprint
from tests.machine import descendants
from tests.sandbox.test_teardown import alive, gone, inside
from tests.support import seconds

ROOT = Path(__file__).resolve().parents[2]

# Makes sandboxes that are busy on threads, one of them dropped and one closed, and then ends as it is told.
OWNER = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch")
made = [Sandbox(spec) for _ in range(3)]
made[0].run("(setsid sleep 54321 &) ; sleep 54321 & true")
made[1].shell().run("sleep 54321 &")
threading.Thread(target=lambda: made[2].run("sleep 54321"), daemon=True).start()
time.sleep(0.2)
print(made[0]._launcher.pid, flush=True)
sys.stdin.readline()
"""
ENDS = {
    "normally": "",
    "by sys.exit": "sys.exit(0)",
    "by an exception": "raise RuntimeError('as asked')",
    "by os._exit": "os._exit(0)",
    "by SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "by SIGINT": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "by abort": "os.abort()",
    "by exec": "os.execv('/bin/true', ['true'])",
}


@pytest.mark.parametrize(
    "how", [how if how in ("normally", "by os._exit") else pytest.param(how, marks=pytest.mark.ci) for how in ENDS]
)
def test_an_owner_that_ends_leaves_nothing(how: str, layer: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER + ENDS[how], str(layer)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert owner.stdout is not None
    launcher = int(owner.stdout.readline())
    pids = [process.pid for process in descendants(owner.pid)]
    assert launcher in pids and len(pids) >= 4 + 3
    owner.communicate("\n", timeout=seconds(20))
    assert gone(pids, seconds(1))


def test_a_killed_launcher_ends_busy_sandboxes_and_every_caller_is_told(
    spec: SandboxSpec, launcher: LauncherClient
) -> None:
    """Commands, creations and closes are under way; each ends, with our exceptions or a result, within a second."""
    sandboxes = [Sandbox(spec, launcher) for _ in range(4)]
    told: list[BaseException | str] = []

    def tell(act: Callable[[], object]) -> None:
        try:
            while True:
                act()
        except BaseException as error:
            told.append(error)

    def churn() -> None:
        Sandbox(spec, launcher).close()

    acts: list[Callable[[], object]] = [
        lambda: sandboxes[0].run("sleep 1000"),
        lambda: sandboxes[1].shell().run("sleep 1000 & sleep 1000"),
        lambda: sandboxes[2].run(["true"]),
        lambda: sandboxes[3].write_file("/testbed/file", b"x" * 1_000_000),
        churn, churn,
    ]
    threads = [threading.Thread(target=tell, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    pids = [process.pid for process in descendants(launcher.pid)]
    assert len(pids) >= 6
    os.kill(launcher.pid, signal.SIGKILL)
    assert gone(pids, seconds(1))
    for thread in threads:
        thread.join(seconds(5))
    assert not any(thread.is_alive() for thread in threads)
    assert [error for error in told if not isinstance(error, SandboxError)] == []
    assert len(told) == len(acts)
    for sandbox in sandboxes:
        with pytest.raises(SandboxGone):
            sandbox.run("true")
        sandbox.close()
    with pytest.raises(SandboxError):
        Sandbox(spec, launcher)
    with Sandbox(spec) as other:
        assert other.run("echo on").output == "on\n"


@pytest.mark.ci
def test_launchers_killed_at_random_moments_end_what_they_made(spec: SandboxSpec) -> None:
    """Creation is where an init has no lifeline yet: many moments of it are hit."""
    with footprint.adopting():
        footprint.resting()  # a launcher of this session makes sandboxes ahead: not meanwhile
        known = {process.pid for process in descendants(os.getpid())}
        for turn in range(40):
            client = LauncherClient()
            made: list[Sandbox] = []
            wrong: list[BaseException] = []

            def create(client: LauncherClient, made: list[Sandbox], wrong: list[BaseException]) -> None:
                try:
                    while True:
                        made.append(Sandbox(spec, client))
                except SandboxError:
                    pass
                except BaseException as error:
                    wrong.append(error)

            threads = [threading.Thread(target=create, args=(client, made, wrong)) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(0.01 + turn * 0.0013)
            os.kill(client.pid, signal.SIGKILL)
            left = footprint.left_after(known | {client.pid}, 1)
            assert left == [], f"turn {turn}: still there: {footprint.doing(left)}"
            for thread in threads:
                thread.join(seconds(10))
                assert not thread.is_alive()
            assert wrong == []
            for sandbox in made:
                sandbox.close()


def test_sandboxes_of_a_thread_that_ended_live_on_and_end_by_another_thread(spec: SandboxSpec) -> None:
    """PR_SET_PDEATHSIG follows a thread: neither the one that started the launcher nor one that made a sandbox may
    take it along."""
    made: list[Sandbox] = []

    def make() -> None:
        client = LauncherClient()
        made.extend(Sandbox(spec, client) for _ in range(2))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    gc.collect()
    time.sleep(0.3)
    assert [sandbox.run("echo on").output for sandbox in made] == ["on\n", "on\n"]
    pids = [pid for sandbox in made for pid in inside(sandbox.pid)] if os.geteuid() == 0 else [s.pid for s in made]

    def close() -> None:
        for sandbox in made:
            sandbox.close()

    closer = threading.Thread(target=close)
    closer.start()
    closer.join()
    assert not any(alive(pid) for pid in pids)
    made[0]._launcher.close()


def test_close_from_many_threads_while_many_commands_wait(spec: SandboxSpec) -> None:
    sandbox = Sandbox(spec)
    pids = inside(sandbox.pid) if os.geteuid() == 0 else [sandbox.pid]
    told: list[BaseException] = []

    def use() -> None:
        try:
            sandbox.run("sleep 1000")
        except BaseException as error:
            told.append(error)

    users = [threading.Thread(target=use, daemon=True) for _ in range(4)]
    for thread in users:
        thread.start()
    time.sleep(0.2)
    closers = [threading.Thread(target=sandbox.close, daemon=True) for _ in range(4)]
    for thread in closers:
        thread.start()
    for thread in (*closers, *users):
        thread.join(seconds(10))
        assert not thread.is_alive()
    assert [type(error) for error in told] == [SandboxGone] * 4
    assert not any(alive(pid) for pid in pids)


def test_the_launcher_closed_while_sandboxes_are_made(spec: SandboxSpec) -> None:
    client = LauncherClient()
    told: list[BaseException] = []

    def make() -> None:
        try:
            while True:
                Sandbox(spec, client)  # dropped at once: both ways of ending at the same time
        except BaseException as error:
            told.append(error)

    threads = [threading.Thread(target=make, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    pids = [process.pid for process in descendants(client.pid)]
    client.close()
    assert gone(pids, seconds(1))
    for thread in threads:
        thread.join(seconds(10))
        assert not thread.is_alive()
    assert [error for error in told if not isinstance(error, SandboxError)] == []


def _child_uses_and_ends(sandbox: Sandbox, how: str, pipe: int) -> None:
    """In a forked child: whatever it does with the parent's sandbox, the parent's goes on."""
    words = []
    try:
        if how == "run":
            sandbox.run("echo from the child > /testbed/child")
        elif how == "close":
            sandbox.close()
        elif how == "drop":
            del sandbox
            gc.collect()
        elif how == "with":
            with sandbox:
                pass
    except SandboxGone as error:
        words.append(f"gone: {error}")
    except BaseException as error:
        words.append(f"{type(error).__name__}: {error}")
    os.write(pipe, ("; ".join(words) or "nothing").encode())


@pytest.mark.parametrize("how", ["nothing", "run", "close", "drop", "with"])
def test_a_forked_child_does_not_touch_its_parents_sandboxes(how: str, spec: SandboxSpec) -> None:
    """A data loader forks the trainer: the child's copies of our objects are dead there, and only there."""
    with Sandbox(spec) as sandbox:
        shell = sandbox.shell()
        shell.run("X=1")
        read, write = os.pipe()
        child = multiprocessing.get_context("fork").Process(target=_child_uses_and_ends, args=(sandbox, how, write))
        child.start()
        child.join(seconds(20))
        os.close(write)
        with open(read) as file:
            words = file.read()
        assert child.exitcode == 0
        assert words == "nothing" if how != "run" else words.startswith("gone:") and "fork" in words
        assert alive(sandbox.pid)
        assert shell.run("echo $X; ls /testbed").output == "1\nlower.txt\nsrc\n"
    assert not alive(sandbox.pid)


def test_a_forked_child_makes_sandboxes_of_its_own(spec: SandboxSpec) -> None:
    with Sandbox(spec) as sandbox:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with Sandbox(spec) as own:
                    os.write(write, own.run("echo on").stdout)
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as file:
            assert file.read() == "on\n"
        os.waitpid(pid, 0)
        assert sandbox.run("echo on").output == "on\n"


FORKED = """
import os, sys, time
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch")
sandbox = Sandbox(spec)
if sys.argv[2] == "os.fork":
    pid = os.fork()
else:  # what C libraries do: no handler of Python's runs
    import ctypes
    pid = ctypes.PyDLL(None).fork()
if pid == 0:
    time.sleep(30)
    os._exit(0)
print(sandbox.pid, sandbox._launcher.pid, pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("fork", ["os.fork", "fork(3)"])
def test_a_forked_child_holds_nothing_open_after_its_parent_was_killed(fork: str, layer: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", FORKED, str(layer), fork], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    init, launcher, child = map(int, owner.stdout.readline().split())
    try:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        assert gone([init, launcher], seconds(1))
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_collected_sandboxes_end_without_a_thread_waiting(spec: SandboxSpec, launcher: LauncherClient) -> None:
    """A cycle keeps them until the collector comes, as in a program that keeps no order."""

    class Holder:
        def __init__(self) -> None:
            self.itself = self
            self.sandbox = Sandbox(spec, launcher)
            self.sandbox.shell().run("sleep 1000 &")

    pids = [Holder().sandbox.pid for _ in range(5)]
    gc.collect()
    assert gone(pids, seconds(1))
    with Sandbox(spec, launcher) as other:
        assert other.run("echo on").output == "on\n"
