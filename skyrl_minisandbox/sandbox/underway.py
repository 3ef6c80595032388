"""What the serving loop holds for a request that is under way."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator

from skyrl_minisandbox.sandbox import processes, tree, wire
from skyrl_minisandbox.sandbox.bash import Bash


class Command:
    """A command that runs, of `run` or of a shell."""

    def __init__(self, request: int, pid: int, timeout: float | None, limit: int) -> None:
        self.request = request
        self.pid = pid
        self.started = time.monotonic()
        self.deadline = self.started + timeout if timeout is not None else None
        self.capture = processes.Capture(limit)
        self.outputs: dict[int, int] = {}  # descriptor -> stream
        self.stdin = -1
        self.pending = bytearray()
        self.stdin_ends = False
        self.timed_out = False
        self.attempts = 0
        self.shell: Bash | None = None


def _full(error: OSError) -> OSError:
    """The error, where it is the limit on one file that of a full disk: on a host's disk that stands for the limit."""
    if error.errno != errno.EFBIG:
        return error
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), error.filename)


class Writing:
    """A file that DATA frames go into. What fails is told when all data has come, so that the stream stays in step."""

    def __init__(self, path: str, mode: int) -> None:
        self._fd = -1
        self._error: OSError | None = None
        try:
            os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
            # O_NONBLOCK: a FIFO where a file is expected must not hold init.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = os.open(path, flags, mode)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            os.ftruncate(self._fd, 0)
            os.fchmod(self._fd, mode)
        except OSError as error:
            self._error = error

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view and self._error is None:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self._error = _full(error)

    def finish(self) -> OSError | None:
        if self._fd >= 0:
            os.close(self._fd)
        return self._error


class Unpacking:
    """A tree that DATA frames bring. What fails is told when all data has come, so that the stream stays in step."""

    def __init__(self, path: str) -> None:
        self._error: OSError | None = None
        # What the owner sends is not to be bounded here: the disk is.
        self._unpacker = tree.Unpacker(path, max_bytes=1 << 62, max_members=1 << 62)

    def add(self, data: bytes) -> None:
        if self._error is None:
            try:
                self._unpacker.feed(data)
            except OSError as error:
                self._error = _full(error)
            except tree.BadStream as error:
                self._error = OSError(errno.EINVAL, str(error))

    def finish(self) -> OSError | None:
        try:
            if self._error is None:
                self._unpacker.finish()
        except OSError as error:
            self._error = error
        except tree.BadStream as error:
            self._error = OSError(errno.EINVAL, str(error))
        finally:
            self._unpacker.close()
        return self._error

    @property
    def left_out(self) -> list[str]:
        return self._unpacker.left_out


def read_file(path: str, limit: int) -> Iterator[bytes]:
    """A file in pieces. Raises `OSError`: EINVAL for what is no file, EFBIG beyond `limit` bytes."""
    # O_NONBLOCK: a FIFO where a file is expected must not hold init.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        while chunk := file.read(wire.CHUNK):
            limit -= len(chunk)
            if limit < 0:
                raise OSError(errno.EFBIG, "larger than was asked for", path)
            yield chunk
