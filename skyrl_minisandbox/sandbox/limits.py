"""Limits of a sandbox by cgroup, v2 or v1; where neither can be had, rlimits stand in.

One directory a launcher, one below it a sandbox:

    <cgroup mount>/<where we may>/minisandbox-<pid>-<start time>/<sandbox>

The name holds the launcher's identity, so that the next launcher can tell a directory whose owner died (by kill -9, or
because the machine's supervisor ended it) from a living one, and remove it. Existing cgroups are left alone: no process
but a sandbox's is ever moved, and no limit that was set on us is left behind. `cgroup_places.py` finds the places.

A sandbox's init comes in without the kernel's global lock for moving a process, which a write of its number to
`cgroup.procs` takes (a grace period of RCU each when the machine is quiet): on v2 clone3 makes it there
(CLONE_INTO_CGROUP, Linux 5.7), on v1 it writes 0 to `tasks`, which moves the writing thread alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from typing import Any

from skyrl_minisandbox.sandbox import linux
from skyrl_minisandbox.sandbox.cgroup_places import NoCgroup, Place, find_places, own_name, remove, write

__all__ = ["Cgroup", "Cgroups", "NoCgroup", "join", "read_oom_kills"]

# cpu.shares of v1 have 1024 as their default and 2 to 262144 as their range (kernel/sched/sched.h); cpu.weight of v2
# has 100, and 1 to 10000. Both are relative to their siblings, so equal defaults have to stay equal.
_DEFAULT_SHARES, _DEFAULT_WEIGHT = 1024, 100
# file -> the field of `spec.Limits`; in this order, as memory and swap together may not be less than memory alone.
_V2 = (("memory.max", "memory"), ("memory.swap.max", ""), ("pids.max", "processes"), ("cpu.weight", "cpu_weight"))
_V1 = (
    ("memory.limit_in_bytes", "memory"), ("memory.memsw.limit_in_bytes", "memory"), ("pids.max", "processes"),
    ("cpu.shares", "cpu_weight"),
)


# What an empty file of tmpfs takes of the memory: 950 bytes; 1,880 with the overlay's own over it (Linux 6.18).
INODE_BYTES = 2048
_FEWEST_INODES = 4096


class Cgroup:
    """One sandbox's cgroup. Without any directory it is none, and everything here does nothing.

    into: a descriptor for CLONE_INTO_CGROUP, or -1. entries: descriptors that the new process hands to `join`.
    oom_counter: the file that counts processes killed for memory, "" without one.
    """

    def __init__(self) -> None:
        self.directories: list[str] = []
        self.into = -1
        self.entries: list[int] = []
        self.oom_counter = ""

    def __bool__(self) -> bool:
        return bool(self.directories)

    def close(self) -> None:
        """Give back the descriptors, when the process is in."""
        for fd in (*self.entries, *((self.into,) if self.into >= 0 else ())):
            os.close(fd)
        self.into, self.entries = -1, []

    def remove(self) -> None:
        """Remove the directories, when the last process has gone."""
        self.close()
        for directory in self.directories:
            with contextlib.suppress(OSError):  # busy: the next launcher's sweep takes it
                os.rmdir(directory)
        self.directories = []


class Cgroups:
    """The cgroup directories of one launcher. Raises `NoCgroup` when none can be made here.

    memory, pids, cpu: which controllers there are.
    """

    def __init__(self, proc: str = "/proc", prefix: str = "") -> None:
        """proc: where the host's /proc is; prefix: what stands before the host's paths (after a pivot)."""
        self._name = own_name(proc)
        self._prefix = prefix
        self._places: list[tuple[Place, str, list[tuple[str, str]]]] = []  # place, our directory, files and fields
        places, reasons = find_places(proc)
        controllers: set[str] = set()
        for place in places:
            directory = f"{place.directory}/{self._name}"
            try:
                files = self._prepare(place, directory)
            except OSError as error:
                reasons.append(f"{place.directory}: {error.strerror}")
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
                continue
            controllers |= place.controllers
            self._places.append((place, prefix + directory, files))
        self.memory, self.pids, self.cpu = ("memory" in controllers, "pids" in controllers, "cpu" in controllers)
        if not (self.memory or self.pids):
            self.close()
            raise NoCgroup("; ".join(reasons) or "no cgroup file system with the memory or pids controller")

    @staticmethod
    def _prepare(place: Place, directory: str) -> list[tuple[str, str]]:
        """Make our directory and one below it, to see that it can be done and which files there are."""
        os.mkdir(directory)
        if place.v2:
            enabled = " ".join(f"+{controller}" for controller in sorted(place.controllers))
            write(f"{directory}/cgroup.subtree_control", enabled)
        probe = f"{directory}/probe"
        os.mkdir(probe)
        try:
            names = set(os.listdir(probe))
        finally:
            os.rmdir(probe)
        return [(file, field) for file, field in (_V2 if place.v2 else _V1) if file in names]

    def create(self, name: str) -> Cgroup:
        """Make a sandbox's cgroup, without limits yet. Raises `OSError`."""
        made = Cgroup()
        try:
            for place, parent, _ in self._places:
                directory = f"{parent}/{name}"
                try:
                    os.mkdir(directory)
                except FileNotFoundError:  # a sweep from another pid namespace took our empty directory
                    self._prepare(place, parent)
                    os.mkdir(directory)
                made.directories.append(directory)
                if place.v2:
                    made.into = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                else:
                    made.entries.append(os.open(f"{directory}/tasks", os.O_WRONLY | os.O_CLOEXEC))
                if "memory" in place.controllers:
                    made.oom_counter = f"{directory}/{'memory.events' if place.v2 else 'memory.oom_control'}"
        except BaseException:
            made.remove()
            raise
        return made

    def limit(self, cgroup: Cgroup, limits: Mapping[str, int]) -> None:
        """Set the limits of a `spec.Limits` as a dictionary. Raises `OSError`."""
        for directory, (_, _, files) in zip(cgroup.directories, self._places, strict=True):
            for file, field in files:
                write(f"{directory}/{file}", str(_value(file, limits[field] if field else 0)))

    def close(self) -> None:
        for _, directory, _ in self._places:
            remove(directory)


