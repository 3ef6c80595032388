"""An Image: an ordered list of layers plus what a sandbox over them is configured with. Plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.images.layer import MEDIA_TYPE, Layer

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LABEL = "skyrl.minisandbox"
"""Prefix of our labels and annotations."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A built environment. Two images with the same digest are the same.

    digest: of the OCI manifest.
    layers: the lowest first.
    env: environment of every command, PATH included.
    workdir: where commands start.
    binds: (host path, path inside) pairs, read-only; only the base `host` has any.
    keep: paths of the layers that stay visible where a bind covers them.
    base: what the base is, as facts; for `host` a node must have the same (`images.host`).
    recipe: hex digest of the recipe.
    name: for messages.
    lock: exact versions of everything that went in.
    """

    digest: str
    layers: tuple[Layer, ...]
    env: Mapping[str, str]
    workdir: str
    binds: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()
    base: Mapping[str, str] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    name: str = ""
    lock: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config_json(self) -> bytes:
        """The OCI image config; what OCI has no field for lies in labels."""
        labels = {
            f"{LABEL}.recipe": self.recipe,
            f"{LABEL}.name": self.name,
            f"{LABEL}.base": _compact(dict(self.base)),
            f"{LABEL}.binds": _compact([list(pair) for pair in self.binds]),
            f"{LABEL}.keep": _compact(list(self.keep)),
            f"{LABEL}.lock": _compact(dict(self.lock)),
        }
        config = {
            "architecture": _architecture(),
            "os": "linux",
            "config": {
                "Env": [f"{key}={value}" for key, value in sorted(self.env.items())],
                "WorkingDir": self.workdir,
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in self.layers]},
            "history": [{"created_by": layer.name} for layer in self.layers],
        }
        return _compact(config).encode()

    def manifest_json(self, config_digest: str, config_size: int) -> bytes:
        """The OCI manifest."""
        return _compact(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": {"mediaType": CONFIG_TYPE, "digest": config_digest, "size": config_size},
                "layers": [
                    {"mediaType": MEDIA_TYPE, "digest": layer.digest, "size": layer.size} for layer in self.layers
                ],
            }
        ).encode()

    @classmethod
    def from_json(cls, digest: str, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Image:
        """The inverse. Raises `StoreError` for a manifest that is not an image's."""
        try:
            inner = config["config"]
            labels = inner.get("Labels") or {}
            diff_ids = config["rootfs"]["diff_ids"]
            described = manifest["layers"]
            names = [entry.get("created_by", "") for entry in config.get("history", []) if not entry.get("empty_layer")]
            if len(diff_ids) != len(described):
                raise ValueError(f"{len(described)} layers but {len(diff_ids)} diff_ids")
            names += [""] * (len(diff_ids) - len(names))
            return cls(
                digest=digest,
                layers=tuple(
                    Layer(one["digest"], diff_id, one["size"], name)
                    for one, diff_id, name in zip(described, diff_ids, names, strict=False)
                ),
                env=dict(pair.split("=", 1) for pair in inner.get("Env") or []),
                workdir=inner.get("WorkingDir") or "/",
                binds=tuple((pair[0], pair[1]) for pair in json.loads(labels.get(f"{LABEL}.binds", "[]"))),
                keep=tuple(json.loads(labels.get(f"{LABEL}.keep", "[]"))),
                base=json.loads(labels.get(f"{LABEL}.base", "{}")),
                recipe=labels.get(f"{LABEL}.recipe", ""),
                name=labels.get(f"{LABEL}.name", ""),
                lock=json.loads(labels.get(f"{LABEL}.lock", "{}")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"image {digest[:19]}… has a config that cannot be read: {error!r}") from error


def _compact(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _architecture() -> str:
    import platform

    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
