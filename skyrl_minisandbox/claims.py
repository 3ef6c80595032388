"""Temporary directories that a crash cannot hide.

    CACHE/claims/ID               locked (flock) by the owner while it lives; its text is the directory's path
    DIRECTORY/.minisandbox-claim  the same ID; no directory without it is ever removed

The claim is on disk before the directory is, so whatever is left after a kill -9 is known to the next
start: a claim whose lock can be taken has no owner any more. `sweep` ends the processes that still
hold files below such a directory (Ray's agents outlive their raylet when its control store died with
it; seen with Ray 2.60) and removes it.

Not covered: a machine that lost its cache directory, and a start with another cache directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARKER = ".minisandbox-claim"


class Claim:
    """A directory of ours that goes when its owner goes; `path` is where.

    The lock lives in a file descriptor, which exec closes; a fork keeps it, and with it the claim.
    """

    def __init__(self, cache: Path, parent: Path | None, prefix: str) -> None:
        """Make it below `parent`, or below the system's temporary directory."""
        registry = cache / "claims"
        registry.mkdir(parents=True, exist_ok=True)
        self._id = uuid.uuid4().hex
        root = parent if parent is not None else Path(tempfile.gettempdir())
        self.path = root / f"{prefix}{self._id[:8]}"
        self._record, self._lock = _locked_record(registry, self._id, str(self.path))
        root.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700)
        (self.path / MARKER).write_text(self._id)

    def release(self) -> None:
        """Remove the directory. Safe to call again."""
        if self._lock >= 0:
            _remove(self.path, self._id)
            self._record.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def sweep(cache: Path) -> list[str]:
    """Remove what owners that are gone have left; the paths removed."""
    removed = []
    for record in sorted((cache / "claims").glob("[!.]*")):
        with contextlib.suppress(OSError), record.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = file.read()
            if path and Path(path).is_dir():
                if _claimed(Path(path), record.name):
                    _end_users(path)
                _remove(Path(path), record.name)
                removed.append(path)
            record.unlink(missing_ok=True)
    return removed


def _locked_record(registry: Path, name: str, text: str) -> tuple[Path, int]:
    """Write the record under a hidden name, lock it, show it: no sweep sees it unlocked."""
    hidden = registry / f".{name}"
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.write(fd, text.encode())
    os.rename(hidden, registry / name)
    return registry / name, fd


def _claimed(path: Path, claim: str) -> bool:
    try:
        return (path / MARKER).read_text() == claim
    except OSError:
        return False


def _remove(path: Path, claim: str) -> None:
    """The directory if it carries the claim; one that died before its marker is empty."""
    if _claimed(path, claim):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.rmdir()


def _end_users(path: str) -> None:
    """Kill every process that holds a file open below `path`, and wait until they are gone."""
    ended = []
    for pid in _users(path):
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            ended.append(fd)
            if pid in _users(path, only=pid):  # still the same process, not one that got its number
                signal.pidfd_send_signal(fd, signal.SIGKILL)
    deadline = time.monotonic() + 10
    for fd in ended:
        select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        os.close(fd)


def _users(path: str, only: int | None = None) -> Iterator[int]:
    names = [str(only)] if only is not None else os.listdir("/proc")
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in os.scandir(f"/proc/{name}/fd"):
                if os.readlink(fd.path).startswith(path + "/"):
                    yield int(name)
                    break