def _value(file: str, value: int) -> int:
    if file == "cpu.shares":
        return max(2, min(value * _DEFAULT_SHARES // _DEFAULT_WEIGHT, 262144))
    return value


def join(entries: list[int]) -> None:
    """Enter the cgroups whose `tasks` these are, as the only thread of this process, and close them."""
    for fd in entries:
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


_HEADROOM = 16
"""Of an upper on disk, one file may have all but such a part: who writes it is told, and the sandbox goes on."""


def rlimits(request: Mapping[str, Any]) -> dict[int, int]:
    """What each process of a command is limited to by itself, as far as the machine's own limits allow."""
    limits = request["limits"]
    wanted = {resource.RLIMIT_NOFILE: limits["open_files"], resource.RLIMIT_CORE: limits["core"]}
    if not request["memory_cgroup"]:
        wanted[resource.RLIMIT_AS] = limits["memory"]
    if request["upper"] is not None:  # no quota there; `watch.py` comes by a little later, and ends what is beyond
        wanted[resource.RLIMIT_FSIZE] = limits["disk"] - limits["disk"] // _HEADROOM
    return {which: allowed(which, value) for which, value in wanted.items()}


def allowed(which: int, value: int) -> int:
    hard = resource.getrlimit(which)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def tmpfs_size(limits: Mapping[str, int], bytes_: int) -> str:
    """Mount options of a tmpfs that takes so many bytes: its inodes, which are memory too, are bounded with it."""
    inodes = max(_FEWEST_INODES, min(limits["inodes"], (limits["memory"] - bytes_) // 2 // INODE_BYTES))
    return f"size={bytes_},nr_inodes={inodes}"


def is_full(path: str) -> bool:
    """Whether a file system has no room or no inode left. One without a number of inodes (btrfs) has enough."""
    found = os.statvfs(path)
    return found.f_bavail == 0 or (found.f_files > 0 and found.f_favail == 0)


def read_oom_kills(path: str) -> int:
    """Processes killed for memory so far; -1 when the file is gone (the sandbox with it)."""
    try:
        for line in linux.read_small(path).splitlines():
            key, _, value = line.partition(b" ")
            if key == b"oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return -1
