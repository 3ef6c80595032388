"""A layer: a read-only file tree with a digest, kept as a zstd-compressed OCI layer tar.

A layer has two names: `diff_id`, the SHA-256 of its tar, which says what the tree is, and `digest`, the
SHA-256 of the compressed blob, which says what lies in the store. Time stamps and user names are
normalised on the way in, so that the same tree always has the same `diff_id`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from skyrl_minisandbox.errors import CorruptLayer, MachineError
from skyrl_minisandbox.images.locks import disk_room, full_disk

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
MTIME = 1577836800
"""The time stamp of everything in a layer: 2020-01-01. Not 0, because zip files cannot hold less than 1980."""
LEVEL = 3
"""zstd level. Level 10 is 15 % smaller and four times slower to make; unpacking is bound by creating files."""
_BLOCK = 512
_FULL = ("No space left on device", "Disk quota exceeded", "Wrote only ")
"""What tar says on a full disk; the last when a write was cut short before one failed."""
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclasses.dataclass(frozen=True)
class Layer:
    """digest, diff_id: `sha256:…` of the blob and of its tar. size: bytes of the blob. name: what made it."""

    digest: str
    diff_id: str
    size: int
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LayerWriter(io.RawIOBase):
    """A binary sink for an uncompressed layer tar; `finish()` gives the Layer.

    Writes the compressed blob to `path`. Every member's time stamp becomes MTIME and its user and group
    names are dropped, so that nothing of the building machine or the moment gets in.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = open(path, "wb")
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        self._tar_hash = hashlib.sha256()
        self._blob_hash = hashlib.sha256()
        self._size = 0
        self._normaliser = _Normaliser(self._put)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._normaliser.write(data)
        return len(data)

    def _put(self, data: bytes) -> None:
        self._tar_hash.update(data)
        self._put_blob(self._compressor.compress(data))

    def _put_blob(self, data: bytes) -> None:
        if data:
            with disk_room(self._path.parent):
                self._file.write(data)
            self._blob_hash.update(data)
            self._size += len(data)

    def finish(self, name: str = "") -> Layer:
        """End the stream, bring the blob to disk and say what it is."""
        self._normaliser.finish()
        self._put_blob(self._compressor.flush())
        with disk_room(self._path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()
        return Layer(
            digest=f"sha256:{self._blob_hash.hexdigest()}",
            diff_id=f"sha256:{self._tar_hash.hexdigest()}",
            size=self._size,
            name=name,
        )

    def close(self) -> None:
        self._file.close()
        super().close()


class _Normaliser:
    """Rewrites tar headers in passing. Python's tarfile would do, at five times the time."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._pending = bytearray()
        self._pass_on = 0
        self._extended: tuple[bytes, int] | None = None

    def write(self, data: bytes) -> None:
        self._pending += data
        while True:
            if self._pass_on:
                part = bytes(self._pending[: self._pass_on])
                del self._pending[: len(part)]
                self._pass_on -= len(part)
                if part:
                    self._sink(part)
                if self._pass_on:
                    return
            if self._extended is not None:
                header, size = self._extended
                padded = _padded(size)
                if len(self._pending) < padded:
                    return
                records = bytes(self._pending[:size])
                del self._pending[:padded]
                self._extended = None
                self._emit_extended(header, records)
                continue
            if len(self._pending) < _BLOCK:
                return
            header = bytes(self._pending[:_BLOCK])
            del self._pending[:_BLOCK]
            self._header(header)

    def _header(self, header: bytes) -> None:
        if not any(header):
            self._sink(header)
            return
        size = _number(header[124:136])
        kind = header[156:157]
        if kind in (b"x", b"g"):
            self._extended = (header, size)
            return
        # Links and directories carry no data whatever their size field says.
        self._pass_on = 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else _padded(size)
        self._sink(_patched(header, size=None))

    def _emit_extended(self, header: bytes, records: bytes) -> None:
        kept = b"".join(
            record for key, record in _records(records) if key not in (b"mtime", b"atime", b"ctime", b"uname", b"gname")
        )
        if kept:
            self._sink(_patched(header, size=len(kept)))
            self._sink(kept + bytes(_padded(len(kept)) - len(kept)))

    def finish(self) -> None:
        if self._pending or self._pass_on or self._extended is not None:
            raise CorruptLayer("a layer's tar stream ended in the middle of a member")


def _padded(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256, for what octal cannot hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b" \0")
    return int(text, 8) if text else 0


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        length = int(data[: data.index(b" ")])
        record = data[:length]
        yield record[record.index(b" ") + 1 : record.index(b"=")], record
        data = data[length:]


def _patched(header: bytes, *, size: int | None) -> bytes:
    """A copy of the header with our time stamp, no user names, and a right checksum."""
    block = bytearray(header)
    if size is not None:
        block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % MTIME
    block[265:297] = bytes(32)
    block[297:329] = bytes(32)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pack_tree(
    directory: Path,
    sink: IO[bytes],
    prefix: str = "",
    *,
    owner: Callable[[str, os.stat_result], tuple[int, int]] | None = None,
) -> None:
    """Write a host directory into `sink` as an uncompressed tar: sorted, owners 0:0 unless `owner` says otherwise.

    prefix: where the tree lies in the layer (`opt/python/3.11`); its parents are written as 0755 directories.
    owner: (name in the layer, lstat) -> (uid, gid).
    """
    prefix = prefix.strip("/")
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as tar:
        parts = prefix.split("/") if prefix else []
        for index in range(1, len(parts)):
            parent = tarfile.TarInfo("/".join(parts[:index]))
            parent.type, parent.mode, parent.mtime = tarfile.DIRTYPE, 0o755, MTIME
            tar.addfile(parent)
        for path in _sorted_tree(directory):
            name = "/".join([*parts, *path.relative_to(directory).parts])
            if name:
                _add(tar, path, name, owner)


def _sorted_tree(directory: Path) -> Iterator[Path]:
    yield directory
    for entry in sorted(os.scandir(directory), key=lambda found: found.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _sorted_tree(Path(entry.path))
        else:
            yield Path(entry.path)


def _add(
    tar: tarfile.TarFile,
    path: Path,
    name: str,
    owner: Callable[[str, os.stat_result], tuple[int, int]] | None,
) -> None:
    found = path.lstat()
    member = tarfile.TarInfo(name)
    member.mtime, member.mode = MTIME, stat.S_IMODE(found.st_mode)
    if owner is not None:
        member.uid, member.gid = owner(name, found)
    if stat.S_ISDIR(found.st_mode):
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    elif stat.S_ISLNK(found.st_mode):
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
        tar.addfile(member)
    elif stat.S_ISREG(found.st_mode):
        member.size = found.st_size
        with open(path, "rb") as file:
            tar.addfile(member, file)
    # Sockets, fifos and device nodes of a host directory have no place in a layer.


def unpack(
    blob: Path,
    layer: Layer,
    target: Path,
    *,
    as_root: bool | None = None,
    shift: int = 0,
) -> None:
    """Unpack a blob into the existing directory `target`, in the form that overlayfs wants as a lower layer.

    Both digests are verified while the bytes pass; a tree whose blob was wrong is left for the caller to remove.
    as_root: keep owners (else everything is the caller's own and can be removed by it); default: whether we are.
    shift: added to every owner, where the kernel or the file system cannot id-map a mount.

    Raises `CorruptLayer` when the bytes are not the layer's, `MachineError` on a full disk.
    """
    as_root = os.geteuid() == 0 if as_root is None else as_root
    # The name of the blob is never an argument of tar: its bytes come through us, so that they are verified.
    command = ["tar", "--extract", "--file=-", f"--directory={target}", "--numeric-owner", "--anchored"]
    command += ["--exclude=dev/*", "--exclude=./dev/*", "--delay-directory-restore", "--same-permissions"]
    command += ["--same-owner"] if as_root else ["--no-same-owner"]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    # tar says a line for each file that fails: into memory, as a pipe that nobody reads meanwhile would stop it.
    said = open(os.memfd_create("tar"), "w+b")
    try:
        tar = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=environment)
    except FileNotFoundError:
        said.close()
        raise MachineError("the program `tar` is not on PATH", hint="install GNU tar") from None
    fault = ""
    stderr = b""
    assert tar.stdin is not None
    try:
        fault = _feed(blob, layer, tar.stdin)
    except BrokenPipeError:
        pass  # tar ended early and says why
    finally:
        try:
            tar.stdin.close()
        except BrokenPipeError:
            pass
        tar.wait()
        said.seek(0)
        stderr = said.read()
        said.close()
    if fault:
        raise CorruptLayer(f"layer {short(layer.digest)} is corrupt: {fault}")
    if tar.returncode:
        text = stderr.decode("utf-8", "replace").strip()
        if any(words in text for words in _FULL):
            raise full_disk(target)
        raise MachineError(
            f"unpacking layer {short(layer.digest)} into {target} failed: {_last_lines(text, 3)}",
            hint="the cache must lie on a local file system with links and permissions: images.cache=DIR",
        )
    _finish_tree(target, as_root=as_root, shift=shift)


def _feed(blob: Path, layer: Layer, sink: IO[bytes]) -> str:
    """Decompress into `sink`; returns what is wrong with the bytes, or an empty string."""
    blob_hash, tar_hash = hashlib.sha256(), hashlib.sha256()
    size = 0
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    with open(blob, "rb") as file:
        while data := file.read(1 << 20):
            size += len(data)
            blob_hash.update(data)
            try:
                plain = decompressor.decompress(data)
            except zstandard.ZstdError as error:
                if size < layer.size:
                    size = blob.stat().st_size
                return _size_fault(size, layer) or f"zstd: {error}"
            tar_hash.update(plain)
            sink.write(plain)
    if fault := _size_fault(size, layer):
        return fault
    if f"sha256:{blob_hash.hexdigest()}" != layer.digest:
        return f"its blob hashes to sha256:{blob_hash.hexdigest()[:12]}…"
    if f"sha256:{tar_hash.hexdigest()}" != layer.diff_id:
        return f"its content hashes to sha256:{tar_hash.hexdigest()[:12]}…, not to {short(layer.diff_id)}"
    return ""


def _size_fault(size: int, layer: Layer) -> str:
    if size == layer.size:
        return ""
    return f"{abs(size - layer.size)} bytes {'short' if size < layer.size else 'too many'}"


def _finish_tree(target: Path, *, as_root: bool, shift: int) -> None:
    """Whiteouts in overlay's form, owners and permissions as the sandbox needs them."""
    stack = [str(target)]
    while stack:
        directory = stack.pop()
        for entry in list(os.scandir(directory)):
            if entry.name == _OPAQUE:
                os.unlink(entry.path)
                name = "trusted.overlay.opaque" if as_root else "user.overlay.opaque"
                os.setxattr(directory, name, b"y")
                continue
            if entry.name.startswith(_WHITEOUT):
                os.unlink(entry.path)
                hidden = os.path.join(directory, entry.name[len(_WHITEOUT) :])
                if not os.path.lexists(hidden):
                    # Linux 5.8 and later let anyone make this one device: 0/0 is overlay's "not there".
                    os.mknod(hidden, stat.S_IFCHR | 0o000, os.makedev(0, 0))
                continue
            is_directory = entry.is_dir(follow_symlinks=False)
            if shift:
                found = entry.stat(follow_symlinks=False)
                os.chown(entry.path, found.st_uid + shift, found.st_gid + shift, follow_symlinks=False)
                if not entry.is_symlink() and found.st_mode & 0o6000:
                    os.chmod(entry.path, stat.S_IMODE(found.st_mode))  # chown drops setuid bits
            elif not as_root and not entry.is_symlink():
                mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
                wanted = mode | (0o700 if is_directory else 0o600)
                if wanted != mode:
                    os.chmod(entry.path, wanted)
            if is_directory:
                stack.append(entry.path)
    if shift:
        found = os.stat(target)
        os.chown(target, found.st_uid + shift, found.st_gid + shift)
    os.utime(target, (MTIME, MTIME))


def file_digest(path: Path) -> str:
    """`sha256:…` of a file."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def short(digest: str) -> str:
    """A digest as it stands in messages: `sha256:1f3c9a0b12cd…`."""
    return re.sub(r"^(sha256:[0-9a-f]{12})[0-9a-f]+$", r"\1…", digest)


def _last_lines(text: str, count: int) -> str:
    return " / ".join(text.splitlines()[-count:])
