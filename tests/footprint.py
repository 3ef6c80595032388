"""What sandboxes hold of a machine, before and after: compare two of them and print both.

Judged is what can be told to be ours: processes by descent (see `adopting`, which keeps orphans below this process),
their mount tables and namespaces, the descriptors of owner and launchers, cgroups and files by name. What only the
whole machine can tell (memory, slab objects) is printed, and judged where the machine is said to be ours alone
(`clean` in MINISANDBOX_MUST_RUN).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.machine import Process, descendants, living_processes
from tests.support import must_run, seconds

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
_MEMORY = ("AnonPages", "Shmem", "SUnreclaim", "KernelStack", "PageTables", "Percpu")
_SLABS = ("net_namespace", "user_namespace", "pid_namespace", "mnt_cache", "task_struct")
# Bytes: what our processes may keep, the rest of the machine may gain, and a life may leave in caches of the kernel.
_KEPT_BY_US = 16 << 20
_KEPT_BY_OTHERS = 192 << 20
_KEPT_OF_A_LIFE = 1024
_CGROUP = re.compile(r"minisandbox-(\d+)-(\d+)$")


@dataclasses.dataclass
class Footprint:
    """Names of things, and numbers of the whole machine (bytes, and objects that the kernel counts).

    Two runs of the same program hold the same names, as what differs from run to run (pids, inodes) is left out.
    """

    processes: list[str]
    zombies: int
    namespaces: list[str]
    mounts: int
    cgroups: list[str]
    own_fds: list[str]
    launcher_fds: list[str]
    files: list[str]
    private: dict[str, int]  # bytes that nobody else has: of this process, and of launchers
    memory: dict[str, int]
    kernel: dict[str, int]

    @classmethod
    def take(cls, directories: Sequence[Path] = ()) -> Footprint:
        """Of this process and what is below it. directories: where it keeps files; every entry counts, and what has
        our name in shared ones."""
        below = descendants(os.getpid())
        launchers = [process for process in below if _is_launcher(process)]
        return cls(
            processes=sorted(process.command[:120] for process in below),
            zombies=_zombies({os.getpid(), *(process.pid for process in below)}),
            namespaces=_namespaces([os.getpid(), *(process.pid for process in below)]),
            mounts=_mounts([os.getpid(), *(process.pid for process in below)]),
            cgroups=_cgroups({process.pid for process in below}),
            own_fds=_fds(os.getpid()),
            launcher_fds=sorted(name for process in launchers for name in _fds(process.pid)),
            files=sorted(_files(directories)),
            private={"own": _private([os.getpid()]), "launchers": _private([process.pid for process in launchers])},
            memory=_meminfo(),
            kernel=_kernel(),
        )

    def more(self, before: Footprint) -> list[str]:
        """What is held now and was not before, of what is ours beyond doubt; a line each."""
        found = []
        for field in ("processes", "namespaces", "cgroups", "own_fds", "launcher_fds", "files"):
            rest = list(getattr(self, field))
            for name in getattr(before, field):
                if name in rest:
                    rest.remove(name)
            found += [f"{field}: {name}" for name in rest]
        for field in ("zombies", "mounts"):
            if getattr(self, field) > getattr(before, field):
                found.append(f"{field}: {getattr(before, field)} before, {getattr(self, field)} after")
        return found

    def grown(self, before: Footprint) -> int:
        """Bytes of memory that the whole machine uses more than before; what is reclaimable does not count."""
        return sum(self.memory.values()) - sum(before.memory.values())

    def leaked(self, before: Footprint, lives: int) -> list[str]:
        """Memory that `lives` sandboxes left behind, beyond what an allocator keeps; a line each."""
        found = []
        for name, value in self.private.items():
            if value - before.private[name] > _KEPT_BY_US + lives * _KEPT_OF_A_LIFE:
                found.append(f"{name}: {before.private[name]} bytes before, {value} after")
        if "clean" in must_run() and self.grown(before) > _KEPT_BY_OTHERS + lives * _KEPT_OF_A_LIFE:
            found.append(f"the machine: {self.grown(before)} bytes more")
        return found

    def table(self, before: Footprint) -> str:
        """Both, side by side."""
        lines = [f"{'':24}{'before':>14}{'after':>14}"]
        for field in ("processes", "namespaces", "cgroups", "own_fds", "launcher_fds", "files"):
            lines.append(f"{field:24}{len(getattr(before, field)):14}{len(getattr(self, field)):14}")
        for field in ("zombies", "mounts"):
            lines.append(f"{field:24}{getattr(before, field):14}{getattr(self, field):14}")
        for name, value in self.private.items():
            lines.append(f"{'private, ' + name + ', kB':24}{before.private[name] // 1024:14}{value // 1024:14}")
        for name, value in self.memory.items():
            lines.append(f"{name + ', kB':24}{before.memory[name] // 1024:14}{value // 1024:14}")
        for name, value in self.kernel.items():
            lines.append(f"{name:24}{before.kernel.get(name, 0):14}{value:14}")
        return "\n".join(lines)


def resting(directories: Sequence[Path] = ()) -> Footprint:
    """A footprint that is the same for half a second: launchers make some sandboxes ahead."""
    deadline = time.monotonic() + seconds(20)
    now = Footprint.take(directories)
    while True:
        earlier = now
        time.sleep(0.5)
        now = Footprint.take(directories)
        if time.monotonic() > deadline or not (now.more(earlier) or earlier.more(now)):
            return now


def settled(before: Footprint, directories: Sequence[Path] = (), wait: float = 15.0) -> Footprint:
    """A footprint with nothing more than `before`, or the last one taken: the kernel ends some things later."""
    deadline = time.monotonic() + seconds(wait)
    while True:
        now = Footprint.take(directories)
        if not now.more(before) or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Orphans below this process become its children while this lasts, so that descent finds them; then ended ones
    are reaped."""
    libc = ctypes.CDLL(None, use_errno=True)
    was = ctypes.c_int()
    libc.prctl(37, ctypes.byref(was), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    children = {process.pid for process in descendants(os.getpid())}
    if libc.prctl(_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(_SUBREAPER, was.value, 0, 0, 0)
        reap_orphans(children)


def left_after(known: set[int], limit: float) -> list[Process]:
    """What is below this process beside `known`, looked at until there is nothing or `limit` seconds have passed.

    Decided by a look after the deadline: a machine that stood still meanwhile fails nobody.
    """
    deadline = time.monotonic() + seconds(limit)
    while True:
        late = time.monotonic() > deadline
        reap_orphans(known)
        left = [process for process in descendants(os.getpid()) if process.pid not in known]
        if late or not left:
            reap_orphans(known)  # what ended between the two
            return left
        time.sleep(0.005)


def doing(processes: Sequence[Process]) -> str:
    """What these processes are at now, for a message."""
    lines = []
    for process in processes:
        texts = []
        for name in ("comm", "stat", "wchan", "syscall"):
            with contextlib.suppress(OSError):
                texts.append(Path(f"/proc/{process.pid}/{name}").read_text().strip()[:120])
        lines.append(f"{process}: {'; '.join(texts)}")
    return f"below {os.getpid()}: " + "\n".join(lines)


def reap_orphans(known: set[int]) -> None:
    """Reap ended children of this process that are not `known` (their owners wait for those)."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in known:
            with contextlib.suppress(OSError, ValueError, IndexError):
                process = Process(int(name))
                if process.state == "Z" and process.parent == os.getpid():
                    os.waitpid(process.pid, os.WNOHANG)


def namespace_links(pid: int) -> dict[str, str]:
    """Kind -> link of the namespaces of a process; empty where they cannot be read."""
    found = {}
    with contextlib.suppress(OSError):
        for kind in os.listdir(f"/proc/{pid}/ns"):
            if not kind.endswith("_for_children"):
                with contextlib.suppress(OSError):
                    found[kind] = os.readlink(f"/proc/{pid}/ns/{kind}")
    return found


def _is_launcher(process: Process) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/comm").read_text() == "minisandbox-l\n"
    return False


def _zombies(pids: set[int]) -> int:
    """Ended processes that one of these has not reaped."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                process = Process(int(name))
                count += process.state == "Z" and process.parent in pids
    return count


def _namespaces(pids: list[int]) -> list[str]:
    """Kinds, a line for each namespace that these processes are in or hold a descriptor of."""
    links = {link for pid in pids for link in namespace_links(pid).values()}
    for pid in pids:
        links |= {name for name in _targets(pid) if re.match(r"(mnt|net|user|pid|ipc|uts|cgroup|time):\[", name)}
    return sorted(link.partition(":")[0] for link in links)


def _mounts(pids: list[int]) -> int:
    """Mounts in every mount namespace that one of these processes is in."""
    seen: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/{pid}/ns/mnt")
            if link not in seen:
                seen[link] = len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    return sum(seen.values())


def _cgroups(pids: set[int]) -> list[str]:
    """Cgroups of launchers that are ours, or no more: a directory of a launcher and one of each of its sandboxes."""
    living = living_processes()
    found = []
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        for name in names:
            match = _CGROUP.search(name)
            if match is None:
                continue
            pid, started = int(match[1]), match[2]
            process = living.get(pid)
            if process is None or str(process.started) != started:
                found.append("of a launcher that ended")
            elif pid in pids:
                found.append("launcher")
            else:
                continue
            with contextlib.suppress(OSError):
                found += ["sandbox" for entry in os.scandir(f"{directory}/{name}") if entry.is_dir()]
    return sorted(found)


def _targets(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def _fds(pid: int) -> list[str]:
    """What the descriptors of a process are, without the numbers that differ from run to run."""
    return sorted(
        re.sub(r"\d+", "N", name) for name in _targets(pid) if not name.startswith(("/proc/", "/sys/kernel/slab"))
    )


def _files(directories: Sequence[Path]) -> Iterator[str]:
    for top in directories:
        for directory, names, files in os.walk(top):
            for name in (*names, *files):
                yield f"{directory}/{name}"
    if "clean" not in must_run():
        return  # others may use sandboxes of their own at the same time
    for shared in ("/tmp", "/var/tmp", "/dev/shm", "/run"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(shared):
                mine = entry.stat(follow_symlinks=False).st_uid == os.getuid()
                if mine and entry.name.startswith("minisandbox") and "tests" not in entry.name:
                    yield entry.path


def _private(pids: list[int]) -> int:
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # of another user namespace: not ours to read
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_"):
                    found += int(line.split()[1]) * 1024
    return found


def _meminfo() -> dict[str, int]:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _MEMORY:
            found[name] = int(value.split()[0]) * 1024
    return found


def _kernel() -> dict[str, int]:
    """Objects that the kernel counts for the whole machine; those of caches as far as root may see them."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            name, *rest = line.split()
            if name in _SLABS:
                found[name] = int(rest[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/cgroups").read_text().splitlines():
            name, *rest = line.split()
            if name in ("memory", "pids"):
                found[f"{name} cgroups"] = int(rest[1])  # those that were removed and still hold pages, too
    with contextlib.suppress(OSError):
        for line in Path("/sys/fs/cgroup/cgroup.stat").read_text().splitlines():
            name, value = line.split()
            found[f"cgroup {name}"] = int(value)
    return found
