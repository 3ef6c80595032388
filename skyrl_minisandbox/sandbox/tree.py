"""A file or a directory as a stream of bytes, packed on one side of the wire and unpacked on the other.

Our own few lines and not tar, as one side is init, which has no modules to load any more, and as what comes from inside
is hostile: fixed structs with bounds, names checked, directories opened by descriptor, no link followed.

    member  = kind (u8) | mode (u16) | mtime in ns (i64) | length of path (u16) | length of target (u16) | path | target
    a file goes on with its content: pieces of length (u32) | bytes, the last one empty
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator

FILE, DIRECTORY, LINK, OTHER = range(1, 5)  # OTHER: a device, FIFO or socket; its name alone
_MEMBER = struct.Struct("!BHqHH")
_LENGTH = struct.Struct("!I")
PIECE = 1 << 17
_PATH_MAX = 4096  # linux/limits.h
# O_NONBLOCK: what was a file may be a FIFO by now, which must hold nobody.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


def pack(path: str, *, max_bytes: int, max_members: int) -> Iterator[bytes]:
    """The stream of what lies at `path`, in pieces of up to 128 KiB; a directory's members sorted, parents first.

    What vanishes meanwhile is left out, and so is what no program can name (PATH_MAX). A last link in `path` is
    followed. Raises `OSError`: EFBIG beyond the limits, EINVAL for a device, FIFO or socket.
    """
    root = os.open(path, _READ & ~os.O_NOFOLLOW)
    try:
        yield from _pack(root, [max_bytes, max_members])
    finally:
        os.close(root)


def _pack(root: int, left: list[int]) -> Iterator[bytes]:
    status = os.fstat(root)
    if stat.S_ISREG(status.st_mode):
        yield _member(FILE, status, b"")
        yield from _content(root, left)
        return
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "neither a file nor a directory")
    yield _member(DIRECTORY, status, b"")
    stack = [("", iter(sorted(os.listdir(root))))]
    while stack:
        above, names = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            continue
        path = f"{above}/{name}" if above else name
        if len(os.fsencode(path)) >= _PATH_MAX:
            continue
        left[1] -= 1
        if left[1] < 0:
            raise OSError(errno.EFBIG, "more files than were allowed")
        try:
            status = os.stat(path, dir_fd=root, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                inner = os.open(path, _ENTER, dir_fd=root)
                try:
                    stack.append((path, iter(sorted(os.listdir(inner)))))
                finally:
                    os.close(inner)
                yield _member(DIRECTORY, status, os.fsencode(path))
            elif stat.S_ISLNK(status.st_mode):
                target = os.fsencode(os.readlink(path, dir_fd=root))
                yield _member(LINK, status, os.fsencode(path), target)
            elif stat.S_ISREG(status.st_mode):
                file = os.open(path, _READ, dir_fd=root)
                try:
                    yield _member(FILE, os.fstat(file), os.fsencode(path))
                    yield from _content(file, left)
                finally:
                    os.close(file)
            else:
                yield _member(OTHER, status, os.fsencode(path))
        except OSError as error:
            if error.errno not in _GONE:
                raise


def _member(kind: int, status: os.stat_result, path: bytes, target: bytes = b"") -> bytes:
    mode = stat.S_IMODE(status.st_mode) & 0o777
    return _MEMBER.pack(kind, mode, status.st_mtime_ns, len(path), len(target)) + path + target


def _content(file: int, left: list[int]) -> Iterator[bytes]:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        yield _LENGTH.pack(0)  # swapped after it was looked at
        return
    while data := os.read(file, PIECE):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.EFBIG, "larger than was allowed")
        yield _LENGTH.pack(len(data)) + data
    yield _LENGTH.pack(0)


def gathered(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in fewer pieces, of at most `size` more than the largest."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= size:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


class BadStream(Exception):
    """What came is no stream of ours."""


class Unpacker:
    """Builds at `target` what a stream tells. Existing files are replaced, existing directories filled.

    Owners are the caller's, modes and times those of the stream. `left_out` names what is no file, directory or link.
    `feed` raises `BadStream` for bytes that `pack` does not make and `OSError` as the file system has it; then call
    nothing but `close`.
    """

    def __init__(self, target: str, *, max_bytes: int, max_members: int) -> None:
        self.left_out: list[str] = []
        self._target = target
        self._left_bytes, self._left_members = max_bytes, max_members
        self._buffer = bytearray()
        self._root = -1
        self._parent: tuple[str, int] = ("", -1)  # the directory that members are made in, and its path
        self._file = -1  # the file whose content comes
        self._status = (0, 0)  # its mode and time
        self._started = False
        self._directories: list[tuple[str, int, int]] = []  # their modes and times come last

    def feed(self, data: bytes) -> None:
        """Take bytes, cut anywhere."""
        self._buffer += data
        while self._piece() if self._file >= 0 else self._next():
            pass

    def _next(self) -> bool:
        if len(self._buffer) < _MEMBER.size:
            return False
        kind, mode, mtime, path_length, target_length = _MEMBER.unpack_from(self._buffer)
        end = _MEMBER.size + path_length + target_length
        if path_length >= _PATH_MAX or target_length >= _PATH_MAX or not FILE <= kind <= OTHER:
            raise BadStream("no member of a tree")
        if len(self._buffer) < end:
            return False
        path = bytes(self._buffer[_MEMBER.size : _MEMBER.size + path_length])
        target = bytes(self._buffer[_MEMBER.size + path_length : end])
        del self._buffer[:end]
        self._left_members -= 1
        if self._left_members < -1:
            raise BadStream("more members than were asked for")
        if self._started:
            if not self._directories:  # it would lie beside the target
                raise BadStream("more than the file that was announced")
            if any(part in (b"", b".", b"..") for part in path.split(b"/")) or b"\0" in path + target:
                raise BadStream("a name that leads elsewhere")
            self._member(kind, os.fsdecode(path), os.fsdecode(target), mode & 0o777, mtime)
        elif path or kind not in (FILE, DIRECTORY):
            raise BadStream("a tree without a root")
        else:
            self._begin(kind, mode & 0o777, mtime)
        return True

    def _begin(self, kind: int, mode: int, mtime: int) -> None:
        self._started = True
        if kind == DIRECTORY:
            os.makedirs(self._target, exist_ok=True)
            self._root = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._directories.append((".", mode, mtime))
        else:
            above, name = os.path.split(self._target)
            os.makedirs(above or ".", exist_ok=True)
            self._root = os.open(above or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._create(self._root, name, mode, mtime)

    def _member(self, kind: int, path: str, target: str, mode: int, mtime: int) -> None:
        above, _, name = path.rpartition("/")
        if kind == OTHER:
            self.left_out.append(path)
            return
        parent = self._enter(above)
        if kind == DIRECTORY:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=parent)
                    os.mkdir(name, 0o700, dir_fd=parent)
            self._directories.append((path, mode, mtime))
        elif kind == LINK:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.symlink(target, name, dir_fd=parent)
        else:
            self._create(parent, name, mode, mtime)

    def _enter(self, path: str) -> int:
        """A descriptor of a directory of ours, opened step by step: no link on the way is followed."""
        if self._root < 0:
            raise BadStream("a member of what is no directory")
        if path == "":
            return self._root
        if self._parent[0] != path:
            fd = os.dup(self._root)
            try:
                for part in path.split("/"):
                    inner = os.open(part, _ENTER, dir_fd=fd)
                    os.close(fd)
                    fd = inner
            except BaseException:
                os.close(fd)
                raise
            if self._parent[1] >= 0:
                os.close(self._parent[1])
            self._parent = path, fd
        return self._parent[1]

    def _create(self, parent: int, name: str, mode: int, mtime: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(name, flags, 0o600, dir_fd=parent)
        self._status = mode, mtime

    def _piece(self) -> bool:
        if len(self._buffer) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > PIECE:
            raise BadStream("a piece that is too large")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return False
        if length == 0:
            mode, mtime = self._status
            os.fchmod(self._file, mode)
            os.utime(self._file, ns=(mtime, mtime))
            os.close(self._file)
            self._file = -1
        self._left_bytes -= length
        if self._left_bytes < 0:
            raise BadStream("more bytes than were asked for")
        view = memoryview(self._buffer)[_LENGTH.size : end]
        try:
            rest = view
            while rest:
                rest = rest[os.write(self._file, rest) :]
        finally:
            rest.release()
            view.release()
        del self._buffer[:end]
        return True

    def finish(self) -> None:
        """The stream has ended: directories get their modes and times. Raises `BadStream` when it was cut short."""
        if not self._started or self._file >= 0 or self._buffer:
            raise BadStream("a tree that was cut short")
        for path, mode, mtime in reversed(self._directories):
            fd = self._root if path == "." else os.dup(self._enter(path))
            try:
                os.fchmod(fd, mode)
                os.utime(fd, ns=(mtime, mtime))
            finally:
                if fd != self._root:
                    os.close(fd)

    def close(self) -> None:
        for fd in (self._file, self._parent[1], self._root):
            if fd >= 0:
                os.close(fd)
        self._file, self._parent, self._root = -1, ("", -1), -1
