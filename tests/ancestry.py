"""Finding what stands above a command in a sandbox, from the host: its init, its launcher, its worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.machine import Process, living_processes
from tests.support import seconds


def marked(argument: str) -> Process:
    """Wait for the process `sleep ARGUMENT`, of which a test has just one."""
    deadline = time.monotonic() + seconds(60)
    while time.monotonic() < deadline:
        for process in living_processes().values():
            if process.command == f"sleep {argument}":
                return process
        time.sleep(0.02)
    raise AssertionError(f"no `sleep {argument}` came up")


def init_above(process: Process) -> int:
    """The init of the sandbox that it runs in."""
    pid = process.pid
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        names = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
        if len(names) > 1 and names[-1] == "1":
            return pid
        pid = Process(pid).parent
    raise AssertionError(f"{process} is in no sandbox")


def launcher_above(process: Process) -> int:
    """The launcher that made that sandbox: the first above its init outside of every sandbox."""
    return Process(init_above(process)).parent


def worker_above(process: Process) -> int:
    """The process of ours that owns that launcher."""
    pid = launcher_above(process)
    while "skyrl_minisandbox.worker" not in Process(pid).command:
        pid = Process(pid).parent
        if pid <= 1:
            raise AssertionError(f"{process} is below no worker")
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
