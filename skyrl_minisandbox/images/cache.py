"""The node-local cache: layers unpacked once per layer whoever asks, ready to be mounted.

    CACHE/
      CACHEDIR.TAG         backup programs leave it out
      upper-ok             an overlay upper was mounted here once: not tried again
      l/HEX16[s]/          a layer's tree, named by the first 16 digits of its diff_id (mount options are short);
                           `s`: its owners are shifted, for a file system whose mounts cannot be id-mapped
      meta/HEX16.json      written last: a tree without it is half a tree
      pins/HEX16           flock shared by every checkout that uses the layer
      work/HEX16           flock of the one that unpacks the layer
      aside/NAME[.lock]    what is being unpacked, uppers of builds; swept when its maker is dead
      sources/             downloads (images.sources)
      memo/                verdicts of patches (rewards.memo)

Two locks a layer. `work` makes one unpack however many ask, in threads and processes. `pins` is shared
by the users of a layer; who wants to remove a layer takes `work`, then `pins` exclusively without waiting.
Both are `flock`s of files, so that they end with their process, however it ends. An entry comes to be by
two renames: the tree, then its metadata; kill -9 between any two steps leaves something that the next
opening sweeps or the next checkout makes anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from skyrl_minisandbox.errors import CorruptLayer, MachineError, SandboxError
from skyrl_minisandbox.images.host import check_same_host
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.layer import Layer, file_digest, short, unpack
from skyrl_minisandbox.images.locks import Aside, acquire, disk_room, locked, write_atomic
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.sandbox import owner_shift, tmpfs_holds_upper
from skyrl_minisandbox.sandbox.spec import Bind, Limits, SandboxSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of skyrl-minisandbox; see https://bford.info/cachedir/\n"
)
_NAME = 16


@dataclasses.dataclass
class Checkout:
    """An image that is ready on this node and stays so until `release`.

    hit: every layer was here already. seconds: what it took.
    """

    image: Image
    layers: tuple[Path, ...]
    hit: bool
    seconds: float
    _pins: list[str]
    _cache: Cache

    def sandbox_spec(
        self,
        *,
        limits: Limits | None = None,
        network: str = "none",
        upper: Path | None = None,
        env: Mapping[str, str] | None = None,
        on_disk: bool = False,
        **more: Any,
    ) -> SandboxSpec:
        """What to open a sandbox with. `more` are further fields of SandboxSpec; `env` is added to the image's.

        on_disk: what is written goes to a directory of this cache, though memory could hold it.
        """
        binds = tuple(Bind(source, target) for source, target in self.image.binds) + tuple(more.pop("binds", ()))
        return SandboxSpec(
            layers=self.layers,
            binds=binds,
            keep=self.image.keep,
            env={**self.image.env, **(env or {})},
            workdir=more.pop("workdir", self.image.workdir),
            limits=limits or Limits(),
            network=network,
            upper=upper,
            scratch=self._cache.scratch() if on_disk or not tmpfs_holds_upper() else None,
            on_disk=on_disk,
            **more,
        )

    def release(self) -> None:
        """Give the pins back; the layers may be evicted from now on. Idempotent."""
        pins, self._pins = self._pins, []
        for name in pins:
            self._cache._unpin(name)

    def __enter__(self) -> Checkout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Cache:
    """One cache directory. Any number of them may be open on one directory, in any number of processes.

    path: made when it does not exist. Must be on a local file system that can hold an overlay upper.

    Raises `MachineError` where it cannot be written or cannot hold an upper.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            with disk_room(self.path):
                for name in ("l", "meta", "pins", "work", "aside"):
                    (self.path / name).mkdir(parents=True, exist_ok=True)
                for name in ("l", "aside") if _ours(self.path / "l") else ():
                    # Layers keep owners and setuid bits, so what an image made setuid root is that here too: nobody
                    # else may reach it. Sandboxes need no way through here, theirs is a mount.
                    (self.path / name).chmod(0o700)
                if not (self.path / "CACHEDIR.TAG").exists():
                    write_atomic(self.path / "CACHEDIR.TAG", _TAG)
        except OSError as error:
            raise MachineError(
                f"the cache directory {self.path} cannot be made: {error.strerror}",
                hint="name a directory that you may write to: images.cache=DIR",
            ) from error
        if not _ours(self.path / "l"):
            owner = (self.path / "l").stat().st_uid
            # Owners of layers, locks and sweeps are one user's: root's layers are no use to a user, nor the other way.
            raise MachineError(
                f"the cache directory {self.path} belongs to another user (uid {owner}, we are {os.geteuid()})",
                hint="name a directory of your own: images.cache=DIR",
            )
        self._aside = Aside(self.path / "aside")
        self._aside.sweep()
        self._guard = threading.Lock()  # protects _held
        self._held: dict[str, tuple[int, int]] = {}  # name -> (descriptor of its pin, how many checkouts)
        self._scratch: tuple[Path, contextlib.ExitStack] | None = None
        self._shift: int | None = None

    # checking out

    def checkout(self, image: Image, store: Store) -> Checkout:
        """Make every layer of `image` ready and pin it.

        Raises `CorruptLayer` naming layer and image (the bad blob is removed from the store, so that the next build
        makes it anew), `BlobMissing`, `MachineError` for a full disk or a node that the image does not fit.
        """
        check_same_host(image)
        self.check_upper()
        return self.checkout_layers(image.layers, store, image=image)

    def checkout_layers(self, layers: Sequence[Layer], store: Store, *, image: Image | None = None) -> Checkout:
        """The same for a bare list of layers, as a build has them before it has an image."""
        start = time.monotonic()
        label = (image.name or short(image.digest)) if image else ""
        pins: list[str] = []
        hit = True
        try:
            for layer in layers:
                hit &= self._ensure(layer, store, label)
                pins.append(self._name(layer))
        except BaseException:
            for name in pins:
                self._unpin(name)
            raise
        paths = tuple(self.path / "l" / self._name(layer) for layer in layers)
        if image is None:
            image = Image(digest="", layers=tuple(layers), env={}, workdir="/")
        return Checkout(image, paths, hit, time.monotonic() - start, pins, self)

    def _ensure(self, layer: Layer, store: Store, label: str) -> bool:
        """Have the layer here and pinned once more; returns whether it was here."""
        name = self._name(layer)
        if self._pin_if_good(name, layer):
            return True
        with locked(self.path / "work" / name):
            if self._pin_if_good(name, layer):  # another has made it while we waited
                return False
            self._remove_entry(name)
            self._make_entry(name, layer, store, label)
            if not self._pin_if_good(name, layer):
                raise MachineError(
                    f"layer {short(layer.digest)} was unpacked into {self.path} and is gone again",
                    hint="is something else removing files there? name another directory: images.cache=DIR",
                )
        return False

    def _make_entry(self, name: str, layer: Layer, store: Store, label: str) -> None:
        blob = store.blob(layer, label)
        with self._aside.place() as place:
            tree = place / "t"
            tree.mkdir(mode=0o755)
            os.chmod(tree, 0o755)
            try:
                with disk_room(self.path):
                    unpack(blob, layer, tree, shift=self.shift)
                    _sync(tree)
            except CorruptLayer as error:
                raise self._corrupt(error, layer, blob, store, label) from None
            meta = {"diff_id": layer.diff_id, "digest": layer.digest, "name": layer.name, **_glance(tree)}
            meta["tree"] = _tree_digest(tree)
            os.rename(tree, self.path / "l" / name)
            write_atomic(self.path / "meta" / f"{name}.json", json.dumps(meta).encode())

    def _corrupt(self, error: CorruptLayer, layer: Layer, blob: Path, store: Store, label: str) -> CorruptLayer:
        removed = ""
        if file_digest(blob) != layer.digest:  # read once more: a bad read is not a bad blob
            with contextlib.suppress(OSError):
                store.drop_blob(layer.digest)
                removed = "it was removed from the store; "
        of = f" of image {label}" if label else ""
        text = error.message.replace(" is corrupt", f" ({layer.name}){of} is corrupt in the store {store.path}")
        return CorruptLayer(text, hint=f"{removed}build the image again: minisandbox image build")

    # entries

    @property
    def shift(self) -> int:
        """Added to the owners of unpacked layers where the kernel or this file system cannot id-map a mount."""
        if self._shift is None:
            self._shift = owner_shift(self.path)
        return self._shift

    def _name(self, layer: Layer) -> str:
        """Trees with shifted owners are entries of their own: another kernel may share the directory later."""
        return layer.diff_id.partition(":")[2][:_NAME] + ("s" if self.shift else "")

    def _meta(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / "meta" / f"{name}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _pin_if_good(self, name: str, layer: Layer) -> bool:
        """Pin the entry when it is whole at a glance: metadata, the right layer, the same top directory."""
        if self._meta(name) is None:
            return False
        self._pin(name)
        meta = self._meta(name)
        if meta is not None and meta.get("diff_id") == layer.diff_id:
            with contextlib.suppress(OSError):
                found = _glance(self.path / "l" / name)
                if all(meta.get(key) == value for key, value in found.items()):
                    return True
        self._unpin(name)
        return False

    def _pin(self, name: str) -> None:
        with self._guard:
            if name in self._held:
                descriptor, count = self._held[name]
            else:
                found = acquire(self.path / "pins" / name, shared=True)
                assert found is not None
                descriptor, count = found, 0
            self._held[name] = (descriptor, count + 1)

    def _unpin(self, name: str) -> None:
        with self._guard:
            descriptor, count = self._held[name]
            if count > 1:
                self._held[name] = (descriptor, count - 1)
            else:
                del self._held[name]
                os.close(descriptor)

    def pinned(self) -> frozenset[str]:
        """Names of the entries that this process uses."""
        with self._guard:
            return frozenset(self._held)

    def _remove_entry(self, name: str) -> None:
        """Take a damaged or half entry away; the caller holds its `work` lock.

        Sandboxes that still stand on the damaged tree keep what is left of it: renaming does not touch a mount.
        """
        (self.path / "meta" / f"{name}.json").unlink(missing_ok=True)
        tree = self.path / "l" / name
        if os.path.lexists(tree):
            with self._aside.place() as place:
                os.rename(tree, place / "t")

    def verify(self) -> list[str]:
        """Compare every entry with what was unpacked (names, modes, sizes, links); returns damaged entries' layers.

        Damaged ones are removed unless they are in use; the next checkout makes them anew.
        """
        damaged = []
        for meta_path in sorted((self.path / "meta").glob("*.json")):
            name = meta_path.stem
            with locked(self.path / "work" / name):
                meta = self._meta(name)
                tree = self.path / "l" / name
                if meta is not None and tree.is_dir() and meta.get("tree") == _tree_digest(tree):
                    continue
                damaged.append(f"{name} {(meta or {}).get('name', '')}".strip())
                descriptor = acquire(self.path / "pins" / name, wait=False)
                if descriptor is not None:
                    self._remove_entry(name)
                    os.close(descriptor)
        return damaged

    # room for uppers

    def scratch(self) -> Path:
        """Where sandboxes of this process make their uppers when a tmpfs cannot hold one; swept when it is dead."""
        with self._guard:
            if self._scratch is None:
                stack = contextlib.ExitStack()
                self._scratch = (stack.enter_context(self._aside.place()), stack)
                weakref.finalize(self, stack.close)
            return self._scratch[0]

    @contextlib.contextmanager
    def upper(self) -> Iterator[Path]:
        """A directory on this disk for a sandbox's upper (it does not exist yet); gone at the end."""
        with self._aside.place() as place:
            os.chmod(place, 0o711)
            yield place / "u"

    def check_upper(self) -> None:
        """Mount an overlay with its upper here, once per cache directory.

        Raises `MachineError` when the file system cannot hold one; what else keeps a sandbox from opening is raised as
        it is, so that a machine without namespaces does not read as a bad directory.
        """
        remembered = self.path / "upper-ok"
        here = str(os.stat(self.path).st_dev)
        with contextlib.suppress(OSError):
            if remembered.read_text() == here:
                return
        from skyrl_minisandbox.images.probe import try_upper

        try:
            with self.upper() as upper, self._aside.place() as place:
                try_upper(place, upper)
        except (SandboxError, MachineError, OSError) as error:
            with disk_room(self.path):
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
            with self._aside.place() as place:
                try_upper(place, None)  # without an upper here: does a sandbox open at all?
            raise MachineError(
                f"the file system of the cache directory {self.path} ({_file_system(self.path)}) cannot hold an "
                f"overlay upper: {str(error).rpartition(': mount overlay: ')[2]}",
                hint="name a directory on a local disk (ext4, xfs, btrfs) or tmpfs: images.cache=DIR",
            ) from error
        write_atomic(remembered, here.encode())


def _ours(directory: Path) -> bool:
    return directory.stat().st_uid == os.geteuid()


def _glance(tree: Path) -> dict[str, Any]:
    """What can be compared without walking: the top directory's names. (Its times change when it is mounted.)"""
    return {"top": hashlib.sha256("\0".join(sorted(os.listdir(tree))).encode()).hexdigest()[:16]}


def _tree_digest(tree: Path) -> str:
    """Over names, types, modes, sizes and link targets; contents were verified when they were unpacked."""
    known = hashlib.sha256()
    stack = [str(tree)]
    while stack:
        directory = stack.pop()
        for entry in sorted(os.scandir(directory), key=lambda found: found.name):
            found = entry.stat(follow_symlinks=False)
            size = found.st_size if stat.S_ISREG(found.st_mode) else 0
            link = os.readlink(entry.path) if entry.is_symlink() else ""
            known.update(
                f"{entry.path[len(str(tree)) :]}\0{found.st_mode}\0{size}\0{link}\n".encode("utf-8", "surrogateescape")
            )
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
    return known.hexdigest()


def _sync(tree: Path) -> None:
    """Bring the tree to disk before it is given its name: one syncfs, not an fsync per file."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(tree))
    finally:
        os.close(descriptor)


def _file_system(path: Path) -> str:
    """The type of the mount that `path` is on."""
    best = ("", "unknown file system")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            if (str(path) + "/").startswith(where.rstrip("/") + "/") and len(where) >= len(best[0]):
                best = (where, kind)
    return best[1]
