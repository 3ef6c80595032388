"""What outlives a sandbox's processes: frozen uppers, snapshots, and what a shell takes along. Plain data."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from skyrl_minisandbox.sandbox import wire

if TYPE_CHECKING:
    from skyrl_minisandbox.sandbox.client import LauncherClient


class FrozenLayer:
    """What a sandbox had written when it was frozen, as a layer for others. Lives in the launcher, for as long as a
    sandbox, spec or snapshot holds this object.

    bytes, inodes: what it takes. directory: where it lies, when it is on disk; goes with it.
    """

    def __init__(
        self, launcher: LauncherClient, number: int, bytes: int, inodes: int, directory: Path | None
    ) -> None:
        self.launcher, self.number, self.bytes, self.inodes, self.directory = launcher, number, bytes, inodes, directory

    def __del__(self) -> None:
        if self.launcher.owner_pid != os.getpid():
            return  # a copy of ours in a fork
        if self.launcher.owner_pid != os.getpid():
            return  # in a forked child: it is the parent's
        self.launcher.release(self.number)
        if self.directory is not None:
            remove_tree(self.directory)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The files of a sandbox at one moment.

    layers: for `SandboxSpec.layers`, in this process. ended: command lines of the processes that were ended for it.
    """

    layers: tuple[Path | FrozenLayer, ...]
    ended: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """One path that differs from the layers; surrogate escapes where a name is not UTF-8.

    A removed or added directory stands for what is below it only when removed: what was added is listed whole.
    """

    path: str
    kind: Literal["added", "modified", "removed"]


@dataclasses.dataclass(frozen=True)
class ShellState:
    """What a shell goes on with: directory, exit code of the last command, exports and functions as bash text."""

    cwd: str
    code: int
    text: bytes
    ended: tuple[str, ...] = ()

    @staticmethod
    def unpack(payload: bytes) -> tuple[str, ShellState]:
        """The shell's key, and its state. Raises `ValueError` for what init does not send."""
        if len(payload) < wire.SHELL.size:
            raise ValueError("no state of a shell")
        key_length, code, cwd_length = wire.SHELL.unpack_from(payload)
        rest = payload[wire.SHELL.size :]
        key, cwd = rest[:key_length], rest[key_length : key_length + cwd_length]
        if len(cwd) != cwd_length or not cwd.startswith(b"/") or b"\0" in cwd:
            raise ValueError("no state of a shell")
        return key.decode(errors="replace"), ShellState(os.fsdecode(cwd), code, rest[key_length + cwd_length :])


def remove_tree(path: Path) -> None:
    """Remove a tree of ours whatever its modes are: overlay's work directory has mode 000."""
    import shutil

    for directory, _, _ in os.walk(path):
        try:
            os.chmod(directory, 0o700)
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
        except OSError:
            pass
    shutil.rmtree(path, ignore_errors=True)
