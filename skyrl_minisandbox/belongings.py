"""What one rollout holds on its machine: a checkout of its image, a launcher, sandboxes. All of it is given back,
whichever thread ends it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyrl_minisandbox.alarms import ALARMS
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, SandboxGone, StoreError
from skyrl_minisandbox.turn import RolloutRequest

if TYPE_CHECKING:
    from skyrl_minisandbox.images import Cache, Store
    from skyrl_minisandbox.images.cache import Checkout
    from skyrl_minisandbox.images.pools import Pools
    from skyrl_minisandbox.sandbox import Sandbox
    from skyrl_minisandbox.sandbox.client import LauncherClient


class Late(SandboxGone):
    """Its sandboxes were closed by us, because what they did took too long."""


class Belongings:
    """Thread-safe.

    launcher: one for all its sandboxes, so that its death shows; None before `set_up`.
    aborted: it was given up, and gets nothing more.
    """

    def __init__(self, request: RolloutRequest, store: Store, cache: Cache, pools: Pools | None) -> None:
        self._request, self._store, self._cache, self._pools = request, store, cache, pools
        self._lock = threading.Lock()  # guards all below but the launcher
        self._sandboxes: list[Sandbox] = []
        self._overdue = False  # what is under way has no time left
        self.aborted = False
        self.checkout: Checkout | None = None
        self.launcher: LauncherClient | None = None

    def set_up(self) -> None:
        """Have a launcher, and the image checked out. Raises `StoreError` where it is not in the store."""
        from skyrl_minisandbox.sandbox.client import shared

        self.launcher = shared()
        task = self._request.task
        image = self._store.find(task.recipe.digest())
        if image is None:
            raise StoreError(
                f"the image of task {task.id} (recipe {task.recipe.digest()[:12]}) is not in the store",
                hint=f"minisandbox image build tasks.ids=[{task.id}]",
            )
        self.checkout = self._cache.checkout(image, self._store)

    def open_sandbox(self, *, ready: bool = True) -> Sandbox:
        """A fresh sandbox of the task's image. ready: it may be one that was made before."""
        from skyrl_minisandbox.images.pools import Wanted
        from skyrl_minisandbox.sandbox import Sandbox

        checkout = self.checkout
        if checkout is None or self.launcher is None:
            raise NodeError("the rollout was given up")
        request = self._request
        wanted = Wanted(request.limits, request.allow_degraded, request.on_disk)
        if ready and request.pool and self._pools is not None:
            sandbox = self._pools.take(checkout.image, wanted, request.pool, self.launcher)
        else:
            sandbox = Sandbox(wanted.spec(checkout), self.launcher)
        with self._lock:
            if not (self.aborted or self._overdue):
                self._sandboxes.append(sandbox)
                return sandbox
        sandbox.close()
        raise NodeError("the rollout was given up")

    def node_is_healthy(self) -> bool:
        """The one probe: does a new sandbox of the same image, from the same launcher, work?"""
        try:
            with self.open_sandbox(ready=False) as sandbox:
                return sandbox.run(["true"], timeout=30).exit_code == 0
        except MiniSandboxError:
            return False

    @contextlib.contextmanager
    def in_time(self, what: str, seconds: float) -> Iterator[None]:
        """End every sandbox when the block is not through after `seconds`, and let it have no other. Raises `Late`
        then."""
        late = threading.Event()
        through = False

        def end() -> None:
            with self._lock:
                if through:
                    return
                late.set()
                self._overdue = True
            self.close_sandboxes()

        ALARMS.set(late, seconds, end)
        try:
            yield
        except Exception:
            if not late.is_set():
                raise
        finally:
            ALARMS.cancel(late)
            with self._lock:
                through = True
                self._overdue = False
        if late.is_set():
            raise Late(f"{what} took more than {seconds:g} s")

    def abort(self) -> None:
        """Have nothing new made; `close_sandboxes` ends what there is."""
        with self._lock:
            self.aborted = True

    def close_sandboxes(self) -> None:
        with self._lock:
            sandboxes, self._sandboxes = self._sandboxes, []
        for sandbox in sandboxes:
            with contextlib.suppress(MiniSandboxError):
                sandbox.close()

    def release(self) -> None:
        """Give the image back."""
        with self._lock:
            checkout, self.checkout = self.checkout, None
        if checkout is not None:
            checkout.release()

    def give_back(self) -> None:
        """Everything."""
        self.close_sandboxes()
        self.release()
