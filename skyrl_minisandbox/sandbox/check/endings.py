"""Promises about endings: nothing survives a timeout, `close`, or the death of whoever owned it."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from skyrl_minisandbox.sandbox.check.attempts import WEAK, Lacking, Outcome
from skyrl_minisandbox.sandbox.check.traps import PACKAGE
from skyrl_minisandbox.sandbox.check.trials import Bench, trial

_OWNER = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.sandbox.client import shared
sandbox = Sandbox(pickle.load(sys.stdin.buffer))
sandbox.shell().run(sys.argv[2])
print(sandbox.pid, shared().pid, flush=True)
sys.stdin.buffer.read()
"""


def _pids(argument: str) -> list[int]:
    """Processes of this machine, those of sandboxes among them, with `argument` in their command line."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and argument.encode() in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


@trial("timeout-tree", "a timeout ends the whole tree, daemons too, and keeps the output")
def _timeout(bench: Bench) -> Outcome:
    with bench.open() as sandbox:
        for way in (sandbox.run, sandbox.shell().run):
            argument = secrets.token_hex(12)
            result = way(f"{bench.sleeper(argument)}; echo started; sleep 600", timeout=1.5)
            if b"started" not in result.stdout:
                raise Lacking(f"the daemon did not start within 1.5 s: {result.output.strip()[-200:]}")
            if not result.timed_out:
                return "a command that runs out of time is not told so"
            if left := _living(_pids(argument)):
                return f"{left} of its processes live on"
        on = sandbox.run(bench.argv("print('alive')"), timeout=60).stdout == b"alive\n"
    return None if on else "the sandbox does not go on"


@trial("close-leaves-nothing", "nothing in the background survives `close`")
def _close(bench: Bench) -> Outcome:
    argument = secrets.token_hex(12)
    with bench.open() as sandbox:
        sandbox.shell().run(bench.sleeper(argument), timeout=60)
        pids = [*_pids(argument), sandbox.pid]
        if len(pids) < 2:
            raise Lacking("the background process is not seen from here")
    left = _living(pids, 0.0)
    return f"{left} processes live on" if left else None


def _living(pids: list[int], seconds: float = 2.0) -> int:
    """How many do not end within `seconds`: one that is killed may take a moment on a loaded machine."""
    fds = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fds.append(os.pidfd_open(pid))
    left, rest, deadline = set(fds), seconds, time.monotonic() + seconds
    while left and rest >= 0:
        left -= set(select.select(list(left), [], [], rest)[0])
        rest = deadline - time.monotonic()
    for fd in fds:
        os.close(fd)
    return len(left)


@contextlib.contextmanager
def _second_owner(bench: Bench) -> Iterator[tuple[int, int, list[int]]]:
    """Another process with a sandbox, and a sleeper in it: its pid, its launcher's, pidfds of those inside."""
    argument = secrets.token_hex(12)
    owner = subprocess.Popen(
        [sys.executable, "-B", "-c", _OWNER, str(PACKAGE), bench.sleeper(argument)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )
    assert owner.stdin is not None and owner.stdout is not None
    fds: list[int] = []
    try:
        owner.stdin.write(pickle.dumps(bench.spec))  # both ends are ours
        owner.stdin.flush()
        words = owner.stdout.readline().split()
        if len(words) != 2:
            raise Lacking("a second owner could not be started")
        init, launcher = map(int, words)
        pids = _pids(argument)
        if not pids:
            raise Lacking("the background process is not seen from here")
        for pid in (init, *pids):
            fds.append(os.pidfd_open(pid))
        yield owner.pid, launcher, fds
    finally:
        owner.kill()
        owner.communicate()
        for fd in fds:
            os.close(fd)


def _killed(victim: int, fds: list[int]) -> Outcome:
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    left = set(fds)
    while left and (rest := started + 10 - time.monotonic()) > 0:
        left -= set(select.select(list(left), [], [], rest)[0])
    took = time.monotonic() - started
    if left:
        return f"{len(left)} of {len(fds)} processes live on after 10 s"
    return (WEAK, f"it takes {took:.1f} s") if took > 1 else None


@trial("owner-killed", "kill -9 of the owner ends its sandboxes within 1 s")
def _owner_killed(bench: Bench) -> Outcome:
    with _second_owner(bench) as (owner, _, fds):
        return _killed(owner, fds)


@trial("launcher-killed", "kill -9 of the launcher ends its sandboxes within 1 s")
def _launcher_killed(bench: Bench) -> Outcome:
    with _second_owner(bench) as (_, launcher, fds):
        return _killed(launcher, fds)
