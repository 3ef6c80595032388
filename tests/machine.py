"""What runs and lies on this machine: processes by descent, and what of ours is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Process:
    """A line of /proc: who, whose child, what."""

    def __init__(self, pid: int) -> None:
        directory = Path("/proc") / str(pid)
        fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
        self.pid = pid
        self.state = fields[0]
        self.parent = int(fields[1])
        self.started = int(fields[19])
        self.uid = directory.stat().st_uid
        raw = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        self.command = raw or f"[{(directory / 'comm').read_text(errors='replace').strip()}]"

    def __str__(self) -> str:
        return f"{self.pid} (child of {self.parent}, uid {self.uid}): {self.command[:160]}"


def living_processes() -> dict[int, Process]:
    """Every process of the machine that is not a zombie."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                process = Process(int(entry))
                if process.state not in "ZX":
                    found[process.pid] = process
    return found


def descendants(pid: int) -> list[Process]:
    """Living children of `pid`, their children, and so on."""
    processes = living_processes()
    found: list[Process] = []
    parents = {pid}
    while True:
        more = [p for p in processes.values() if p.parent in parents and p not in found]
        if not more:
            return found
        found += more
        parents = {p.pid for p in more}


def become_subreaper() -> None:
    """Orphans below this process become its children instead of init's, so that `descendants` sees them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(36, 1, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Leftovers:
    """What of ours lies on the machine: mounts, cgroups, temporary directories. Compare two of them.

    Ours is what has `minisandbox` in its name; a test session's own directories are not counted.
    """

    def __init__(self) -> None:
        self.found = set(self._mounts()) | set(self._cgroups()) | set(self._directories())

    def __sub__(self, earlier: Leftovers) -> list[str]:
        return sorted(self.found - earlier.found)

    @staticmethod
    def _mounts() -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if "minisandbox" in line:
                yield f"mount {line.split()[4]}"

    @staticmethod
    def _cgroups() -> Iterator[str]:
        for directory, names, _ in os.walk("/sys/fs/cgroup"):
            for name in names:
                if "minisandbox" in name:
                    yield f"cgroup {directory}/{name}"

    @staticmethod
    def _directories() -> Iterator[str]:
        for top in {tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", "/run"}:
            with contextlib.suppress(OSError):
                for name in os.listdir(top):
                    if name.startswith(("minisandbox", "skyrl-minisandbox")) and "tests" not in name:
                        yield f"directory {top}/{name}"
