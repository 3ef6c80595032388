"""Who calls: threads, event loops one after another, a thread that ends, a main thread that is interrupted."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from tests.support import seconds

ROOT = Path(__file__).resolve().parents[2]


def test_many_threads_each_with_a_shell_of_their_own(sandbox: Sandbox) -> None:
    wrong: list[str] = []

    def work(name: int) -> None:
        shell = sandbox.shell()
        shell.run(f"cd /tmp; mine={name}")
        for turn in range(10):
            if shell.run(f"echo $mine-{turn}").output != f"{name}-{turn}\n":
                wrong.append(f"{name}-{turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds(60))
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_threads_make_use_and_close_sandboxes_of_their_own(spec: SandboxSpec) -> None:
    outputs: dict[int, str] = {}

    def work(name: int) -> None:
        with Sandbox(spec) as sandbox:
            sandbox.write_file("/tmp/name", str(name).encode())
            outputs[name] = sandbox.shell().run("cat /tmp/name").output

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds(60))
    assert outputs == {number: str(number) for number in range(12)}


def test_many_event_loops_one_after_another(sandbox: Sandbox) -> None:
    shell = sandbox.shell()

    async def turn(number: int) -> tuple[str, bytes]:
        said = await asyncio.to_thread(shell.run, f"echo $last; last={number}")
        await asyncio.to_thread(sandbox.write_file, "/tmp/turn", str(number).encode())
        return said.output, await asyncio.to_thread(sandbox.read_file, "/tmp/turn")

    last = ""
    for number in range(20):
        assert asyncio.run(turn(number)) == (f"{last}\n", str(number).encode())
        last = str(number)


def test_many_calls_of_one_event_loop_at_once(spec: SandboxSpec) -> None:
    async def work() -> list[str]:
        sandboxes = await asyncio.gather(*(asyncio.to_thread(Sandbox, spec) for _ in range(6)))
        results = await asyncio.gather(
            *(asyncio.to_thread(sandbox.run, f"echo {n}") for n, sandbox in enumerate(sandboxes) for _ in range(5))
        )
        await asyncio.gather(*(asyncio.to_thread(sandbox.close) for sandbox in sandboxes))
        return [result.output for result in results]

    assert asyncio.run(work()) == [f"{n}\n" for n in range(6) for _ in range(5)]


def test_a_loop_that_is_closed_while_a_command_runs_leaves_the_sandbox_usable(sandbox: Sandbox) -> None:
    """A call that is given up goes on in its thread; the next one waits its turn."""
    begun = threading.Event()

    def command() -> str:
        begun.set()
        return sandbox.run("sleep 0.5; echo done", timeout=seconds(30)).output

    async def give_up() -> None:
        task = asyncio.ensure_future(asyncio.to_thread(command))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(give_up())
    finally:
        loop.close()
    assert asyncio.run(asyncio.to_thread(sandbox.run, "echo on")).output == "on\n"


def test_a_sandbox_is_made_in_one_loop_and_closed_in_another(spec: SandboxSpec) -> None:
    sandbox = asyncio.run(asyncio.to_thread(Sandbox, spec))
    shell = asyncio.run(asyncio.to_thread(sandbox.shell))
    assert asyncio.run(asyncio.to_thread(shell.run, "echo on")).output == "on\n"
    asyncio.run(asyncio.to_thread(sandbox.close))
    with pytest.raises(SandboxGone):
        asyncio.run(asyncio.to_thread(shell.run, "echo on"))


@pytest.mark.parametrize(
    "wait",
    [
        lambda sandbox: sandbox.run("sleep 1"),
        lambda sandbox: sandbox.shell().run("sleep 1"),
        lambda sandbox: sandbox.run(["sleep", "1"], input=bytes(8 << 20)),  # more than is taken: sending waits
    ],
    ids=["run", "shell", "input"],
)
def test_waiting_does_not_hold_the_gil(sandbox: Sandbox, wait: Callable[[Sandbox], object]) -> None:
    """A thread that counts goes on: held for the whole second, it would count almost nothing."""
    count, stop = 0, threading.Event()

    def counting() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            stop.wait(0.001)

    thread = threading.Thread(target=counting)
    thread.start()
    try:
        wait(sandbox)
    finally:
        counted = count
        stop.set()
        thread.join()
    assert counted > 20


def test_a_sandbox_and_its_shell_outlive_the_thread_that_made_them(spec: SandboxSpec) -> None:
    made: list[Sandbox] = []

    def make() -> None:
        made.append(Sandbox(spec))
        made[0].shell().run("sleep 1000 & mine=kept")

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    time.sleep(0.2)  # a signal for the death of a thread would come by now
    with made[0] as sandbox:
        assert sandbox.shells[0].run("echo $mine; kill -0 $!; echo $?").output == "kept\n0\n"


INTERRUPTED = """
import gc, os, signal, sys, threading, time
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch")
calls = {
    "run": lambda: sandbox.run("sleep 60"),
    "input": lambda: sandbox.run(["sleep", "60"], input=bytes(32 << 20)),
    "shell": lambda: sandbox.shell().run("sleep 60"),
    "making": lambda: [Sandbox(spec).close() for _ in range(10**6)],
    "files": lambda: [sandbox.write_file("/tmp/x", bytes(8 << 20)) for _ in range(10**6)],
}
other = Sandbox(spec)
sandbox = Sandbox(spec)
held = len(os.listdir("/proc/self/fd"))
for _ in range(int(sys.argv[3])):
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        calls[sys.argv[2]]()
    except KeyboardInterrupt:
        print("interrupted", end=" ")
    timer.join()
    try:
        print("usable" if sandbox.run("echo on", timeout=30).output == "on\\n" else "WRONG")
    except SandboxGone as gone:
        print("closed" if "half way" in str(gone) else gone)
    assert other.run("echo on", timeout=30).output == "on\\n"
    sandbox.close()
    sandbox = Sandbox(spec)
