"""An overlay upper as an OCI layer tar. Runs in a child of the launcher, over a directory that an agent filled.

No name of the upper is ever followed: every directory is opened by descriptor with O_NOFOLLOW, every file is checked
after opening. Whiteouts become `.wh.NAME`, opaque directories get `.wh..wh..opq`, owners are those of the inside.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import BinaryIO

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_MAX = 4096  # linux/limits.h
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class _Bounded:
    """A writer that refuses more than `limit` bytes: a sparse file of a terabyte is one."""

    def __init__(self, raw: BinaryIO, limit: int) -> None:
        self._raw, self._left = raw, limit

    def write(self, data: bytes) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EFBIG, "what differs from the layers is larger than was allowed")
        return self._raw.write(data)


class _Exporter:
    def __init__(self, tar: tarfile.TarFile, base: int | None, opaque: str, limit: int, members: int) -> None:
        self._tar, self._base, self._opaque, self._limit = tar, base, opaque, limit
        self._members_left = members
        self._links: dict[tuple[int, int], str] = {}

    def _owner(self, number: int) -> int:
        if self._base is None:
            return 0
        inside = number - self._base
        return inside if 0 <= inside < 65536 else 65534

    def _info(self, name: str, status: os.stat_result) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.mode = stat.S_IMODE(status.st_mode)
        info.mtime = int(status.st_mtime)
        info.uid, info.gid = self._owner(status.st_uid), self._owner(status.st_gid)
        return info

    def mark(self, name: str) -> None:
        """An empty file whose name is the message (OCI image-spec, layer.md, "Whiteouts")."""
        self._add(tarfile.TarInfo(name))

    def is_opaque(self, fd: int) -> bool:
        try:
            return os.getxattr(fd, self._opaque) == b"y"
        except OSError:
            return False

    def directory(self, fd: int, prefix: str) -> None:
        """Write what is below `fd`, sorted; closes nothing. A path that is too long for any program to name
        (PATH_MAX) is left out: it can be made only by going down step by step."""
        # A stack, not recursion: an agent's tree may be deeper than Python's own stack.
        stack = [(fd, prefix, iter(sorted(os.listdir(fd))))]
        try:
            while stack:
                inner, above, names = stack[-1]
                name = next(names, None)
                if name is None:
                    stack.pop()
                    if stack:
                        os.close(inner)
                    continue
                path = f"{above}/{name}" if above else name
                if len(os.fsencode(path)) < _PATH_MAX:
                    below = self._entry(inner, name, path)
                    if below >= 0:
                        stack.append((below, path, iter(sorted(os.listdir(below)))))
        finally:
            for inner, _, _ in stack[1:]:
                os.close(inner)

    def _entry(self, fd: int, name: str, path: str) -> int:
        """Write one member; the descriptor of a directory to go down into, else -1."""
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            return self._subdirectory(fd, name, path, status)
        if stat.S_ISREG(mode):
            self._file(fd, name, path, status)
        elif stat.S_ISLNK(mode):
            info = self._info(path, status)
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=fd)
            self._add(info)
        elif stat.S_ISCHR(mode) and status.st_rdev == 0:
            parent = path[: -len(name)]
            self.mark(f"{parent}.wh.{name}")
        elif stat.S_ISFIFO(mode):
            info = self._info(path, status)
            info.type = tarfile.FIFOTYPE
            self._add(info)
        # Sockets mean nothing without their process, and devices cannot be made inside: left out.
        return -1

    def _subdirectory(self, parent: int, name: str, path: str, status: os.stat_result) -> int:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        info = self._info(path, status)
        info.type = tarfile.DIRTYPE
        self._add(info)
        if self.is_opaque(fd):
            self.mark(f"{path}/.wh..wh..opq")
        return fd

    def _add(self, info: tarfile.TarInfo, file: BinaryIO | None = None) -> None:
        self._members_left -= 1
        if self._members_left < 0:
            raise OSError(errno.EFBIG, "more differs from the layers than was allowed")
        self._tar.addfile(info, file)
        # tarfile remembers every member; a million of them take a gigabyte.
        self._tar.members.clear()  # type: ignore[attr-defined]

    def _file(self, parent: int, name: str, path: str, status: os.stat_result) -> None:
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._links:
            info = self._info(path, status)
            info.type, info.linkname = tarfile.LNKTYPE, self._links[key]
            self._add(info)
            return
        fd = os.open(name, _FILE, dir_fd=parent)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            if status.st_size > self._limit:
                raise OSError(errno.EFBIG, "a file is larger than was allowed", path)
            info = self._info(path, status)
            info.size = status.st_size
            self._add(info, file)
        if status.st_nlink > 1:
            self._links[key] = path


def export_upper(
    stage_fd: int, out_fd: int, *, prefix: str, base: int | None, max_bytes: int, max_members: int
) -> None:
    """Write the upper below `stage_fd` to `out_fd` as an uncompressed tar.

    prefix: limits it to one directory, without a leading slash; names in the tar keep it. What is not there is empty.
    base: the host's id of the inside's root; None when root is all that there is.
    max_bytes, max_members: `OSError(EFBIG)` beyond them.
    """
    opaque = "user.overlay.opaque" if base is None else "trusted.overlay.opaque"
    with open(out_fd, "wb", closefd=False) as raw:
        out = _Bounded(raw, max_bytes)
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as tar:  # type: ignore[call-overload]
            exporter = _Exporter(tar, base, opaque, max_bytes, max_members)
            fd = _descend(exporter, os.open("upper", _DIRECTORY, dir_fd=stage_fd), prefix)
            if fd >= 0:
                exporter.directory(fd, prefix.strip("/"))
                os.close(fd)


def _descend(exporter: _Exporter, fd: int, prefix: str) -> int:
    """The descriptor of `prefix` below `fd`, or -1 where the upper has nothing there; a removed or replaced
    directory on the way is told as the whiteout or opaque mark that it is for the prefix."""
    name = prefix.strip("/")
    hidden = False
    for part in [part for part in name.split("/") if part]:
        try:
            status = os.stat(part, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            status = None
        if status is None or not stat.S_ISDIR(status.st_mode):
            os.close(fd)
            if status is not None or hidden:
                parent, _, last = name.rpartition("/")
                exporter.mark(f"{parent}/.wh.{last}" if parent else f".wh.{last}")
            return -1
        inner = os.open(part, _DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
        hidden = hidden or exporter.is_opaque(fd)
    if hidden:
        exporter.mark(f"{name}/.wh..wh..opq")
    return fd
