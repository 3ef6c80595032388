"""What differs from the layers as an OCI layer tar. Runs in a child of the launcher, over directories an agent filled.

What was removed becomes `.wh.NAME`, in directories that were made anew too, so that no opaque mark is needed; owners
are those of the inside.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import BinaryIO

from skyrl_minisandbox.sandbox.difference import Difference, Entry

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WHITEOUT = ".wh."  # OCI image-spec, layer.md, "Whiteouts"


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
    def __init__(self, tar: tarfile.TarFile, base: int | None, limit: int, members: int) -> None:
        self._tar, self._base, self._limit = tar, base, limit
        self._members_left = members
        self._links: dict[tuple[int, int], str] = {}

    def entry(self, entry: Entry) -> None:
        """Write one member."""
        if entry.name.startswith(_WHITEOUT):
            return  # a layer cannot tell a file of that name
        status = entry.now
        if status is None:
            self.mark(f"{entry.path[: -len(entry.name)]}{_WHITEOUT}{entry.name}")
            return
        mode = status.st_mode
        if stat.S_ISREG(mode):
            self._file(entry, status)
            return
        info = self._info(entry.path, status)
        if stat.S_ISDIR(mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(entry.name, dir_fd=entry.parent)
        elif stat.S_ISFIFO(mode):
            info.type = tarfile.FIFOTYPE
        else:
            return  # sockets mean nothing without their process, and devices cannot be made inside
        self._add(info)

    def mark(self, name: str) -> None:
        """An empty file whose name is the message."""
        self._add(tarfile.TarInfo(name))

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

    def _add(self, info: tarfile.TarInfo, file: BinaryIO | None = None) -> None:
        self._members_left -= 1
        if self._members_left < 0:
            raise OSError(errno.EFBIG, "more differs from the layers than was allowed")
        self._tar.addfile(info, file)
        # tarfile remembers every member; a million of them take a gigabyte.
        self._tar.members.clear()  # type: ignore[attr-defined]

    def _file(self, entry: Entry, status: os.stat_result) -> None:
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in self._links:
            info = self._info(entry.path, status)
            info.type, info.linkname = tarfile.LNKTYPE, self._links[key]
            self._add(info)
            return
        with open(os.open(entry.name, _FILE, dir_fd=entry.parent), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return
            if status.st_size > self._limit:
                raise OSError(errno.EFBIG, "a file is larger than was allowed", entry.path)
            info = self._info(entry.path, status)
            info.size = status.st_size
            self._add(info, file)
        if status.st_nlink > 1:
            self._links[key] = entry.path


def export(difference: Difference, out: int, prefix: str, base: int | None, max_bytes: int, max_members: int) -> None:
    """Write the difference to a descriptor, as an uncompressed tar.

    prefix: limits it to one directory, without a leading slash; names in the tar keep it. What is not there is empty.
    base: the host's id of the inside's root; None when root is all that there is.
    max_bytes, max_members: `OSError(EFBIG)` beyond them.
    """
    prefix = prefix.strip("/")
    with open(out, "wb", closefd=False) as raw:
        bounded = _Bounded(raw, max_bytes)
        with tarfile.open(fileobj=bounded, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as tar:  # type: ignore[call-overload]
            exporter = _Exporter(tar, base, max_bytes, max_members)
            above, _, last = prefix.rpartition("/")
            if prefix and difference.replaced(prefix):
                exporter.mark(f"{above}/{_WHITEOUT}{last}" if above else f"{_WHITEOUT}{last}")
                return
            for entry in difference.entries(prefix):
                exporter.entry(entry)
