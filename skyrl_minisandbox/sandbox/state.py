"""What outlives a sandbox's processes: frozen uppers, snapshots, and what a shell takes along. Plain data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
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
    """Remove a tree of ours whatever its modes are (overlay's work directory has 000) and however deep it is.

    Every directory is moved to the top before it is emptied: what ran inside may have made one in the other until
    neither a path nor a recursion reaches the last. What cannot be removed stays.
    """
    mark = os.urandom(8).hex()
    fresh = (f"{mark}-{number}" for number in itertools.count())
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
        top = os.open(path, flags)
        try:
            waiting = _emptied(top, top, fresh)
            while waiting:
                name = waiting.pop()
                with contextlib.suppress(OSError):
                    fd = os.open(name, flags, dir_fd=top)
                    try:
                        waiting += _emptied(fd, top, fresh)
                    finally:
                        os.close(fd)
                    os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        os.rmdir(path)


def _emptied(directory: int, top: int, fresh: Iterator[str]) -> list[str]:
    """Unlink the files of a directory and move its directories to `top`: their names there."""
    moved = []
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        with contextlib.suppress(OSError):
            if is_directory:
                os.chmod(name, 0o700, dir_fd=directory)
                os.rename(name, new := next(fresh), src_dir_fd=directory, dst_dir_fd=top)
                moved.append(new)
            else:
                os.unlink(name, dir_fd=directory)
    return moved
