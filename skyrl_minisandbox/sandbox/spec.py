"""What a sandbox is made of, and what a command in it gives back. Plain data, standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
        full disk does not look like an out-of-memory kill.
    inodes: files, directories and links that may be written to the root file system.
    open_files: RLIMIT_NOFILE of each process.
    output: bytes of output kept per command and stream; beyond it head and tail are kept, and
        `truncated` is told.
    """

    memory: int = 4 * GIB
    processes: int = 1024
    disk: int = 2 * GIB
    inodes: int = 500_000
    open_files: int = 16384
    output: int = 2 * MIB


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
    scratch: where an upper on disk is made when a tmpfs cannot hold one (a plain user on some kernels).
    private_tmp: mount a tmpfs at /tmp and /run, so that nothing of them gets into the upper (builds).
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
    private_tmp: bool = False
    allow_degraded: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a command did.

    stdout, stderr: bytes as written, cut to `Limits.output` each (`truncated`). A shell has one merged
        stream, kept in `stdout`.
    exit_code: the exit status, 128 + N when ended by signal N, 124 when `timed_out`.
    oom_killed: a process of the sandbox was killed for memory while the command ran.
    disk_full: the root file system had no room left when the command ended.
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
