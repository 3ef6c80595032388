"""What a sandbox is made of, and what a command in it gives back. Plain data, standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_minisandbox.errors import SandboxError

if TYPE_CHECKING:
    from skyrl_minisandbox.sandbox.state import FrozenLayer

GIB = 1 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one sandbox may use. Reaching a limit is told in a `CommandResult`; it is never an exception.

    memory: bytes of the whole sandbox, its tmpfs upper included (memory cgroup; without one, the
        address space of each process).
    processes: processes and threads in the whole sandbox (pids cgroup and RLIMIT_NPROC).
    disk: bytes that may be written to the root file system; below `memory` when the upper is tmpfs, so that a
        full disk does not look like an out-of-memory kill. An upper on disk has no quota: it is looked at every few
        seconds, and a sandbox whose upper is beyond is ended (`Sandbox.ended_by`).
    open_files: RLIMIT_NOFILE of each process.
    output: bytes of output kept per command and stream; beyond it head and tail are kept, and
        `truncated` is told.
    cpu_weight: share of the processors when there are not enough, in the scale of cgroup v2: 1 to 10000, 100 is what
        everybody else has (cpu cgroup; nothing without one).
    inodes: files, directories and links that may be made. On tmpfs fewer where `memory` would not hold them: each
        takes 2 KiB of it.
    core: bytes of a core file; 0 for none.
    command_seconds: the deadline of commands that have no `timeout` of their own; None for none.

    Raises `SandboxError` for a value that cannot be, with the name of the field.
    """

    memory: int = 4 * GIB
    processes: int = 1024
    disk: int = 2 * GIB
    open_files: int = 16384
    output: int = 2 * MIB
    cpu_weight: int = 100
    # What an agent makes is a few thousand; a fresh scientific environment has 20,000, a large node_modules 100,000.
    inodes: int = 500_000
    core: int = 0
    command_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SandboxError(f"limits.{name} is {value!r}; it must be an integer")
            if not least <= value <= most:
                raise SandboxError(f"limits.{name} is {value}; it must be from {least} to {most}")
        seconds = self.command_seconds
        if seconds is None:
            return
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
            raise SandboxError(f"limits.command_seconds is {seconds!r}; it must be a number above 0, or None")


_LARGEST = (1 << 63) - 1
_RANGES = {
    "memory": (32 * MIB, _LARGEST),  # init itself takes 10 MiB
    "processes": (4, 1 << 22),  # linux/threads.h, PID_MAX_LIMIT
    "disk": (MIB, _LARGEST),
    "open_files": (16, 1 << 20),  # fs.nr_open's default, above which no limit can be set
    "output": (1, GIB),
    "cpu_weight": (1, 10000),  # linux/cgroup.h, CGROUP_WEIGHT_MIN and _MAX
    "inodes": (16, 1 << 40),
    "core": (0, _LARGEST),
}


@dataclasses.dataclass(frozen=True)
class Bind:
    """A host path bound into the sandbox, never followed through a link of the image.

    Read-only unless told otherwise; always nosuid and nodev.
    """

    source: str
    target: str
    read_only: bool = True


@dataclasses.dataclass(frozen=True)
class SandboxSpec:
    """One sandbox.

    layers: read-only trees, the lowest first; those of a `Snapshot` too.
    binds: host paths to bind over the root, in order.
    keep: paths of the root file system that stay visible (and writable) where a bind covers them,
        such as `/usr/local` below a bound `/usr`.
    env: the environment of every command; nothing of ours is inherited.
    workdir: where commands start.
    network: "none" (loopback only) or "host" (the host's, for builds).
    upper: None for a tmpfs; a directory on disk for big ones (builds), whose file system must be able to hold an
        overlay upper. It must not exist or be empty; its content goes with the sandbox.
    scratch: where an upper on disk is made when a tmpfs cannot hold one (a plain user on some kernels), and with
        `on_disk` in any case. Any number of sandboxes may have the same.
    on_disk: the upper is on disk, though a tmpfs could hold it: slower, and no memory of the sandbox's.
    private_tmp: mount a tmpfs at /tmp and /run, so that nothing of them gets into the upper (builds).
    start_shell: start the bash of the first `shell()` at once, for whoever will use one.
    allow_degraded: names of protections that may be missing; one missing and not named is an error.
    """

    layers: tuple[Path | FrozenLayer, ...]
    binds: tuple[Bind, ...] = ()
    keep: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    workdir: str = "/"
    hostname: str = "sandbox"
    network: str = "none"
    limits: Limits = Limits()
    upper: Path | None = None
    scratch: Path | None = None
    on_disk: bool = False
    private_tmp: bool = False
    start_shell: bool = False
    allow_degraded: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a command did.

    stdout, stderr: bytes as written, cut to `Limits.output` each (`truncated`). A shell has one merged
        stream, kept in `stdout`.
    exit_code: the exit status, 128 + N when ended by signal N, 124 when `timed_out`.
    oom_killed: a process of the sandbox was killed for memory while the command ran.
    disk_full: the root file system, /dev/shm or a private /tmp had no room or no inode left when the command ended; or
        one file was to become larger than an upper on disk may be.
    seconds: wall time inside the sandbox.
    merged: stdout and stderr in the order of their arrival.
    notice: one sentence for the agent when its shell had to be started anew, else empty.
    """

    stdout: bytes
    stderr: bytes
    exit_code: int
    timed_out: bool = False
    oom_killed: bool = False
    disk_full: bool = False
    truncated: bool = False
    seconds: float = 0.0
    merged: bytes = b""
    notice: str = ""

    @property
    def output(self) -> str:
        """Both streams in order, as text; bytes that are not UTF-8 are replaced."""
        return self.merged.decode("utf-8", "replace")
