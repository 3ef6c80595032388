"""What processes and the kernel hold, before and after."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from benches.contender import descendants

# Kernel memory that a sandbox brings along. Shmem (tmpfs) is told apart: it is the sandbox's disk.
_KERNEL = ("Slab", "KernelStack", "PageTables", "SecPageTables", "Percpu")


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes."""

    private: int
    kernel: int
    shmem: int
    disk: int

    def __sub__(self, other: Held) -> Held:
        return Held(
            self.private - other.private, self.kernel - other.kernel, self.shmem - other.shmem, self.disk - other.disk
        )


def measure(state: Iterable[Path]) -> Held:
    """Of this process with all below it, of the machine's kernel, and of directories on disk."""
    facts = _meminfo()
    return Held(
        private=sum(private(pid) for pid in descendants([os.getpid()])),
        kernel=sum(facts.get(name, 0) for name in _KERNEL), shmem=facts["Shmem"], disk=sum(map(_blocks, state)),
    )


def _meminfo() -> dict[str, int]:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) * 1024
    return found


def shmem() -> int:
    return _meminfo()["Shmem"]


def private(pid: int) -> int:
    """Bytes that only this process has."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # ended meanwhile, or a zombie
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def _blocks(directory: Path) -> int:
    """Bytes on the directory's own file system; what is mounted below it is not counted."""
    try:
        device = directory.lstat().st_dev
    except OSError:
        return 0
    total, waiting = 0, [directory]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if status.st_dev != device:
                continue
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                waiting.append(Path(entry.path))
    return total
