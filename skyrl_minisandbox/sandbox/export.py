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
    def __init__(self, tar: tarfile.TarFile, base: int | None, opaque: str, limit: int) -> None:
        self._tar, self._base, self._opaque, self._limit = tar, base, opaque, limit
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
        self._tar.addfile(tarfile.TarInfo(name))

    def is_opaque(self, fd: int) -> bool:
        try:
            return os.getxattr(fd, self._opaque) == b"y"
        except OSError:
            return False

    def directory(self, fd: int, prefix: str) -> None:
        """Write what is below `fd`, sorted; closes nothing."""
        for name in sorted(os.listdir(fd)):
            path = f"{prefix}/{name}" if prefix else name
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            mode = status.st_mode
            if stat.S_ISDIR(mode):
                self._subdirectory(fd, name, path, status)
            elif stat.S_ISREG(mode):
                self._file(fd, name, path, status)
            elif stat.S_ISLNK(mode):
                info = self._info(path, status)
                info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=fd)
                self._tar.addfile(info)
            elif stat.S_ISCHR(mode) and status.st_rdev == 0:
                self.mark(f"{prefix}/.wh.{name}" if prefix else f".wh.{name}")
            elif stat.S_ISFIFO(mode):
                info = self._info(path, status)
                info.type = tarfile.FIFOTYPE
                self._tar.addfile(info)
            # Sockets mean nothing without their process, and devices cannot be made inside: left out.

    def _subdirectory(self, parent: int, name: str, path: str, status: os.stat_result) -> None:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            info = self._info(path, status)
            info.type = tarfile.DIRTYPE
            self._tar.addfile(info)
            if self.is_opaque(fd):
                self.mark(f"{path}/.wh..wh..opq")
            self.directory(fd, path)
        finally:
            os.close(fd)

    def _file(self, parent: int, name: str, path: str, status: os.stat_result) -> None:
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._links:
            info = self._info(path, status)
            info.type, info.linkname = tarfile.LNKTYPE, self._links[key]
            self._tar.addfile(info)
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
            self._tar.addfile(info, file)
        if status.st_nlink > 1:
            self._links[key] = path


def export_upper(
    stage_fd: int, out_fd: int, *, prefix: str, base: int | None, max_bytes: int
) -> None:
    """Write the upper below `stage_fd` to `out_fd` as an uncompressed tar.

    prefix: limits it to one directory, without a leading slash; names in the tar keep it. What is not there is empty.
    base: the host's id of the inside's root; None when root is all that there is.
    max_bytes: `OSError(EFBIG)` beyond it.
    """
    opaque = "user.overlay.opaque" if base is None else "trusted.overlay.opaque"
    with open(out_fd, "wb", closefd=False) as raw:
        out = _Bounded(raw, max_bytes)
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as tar:  # type: ignore[call-overload]
            exporter = _Exporter(tar, base, opaque, max_bytes)
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
