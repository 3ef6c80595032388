"""File locks, and directories that are gone at the latest when the next process starts.

One rule holds for everything made aside: whoever makes a temporary directory holds an exclusive
`flock` on a file beside it for as long as it lives. The kernel drops the lock when the process ends,
however it ends, so a lock that can be taken belongs to nobody and what it guards may be removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from skyrl_minisandbox.errors import DiskFull


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on `path` (made when missing). Excludes threads as well as processes: every call has its own
    open file, and `flock` belongs to the open file."""
    descriptor = acquire(path, shared=shared)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None when `wait` is false and it is taken."""
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation if wait else operation | fcntl.LOCK_NB)
            # Who held it before may have removed the file: a lock on a name that is gone guards nothing.
            if os.fstat(descriptor).st_nlink and _same(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


class Aside:
    """Where things are made before one rename puts them in place.

    directory/NAME         what is being made
    directory/NAME.lock    held for as long as its maker lives
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A new empty directory, removed (if it is still there) at the end."""
        name = uuid.uuid4().hex[:12]
        lock = self.directory / f"{name}.lock"
        descriptor = acquire(lock)
        assert descriptor is not None
        path = self.directory / name
        try:
            path.mkdir(mode=0o755)
            yield path
        finally:
            remove_tree(path)
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def sweep(self) -> int:
        """Remove what dead processes left; returns how many. Does not cover makers on another machine whose file
        system does not carry locks across."""
        removed = 0
        for entry in sorted(self.directory.iterdir()):
            if entry.name.endswith(".lock"):
                continue
            lock = self.directory / f"{entry.name}.lock"
            descriptor = acquire(lock, wait=False)
            if descriptor is None:
                continue
            remove_tree(entry)
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            removed += 1
        return removed


def remove_tree(path: Path) -> None:
    """Remove a file or tree, also one with directories that its owner may not enter (overlay work directories)."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink(missing_ok=True)
        return

    def open_up(function: object, name: str, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError):
            return
        for target in (os.path.dirname(name), name):
            with contextlib.suppress(OSError):
                if not os.path.islink(target):
                    os.chmod(target, 0o700)
        if os.path.isdir(name) and not os.path.islink(name):
            _rmtree(name)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    _rmtree(str(path), open_up)


def _rmtree(name: str, on_error: object = None) -> None:
    import sys

    if on_error is None:
        shutil.rmtree(name)
    elif sys.version_info >= (3, 12):
        shutil.rmtree(name, onexc=on_error)  # type: ignore[arg-type]
    else:
        shutil.rmtree(name, onerror=lambda f, n, info: on_error(f, n, info[1]))  # type: ignore[operator]


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` as a whole: a reader sees the old bytes or the new ones."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with disk_room(path.parent), open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_room(directory: Path) -> Iterator[None]:
    """Turn a full disk (or quota) into a `DiskFull` that names the directory."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or _copy_ran_out(error):
            raise full_disk(directory) from error
        raise


def _copy_ran_out(error: OSError) -> bool:
    """`shutil.copytree` gathers its failures in one error without a number."""
    return isinstance(error, shutil.Error) and os.strerror(errno.ENOSPC) in str(error)


def full_disk(directory: Path) -> DiskFull:
    """The error of a full disk at `directory`."""
    return DiskFull(
        f"no room left on the disk that holds {directory}",
        hint=f"free some (`df -h {directory}`), or name another place: images.cache=DIR, images.store=DIR",
    )


def copy_stream(source: IO[bytes], sink: IO[bytes], chunk: int = 1 << 20) -> None:
    """Everything of one into the other."""
    while data := source.read(chunk):
        sink.write(data)
