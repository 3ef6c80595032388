"""Memory and process limits of a sandbox by cgroup, v2 or v1; where neither can be had, rlimits stand in.

One directory a launcher, one below it a sandbox:

    <cgroup mount>/<our own cgroup>/minisandbox-<pid>-<start time>/<sandbox>

The name holds the launcher's identity, so that the next launcher can tell a directory whose owner died (by kill -9, or
because the machine's supervisor ended it) from a living one, and remove it. Existing cgroups are left alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"minisandbox-(\d+)-(\d+)$")


class NoCgroup(Exception):
    """Why there is no cgroup to be had here; for doctor."""


def _own_paths(proc: str) -> dict[str, str]:
    """Controller list -> path of this process's cgroup, from /proc/self/cgroup ("" is v2)."""
    paths = {}
    for line in Path(f"{proc}/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    return paths


def _mounts(proc: str) -> list[tuple[str, str, str]]:
    """(mount point, type, super options) of the cgroup mounts in sight."""
    found = []
    for line in Path(f"{proc}/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        if fstype in ("cgroup", "cgroup2"):
            found.append((left.split(" ")[4], fstype, options))
    return found


def _start_time(proc: str, pid: int) -> str:
    """Field 22 of /proc/PID/stat: with the pid it names a process once. "" for a process that has ended."""
    fields = Path(f"{proc}/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return "" if fields[0] in ("Z", "X") else fields[19]


def _sweep(parent: Path, proc: str) -> None:
    """Remove the directories of launchers that are no more. What is still populated is left alone."""
    for directory in parent.glob("minisandbox-*"):
        match = _NAME.search(directory.name)
        if match is None:
            continue
        try:
            if _start_time(proc, int(match[1])) == match[2]:
                continue
        except OSError:
            pass  # no such process
        _remove(directory)


def _remove(directory: Path) -> None:
    try:
        for child in directory.iterdir():
            if child.is_dir():
                child.rmdir()
        directory.rmdir()
    except OSError:
        pass  # busy: something in it has not ended yet, the next sweep takes it


class Cgroups:
    """The cgroup directory of one launcher. Raises `NoCgroup` when none can be made here."""

    def __init__(self, proc: str = "/proc", prefix: str = "") -> None:
        """proc: where the host's /proc is; prefix: what stands before the host's paths (after a pivot)."""
        pid = os.getpid()
        name = f"minisandbox-{pid}-{_start_time(proc, pid)}"
        self._directories: list[Path] = []
        own = _own_paths(proc)
        reasons = []
        for point, fstype, options in _mounts(proc):
            controllers = set(options.split(","))
            if fstype == "cgroup2":
                parent = Path(point + own.get("", "/"))
                reason = self._enable_v2(parent)
            elif controllers & {"memory", "pids"}:
                key = next((k for k in own if set(k.split(",")) & controllers & {"memory", "pids"}), None)
                parent = Path(point + own[key]) if key else Path(point)
                reason = ""
            else:
                continue
            if not reason:
                try:
                    _sweep(parent, proc)
                    (parent / name).mkdir()
                    self._directories.append(parent / name)
                    if fstype == "cgroup2":
                        (parent / name / "cgroup.subtree_control").write_text("+memory +pids")
                except OSError as error:
                    reason = f"{error.strerror}"
            if reason:
                reasons.append(f"{parent}: {reason}")
        self.memory = self.pids = False
        for directory in self._directories:
            self.memory |= any((directory / f).exists() for f in ("memory.limit_in_bytes", "memory.high"))
            self.pids |= (directory / "pids.max").exists()
        if not (self.memory or self.pids):
            self.close()
            raise NoCgroup("; ".join(reasons) or "no cgroup file system with the memory or pids controller")
        self._directories = [Path(prefix + str(directory)) for directory in self._directories]

    @staticmethod
    def _enable_v2(parent: Path) -> str:
        """Make the controllers available below `parent`; the reason why not, or ""."""
        try:
            available = (parent / "cgroup.controllers").read_text().split()
            if not {"memory", "pids"} <= set(available):
                return "the memory and pids controllers are not delegated here"
            (parent / "cgroup.subtree_control").write_text("+memory +pids")
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def create(self, name: str, memory: int, processes: int) -> list[str]:
        """Make a sandbox's cgroup; its directories, one a hierarchy."""
        made = []
        for directory in self._directories:
            path = directory / name
            path.mkdir()
            made.append(str(path))
            for file, value in (
                ("memory.max", memory), ("memory.limit_in_bytes", memory), ("memory.swap.max", 0),
                ("memory.memsw.limit_in_bytes", memory), ("pids.max", processes),
            ):
                if (path / file).exists():
                    (path / file).write_text(str(value))
            oom = path / "memory.oom.group"
            if oom.exists():
                oom.write_text("0")  # one process dies, not the shell and init with it
        return made

    @staticmethod
    def join(directories: list[str], pid: int) -> None:
        for directory in directories:
            Path(directory, "cgroup.procs").write_text(str(pid))

    @staticmethod
    def remove(directories: list[str]) -> None:
        for directory in directories:
            try:
                os.rmdir(directory)
            except OSError:
                pass  # the next launcher's sweep takes it

    def close(self) -> None:
        for directory in self._directories:
            _remove(directory)


def oom_counter(directories: list[str]) -> str | None:
    """The file that counts kills for memory in a sandbox's cgroup."""
    for directory in directories:
        for file in ("memory.events", "memory.oom_control"):
            if os.path.exists(f"{directory}/{file}"):
                return f"{directory}/{file}"
    return None


def read_oom_kills(path: str) -> int:
    """Processes killed for memory so far; -1 when the file is gone (the sandbox with it)."""
    try:
        with open(path) as file:
            for line in file:
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    except (OSError, ValueError):
        pass
    return -1
