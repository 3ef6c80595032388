"""The store: where images live, in the OCI image layout, shared by all nodes and written by several at once.

    STORE/
      oci-layout           OCI's marker
      minisandbox.json     {"format": 1}: ours; a newer number is refused, not guessed at
      index.json           the images: replaced as a whole, under locks/index
      blobs/sha256/HEX     manifests, configs, layers: written aside, renamed in, never changed
      steps/KEY.json       build-step cache: chained key -> layer
      logs/                logs of failed build steps
      locks/               flock targets: index, recipes being built, steps being built
      aside/               what is being written; swept when its maker is dead

The only lock a reader needs is none: blobs never change, and index.json is replaced by a rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import CorruptLayer, InputError, MachineError, StoreError
from skyrl_minisandbox.images.image import LABEL, MANIFEST_TYPE, Image
from skyrl_minisandbox.images.layer import Layer, LayerWriter, file_digest, short
from skyrl_minisandbox.images.locks import Aside, locked, write_atomic

FORMAT = 1
_DIRECTORIES = ("blobs", "steps", "logs", "locks", "aside")  # another process may have made only these so far
_REF = "org.opencontainers.image.ref.name"

logger = logging.getLogger(__name__)


class StoreNotInitialised(StoreError):
    """The directory is not a store of ours."""


class StoreTooNew(StoreError):
    """A later version of this package wrote the store."""


class BlobMissing(StoreError):
    """A blob that an image or a step names is not there."""


class Store:
    """One store directory.

    path: made and initialised when it does not exist or is empty, unless `create` is false.

    Raises `StoreNotInitialised`, `StoreTooNew`, `MachineError` where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path).absolute()
        self._blobs = self.path / "blobs" / "sha256"
        marker = self.path / "minisandbox.json"
        if not marker.exists():
            self._initialise(marker, create)
        self._check_format(marker)
        self._known: tuple[_Version, list[dict[str, Any]]] | None = None  # replaced as a whole: no lock
        self._aside = Aside(self.path / "aside") if os.access(self.path, os.W_OK) else None
        if self._aside is not None:
            self._aside.sweep()

    def _initialise(self, marker: Path, create: bool) -> None:
        foreign = self.path.exists() and any(
            name not in _DIRECTORIES and not name.startswith(".") for name in os.listdir(self.path)
        )
        if not create or (foreign and not (self.path / "oci-layout").exists()):
            raise StoreNotInitialised(
                f"{self.path} is not an image store" + (": it holds other files" if foreign else ""),
                hint="name an empty or new directory: images.store=DIR",
            )
        try:
            with locked(self.path / "locks" / "index"):
                for name in _DIRECTORIES:
                    (self.path / name).mkdir(parents=True, exist_ok=True)
                self._blobs.mkdir(exist_ok=True)
                if not (self.path / "oci-layout").exists():
                    write_atomic(self.path / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
                if not (self.path / "index.json").exists():
                    self._write_index([])
                if not marker.exists():
                    write_atomic(marker, json.dumps({"format": FORMAT}).encode())
        except OSError as error:
            raise MachineError(
                f"the image store {self.path} cannot be made: {error.strerror}",
                hint="name a directory that you may write to: images.store=DIR",
            ) from error

    def _check_format(self, marker: Path) -> None:
        try:
            found = json.loads(marker.read_bytes())["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreNotInitialised(
                f"{marker} cannot be read: {error}", hint="move the directory away, or name another: images.store=DIR"
            ) from error
        if found > FORMAT:
            raise StoreTooNew(
                f"the image store {self.path} has format {found}; this version reads up to {FORMAT}",
                hint="upgrade with `pip install -U skyrl-minisandbox`, or name another store: images.store=DIR",
            )

    # images

    def images(self) -> list[Image]:
        """Every image, oldest first."""
        return [self.get(entry["digest"]) for entry in self._index()]

    def find(self, recipe_digest: str, base: str | None = None) -> Image | None:
        """The image built from a recipe, the newest if there are several; None when there is none.

        base: hex digest of base facts that it must have (`images.host.facts_digest`), for the base `host`.
        """
        for entry in reversed(self._index()):
            annotations = entry.get("annotations", {})
            if annotations.get(f"{LABEL}.recipe") != recipe_digest:
                continue
            if base is not None and annotations.get(f"{LABEL}.base") != base:
                continue
            try:
                image = self.get(entry["digest"])
            except StoreError as error:  # as if it had not been built: building it again mends it
                logger.warning("%s", error)
                continue
            if all(self._blob_path(layer.digest).exists() for layer in image.layers):
                return image
        return None

    def get(self, digest: str) -> Image:
        """The image with this manifest digest. Raises `BlobMissing`, `StoreError`."""
        try:
            manifest = json.loads(self._small_blob(digest))
            config = json.loads(self._small_blob(manifest["config"]["digest"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"image {short(digest)} in {self.path} cannot be read: {error!r}") from error
        return Image.from_json(digest, manifest, config)

    def add(self, image: Image, base: str = "") -> Image:
        """Store manifest and config of an image whose layers are here already; returns it with its digest."""
        for layer in image.layers:
            self.blob(layer)
        config = image.config_json()
        config_digest = self._put(config)
        manifest = image.manifest_json(config_digest, len(config))
        digest = self._put(manifest)
        annotations = {f"{LABEL}.recipe": image.recipe, f"{LABEL}.base": base, _REF: image.name or image.recipe[:12]}
        entry = {
            "mediaType": MANIFEST_TYPE,
            "digest": digest,
            "size": len(manifest),
            "annotations": annotations,
        }
        with locked(self.path / "locks" / "index"):
            others = [old for old in self._read_index()[1] if not _same_entry(old, entry)]
            self._write_index([*others, entry])
        return self.get(digest)

    # layers

    def put_layer(self, write: Callable[[LayerWriter], None], name: str) -> Layer:
        """Store what `write` puts into the LayerWriter (an uncompressed tar) as a layer."""
        if self._aside is None:
            raise self._read_only()
        with self._aside.place() as place:
            path = place / "layer"
            with contextlib.closing(LayerWriter(path)) as writer:
                write(writer)
                layer = writer.finish(name)
            os.chmod(path, 0o644)
            os.replace(path, self._blob_path(layer.digest))  # losing a race is success: the bytes are the same
        return layer

    def blob(self, layer: Layer, image: str = "") -> Path:
        """Where a layer's blob lies. Raises `BlobMissing`; the bytes are verified by whoever unpacks them."""
        path = self._blob_path(layer.digest)
        if not path.exists():
            of = f" of image {image}" if image else ""
            raise BlobMissing(
                f"layer {short(layer.digest)} ({layer.name}){of} is not in the store {self.path}",
                hint="build the image again: minisandbox image build",
            )
        return path

    def drop_blob(self, digest: str) -> None:
        """Remove a blob that is corrupt, so that a build makes it anew."""
        self._blob_path(digest).unlink(missing_ok=True)

    # build steps

    def step(self, key: str) -> tuple[Layer, dict[str, Any]] | None:
        """The layer that a build step with this chained key gave, if its blob is still here, and its facts."""
        try:
            known = json.loads((self.path / "steps" / f"{key}.json").read_bytes())
            layer, facts = Layer(**known["layer"]), dict(known["facts"])
            if self._blob_path(layer.digest).stat().st_size == layer.size:
                return layer, facts
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return None

    def put_step(self, key: str, layer: Layer, facts: dict[str, Any]) -> None:
        """Remember a build step's layer, and what the lock says of it."""
        write_atomic(
            self.path / "steps" / f"{key}.json", json.dumps({"layer": layer.to_json(), "facts": facts}).encode()
        )

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """An exclusive lock by name, over processes and (where the file system carries locks) nodes.

        Raises `MachineError` where the store cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path / "locks" / name))
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise self._read_only() from error
                raise
            yield

    def _read_only(self) -> MachineError:
        return MachineError(
            f"the image store {self.path} is read-only here, and not all images are in it",
            hint="minisandbox image build, where it may be written; or name another: images.store=DIR",
        )

    def log_path(self, name: str) -> Path:
        """A new file name below `logs/`."""
        logs = self.path / "logs"
        logs.mkdir(exist_ok=True)
        count = 1
        while (path := logs / f"{name}-{count}.log").exists():
            count += 1
        return path

    # inside

    def _blob_path(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        if algorithm != "sha256" or not name.isalnum():
            raise InputError(f"`{digest}` is not a sha256 digest")
        return self._blobs / name

    def _put(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path = self._blob_path(digest)
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)
        return digest

    def _small_blob(self, digest: str) -> bytes:
        path = self._blob_path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobMissing(
                f"blob {short(digest)} is not in the store {self.path}",
                hint="build the image again: minisandbox image build",
            ) from None
        if file_digest(path) != digest:
            raise CorruptLayer(
                f"blob {short(digest)} in the store {self.path} is corrupt: its bytes hash to something else",
                hint=f"remove {path} and build the image again: minisandbox image build",
            )
        return data

    def _index(self) -> list[dict[str, Any]]:
        """The images' entries; not to be changed. Read again only when the file is another one: each rollout asks,
        and an index of 4,000 images takes 7 ms."""
        known = self._known
        if known is None or known[0] != self._index_version():
            self._known = known = self._read_index()
        return known[1]

    def _index_version(self) -> _Version | None:
        try:
            return _version(os.stat(self.path / "index.json"))
        except OSError:
            return None

    def _read_index(self) -> tuple[_Version, list[dict[str, Any]]]:
        try:
            with (self.path / "index.json").open("rb") as file:
                return _version(os.fstat(file.fileno())), list(json.load(file)["manifests"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path / 'index.json'} cannot be read: {error}",
                hint="remove the store directory and build the images again",
            ) from error

    def _write_index(self, manifests: list[dict[str, Any]]) -> None:
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
        write_atomic(self.path / "index.json", json.dumps(index, indent=1).encode())


_Version = tuple[int, int, int]


def _version(found: os.stat_result) -> _Version:
    """What differs after a replacement by a rename."""
    return found.st_ino, found.st_mtime_ns, found.st_size


def _same_entry(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a new entry takes an old one's place: the same recipe on the same base."""
    first, second = one.get("annotations", {}), other.get("annotations", {})
    return all(first.get(f"{LABEL}.{key}") == second.get(f"{LABEL}.{key}") for key in ("recipe", "base"))
