"""Where cgroups may be made on this machine, and what dead launchers left there.

On v1 every hierarchy takes directories below our own cgroup. On v2 a cgroup that holds processes cannot hand memory
limits on to children (the kernel's "no internal processes"), and our own holds at least us. So the nearest cgroup above
it is taken that holds none itself (a slice of systemd's, what a service's `DelegateSubgroup=` lies in, the root), that
we may write to, and below which no limit that is set on us is left behind. Nobody's processes are moved to make one:
others may rely on where they are (Slurm counts by it).
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from skyrl_minisandbox.sandbox.processes import start_time

_NAME = re.compile(r"minisandbox-(\d+)-(\d+)$")
_WANTED = frozenset(("memory", "pids", "cpu"))
# How a cgroup's files begin that has no limit of its own. pids.max is not among them: every unit of systemd has one,
# far above what a sandbox may have.
_UNLIMITED = {"memory.max": "max", "memory.high": "max", "cpu.max": "max", "cpuset.cpus": ""}


class NoCgroup(Exception):
    """Why there is no cgroup to be had here; for doctor."""


class Place(NamedTuple):
    """A cgroup that ours can be made below."""

    directory: str
    v2: bool
    controllers: frozenset[str]


class _Mount(NamedTuple):
    point: str
    root: str  # the cgroup that is mounted there
    v2: bool
    options: frozenset[str]  # of the superblock: on v1 the controllers


def _own_paths(proc: str, pid: str = "self") -> dict[str, str]:
    """Controller list -> path of a process's cgroup, this one's by default, from /proc/PID/cgroup ("" is v2)."""
    paths = {}
    for line in _text(f"{proc}/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    return paths


def _mounts(proc: str) -> list[_Mount]:
    found = []
    for line in _text(f"{proc}/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        if fstype in ("cgroup", "cgroup2"):
            fields = left.split(" ")
            found.append(_Mount(fields[4], fields[3], fstype == "cgroup2", frozenset(options.split(","))))
    return found


def _below(mount: _Mount, path: str) -> str:
    """Where the cgroup `path` is to be seen; a mount may show a part of the hierarchy only."""
    if mount.root != "/" and (path == mount.root or path.startswith(mount.root + "/")):
        path = path[len(mount.root) :]
    found = os.path.normpath(mount.point + path)
    return found if found.startswith(mount.point) and os.path.isdir(found) else mount.point


def find_places(proc: str = "/proc") -> tuple[list[Place], list[str]]:
    """The places, one a hierarchy, each swept; and why there is none in the others."""
    places: list[Place] = []
    reasons: list[str] = []
    own = _own_paths(proc)
    seen: set[str] = set()
    for mount in _mounts(proc):
        key = "" if mount.v2 else next((k for k in own if k and set(k.split(",")) & mount.options & _WANTED), None)
        if key is None or key in seen:
            continue
        seen.add(key)
        here = _below(mount, own.get(key, "/"))
        if mount.v2:
            place, reason = _v2(mount.point, here)
        else:
            place, reason = Place(here, False, frozenset(key.split(",")) & _WANTED), ""
            if not os.access(here, os.W_OK):
                place, reason = None, f"{here}: Permission denied"
        if place is None:
            reasons.append(reason)
        else:
            sweep(place.directory, proc)
            places.append(place)
    return places, reasons


def memory_counter(pid: int, proc: str = "/proc") -> str:
    """The file that counts what was killed for memory in the cgroup of a process, those below it not; "" without."""
    try:
        own = _own_paths(proc, str(pid))
        for mount in _mounts(proc):
            name = "memory.events.local" if mount.v2 else "memory.oom_control"
            key = "" if mount.v2 else next((k for k in own if "memory" in k.split(",")), None)
            if key in own and (mount.v2 or "memory" in mount.options):
                path = f"{_below(mount, own[key])}/{name}"
                if os.path.exists(path):
                    return path
    except (OSError, ValueError):
        pass  # it has ended
    return ""


def _v2(point: str, here: str) -> tuple[Place | None, str]:
    """The nearest fitting cgroup from `here` up to `point`, or why there is none."""
    reason = ""
    directory = here
    while True:
        enabled, fault = _enable(directory)
        if not fault:
            return Place(directory, True, enabled), ""
        reason = reason or fault
        if directory == point:
            return None, reason
        limits = [name for name, free in _UNLIMITED.items() if not _read(directory, name, free).startswith(free)
                  or (not free and _read(directory, name).strip())]
        if limits:
            return None, f"{reason}; a cgroup above it would leave its {', '.join(limits)} behind"
        directory = os.path.dirname(directory)


def _enable(directory: str) -> tuple[frozenset[str], str]:
    """Make controllers available below `directory`: which there are, or the reason why not."""
    available = _WANTED & set(_read(directory, "cgroup.controllers").split())
    if "memory" not in available:
        return frozenset(), f"{directory}: the memory controller is not delegated here"
    if not (os.access(directory, os.W_OK) and os.access(f"{directory}/cgroup.procs", os.W_OK)):
        return frozenset(), f"{directory}: it cannot be written to" + (
            "" if os.geteuid() == 0 else "; `systemd-run --user --scope -p Delegate=yes COMMAND` runs one where it can"
        )
    enabled = available & set(_read(directory, "cgroup.subtree_control").split())
    if "memory" in enabled:
        return enabled, ""  # for others already: one's neighbours keep what they have
    fault: OSError | None = None
    # With real-time group scheduling there may be no cpu controller to be had.
    for wanted in (available, available - {"cpu"}):
        try:
            write(f"{directory}/cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(wanted)))
            return wanted, ""
        except OSError as error:
            fault = error
    kind = _read(directory, "cgroup.type").strip()
    if kind not in ("domain", ""):
        return frozenset(), f"{directory}: it is of the type `{kind}`, which has no memory limits below it"
    return frozenset(), (
        f"{directory}: {fault.strerror if fault else ''}; it holds processes, and below such a one there are no limits."
        f" Move them to a leaf: `mkdir {directory}/own; for p in $(cat {directory}/cgroup.procs); do echo $p > "
        f"{directory}/own/cgroup.procs; done`, or for a systemd service `DelegateSubgroup=own`"
    )


def _read(directory: str, name: str, otherwise: str = "") -> str:
    try:
        return _text(f"{directory}/{name}")
    except OSError:
        return otherwise


def own_name(proc: str) -> str:
    pid = os.getpid()
    return f"minisandbox-{pid}-{start_time(pid, proc)}"


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    """One write(2), as files of the kernel want it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def sweep(parent: str, proc: str) -> None:
    """Remove the directories of launchers that are no more. What is still populated is left alone."""
    for name in os.listdir(parent):
        match = _NAME.match(name)
        if match is None:
            continue
        if start_time(int(match[1]), proc) == match[2]:
            continue
        remove(f"{parent}/{name}")


def remove(directory: str) -> None:
    """Remove a launcher's directory and those of its sandboxes."""
    try:
        for child in os.scandir(directory):
            if child.is_dir():
                os.rmdir(child.path)
        os.rmdir(directory)
    except OSError:
        pass  # busy: something in it has not ended yet, the next sweep takes it