deadline = time.monotonic() + 30
while len(os.listdir("/proc/self/fd")) > held and time.monotonic() < deadline:
    gc.collect()
    time.sleep(0.05)
assert len(os.listdir("/proc/self/fd")) <= held, os.listdir("/proc/self/fd")
"""


@pytest.mark.parametrize("call", ["run", "input", "shell", "making", "files"])
def test_an_interrupted_call_leaves_its_sandbox_usable_or_cleanly_closed(layer: Path, call: str) -> None:
    """Ctrl-C in the main thread: no later call gets an earlier one's answer, and none hangs."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(layer), call, "3"], cwd=ROOT, capture_output=True, text=True,
        timeout=seconds(120), check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line in ("interrupted usable", "interrupted closed") for line in lines), lines


class Broken:
    """An input whose reading fails after a while."""

    def __init__(self) -> None:
        self.left = 3

    def read(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("as asked")
        return b"x" * size


def test_an_input_that_raises_is_the_callers_error_and_closes_the_sandbox(
    open_sandbox: Callable[..., Sandbox], sandbox: Sandbox
) -> None:
    given_up = open_sandbox()
    with pytest.raises(ValueError, match="as asked"):
        given_up.run(["cat"], input=Broken())  # type: ignore[arg-type]
    with pytest.raises(SandboxGone, match="half way"):
        given_up.run("echo on")
    assert sandbox.run("echo on").output == "on\n"


@pytest.mark.parametrize("timeout", [float("inf"), 1e10, 1e308, 10**9])
def test_a_timeout_may_be_as_long_as_one_likes(sandbox: Sandbox, timeout: float) -> None:
    shell = sandbox.shell()
    assert sandbox.run("echo on", timeout=timeout).output == "on\n"
    assert shell.run("echo on", timeout=timeout).output == "on\n"


def test_a_timeout_that_is_no_number_is_refused_and_harms_nothing(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError):
        sandbox.run("echo on", timeout=float("nan"))
    with pytest.raises(ValueError):
        sandbox.shell().run("echo on", timeout=float("nan"))
    assert sandbox.run("echo on").output == "on\n"


def test_a_signal_handler_that_does_not_raise_disturbs_nothing(sandbox: Sandbox) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.005):
                os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            data = os.urandom(4 << 20)
            assert sandbox.run("sleep 0.3; cat", input=data[: 1 << 19]).stdout == data[: 1 << 19]
            sandbox.write_file("/tmp/data", data)
            assert sandbox.read_file("/tmp/data") == data
        finally:
            stop.set()
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen
