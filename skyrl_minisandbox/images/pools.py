"""Sandboxes of images in use, made before they are needed: a pool per image, few images, the rest closed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox.pool import Pool, PoolClosed
from skyrl_minisandbox.sandbox.spec import Limits, SandboxSpec

if TYPE_CHECKING:
    from skyrl_minisandbox.images.cache import Cache, Checkout
    from skyrl_minisandbox.images.image import Image
    from skyrl_minisandbox.images.store import Store
    from skyrl_minisandbox.sandbox import Sandbox
    from skyrl_minisandbox.sandbox.client import LauncherClient

MOST = 4
"""Images with a pool at once. A training step visits many images, several rollouts each, one after the other."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a rollout asks of its sandboxes, beside the image."""

    limits: Limits = dataclasses.field(default_factory=Limits)
    allow_degraded: tuple[str, ...] = ()
    on_disk: bool = False

    def spec(self, checkout: Checkout) -> SandboxSpec:
        """The sandbox over an image that is checked out."""
        return checkout.sandbox_spec(
            limits=self.limits, allow_degraded=self.allow_degraded, on_disk=self.on_disk
        )


class Pools:
    """Pools by image and what is wanted, at most `most`; the least recently used one makes room. Thread-safe.

    A pool keeps its image checked out, so that what it makes next has its layers.
    """

    def __init__(self, store: Store, cache: Cache, *, most: int = MOST) -> None:
        self._store, self._cache, self._most = store, cache, most
        self._lock = threading.Lock()  # guards the two below
        self._pools: collections.OrderedDict[_Key, tuple[Pool, Checkout]] = collections.OrderedDict()
        self._closed = False

    def take(self, image: Image, wanted: Wanted, size: int, launcher: LauncherClient) -> Sandbox:
        """A ready sandbox of the image, else a new one; from now on `size` are kept ready.

        Raises as `Sandbox` and `Cache.checkout` do, and `SandboxError` when closed.
        """
        key = (image.digest, wanted, size, launcher)
        while True:
            pool = self._pool(key, image)
            with contextlib.suppress(PoolClosed):  # it made room for another just now
                return pool.take()

    def _pool(self, key: _Key, image: Image) -> Pool:
        over: list[tuple[Pool, Checkout]] = []
        try:
            with self._lock:
                if self._closed:
                    raise SandboxError("the pools are closed")
                if key not in self._pools:
                    _, wanted, size, launcher = key
                    checkout = self._cache.checkout(image, self._store)
                    self._pools[key] = Pool(wanted.spec(checkout), size, launcher), checkout
                self._pools.move_to_end(key)
                # Those of a launcher that died hold nothing but a thread.
                dead = [other for other in self._pools if not other[-1].alive and other != key]
                over += [self._pools.pop(other) for other in dead]
                while len(self._pools) > self._most:
                    over.append(self._pools.popitem(last=False)[1])
                return self._pools[key][0]
        finally:
            for each in over:
                _end(*each)

    def close(self) -> None:
        """End every pool; what was taken lives on. Idempotent."""
        with self._lock:
            self._closed = True
            pools, self._pools = list(self._pools.values()), collections.OrderedDict()
        for each in pools:
            _end(*each)


_Key = tuple[str, Wanted, int, "LauncherClient"]


def _end(pool: Pool, checkout: Checkout) -> None:
    pool.close()
    checkout.release()
