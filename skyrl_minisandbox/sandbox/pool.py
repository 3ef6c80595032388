"""Sandboxes made before they are needed: where the first command is to wait for nothing."""

from __future__ import annotations

import atexit
import collections
import os
import threading
import time
import weakref
from types import TracebackType

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import client
from skyrl_minisandbox.sandbox.sandbox import Sandbox
from skyrl_minisandbox.sandbox.spec import SandboxSpec

_WARM_UP = 60.0  # seconds for the first shell to start, on a loaded machine
_PAUSE = 0.02  # seconds after a `take` before the next one is made, which would slow the first command of the other
_LAST_ONE = 130.0  # seconds for one that is being made when the pool closes: what the launcher has to answer, and more


class PoolClosed(SandboxError):
    """Nothing is taken from it any more."""


class Pool:
    """`size` sandboxes of one spec, each with its first shell started, refilled by a thread of its own.

    `take` may be called from any thread; what it gives is the caller's to close. A fork of this process has a pool of
    its own, empty at first. Closed at the end of the process at the latest.

    launcher: None for the process's own, made anew where it died.
    Raises `ValueError` for a size below 1.
    """

    def __init__(self, spec: SandboxSpec, size: int, launcher: client.LauncherClient | None = None) -> None:
        if size < 1:
            raise ValueError(f"a pool of {size} sandboxes")
        self.spec = spec
        self.size = size
        self._launcher = launcher
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        self._owner = os.getpid()
        self._condition = threading.Condition()  # guards all below
        self._ready: collections.deque[Sandbox] = collections.deque()
        self._error: BaseException | None = None
        self._closing = False
        self._taken = 0.0  # when, on the monotonic clock
        self._thread = threading.Thread(target=self._refill, name="minisandbox-pool", daemon=True)
        self._thread.start()

    def take(self) -> Sandbox:
        """One that is ready and alive, else a new one. Its `shell()` is a bash that runs already.

        Raises what kept the pool from being refilled, once, when none is ready; else as `Sandbox` does.
        """
        if os.getpid() != self._owner:
            self._launcher = None
            self._start()  # nothing of the parent's is touched: its lock may be held, and its sandboxes are its own
        while True:
            with self._condition:
                if self._closing:
                    raise PoolClosed("the pool is closed")
                error = None
                sandbox = self._ready.popleft() if self._ready else None
                self._taken = time.monotonic()
                if sandbox is None:
                    error, self._error = self._error, None
                self._condition.notify_all()
            if error is not None:
                raise error
            if sandbox is None:
                return self._make()
            if sandbox.alive:
                return sandbox
            sandbox.close()

    def wait_full(self, timeout: float | None = None) -> bool:
        """Wait until it is full, or cannot be filled; whether it is full."""
        with self._condition:
            self._condition.wait_for(lambda: self._full() or self._error is not None, timeout)
            return self._full()

    def _over(self) -> bool:
        return self._closing

    def _full(self) -> bool:
        return len(self._ready) >= self.size

    def _refill(self) -> None:
        condition = self._condition  # of this process: a fork gets another one
        while True:
            with condition:
                condition.wait_for(lambda: self._closing or (self._error is None and not self._full()))
                while self._ready and not self._closing and (rest := self._taken + _PAUSE - time.monotonic()) > 0:
                    condition.wait(rest)
                if self._closing:
                    return
            made: Sandbox | None = None
            error: BaseException | None = None
            try:
                made = self._make()
            except BaseException as caught:
                error = caught
            with condition:
                self._error = error
                if made is not None and not self._over():
                    self._ready.append(made)
                    made = None
                condition.notify_all()
            if made is not None:
                made.close()

    def _make(self) -> Sandbox:
        sandbox = Sandbox(self.spec, self._launcher)
        try:
            shell = sandbox.shell()
            shell.run(":", timeout=_WARM_UP)
            sandbox.prepared(shell)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def close(self) -> None:
        """End those that nobody took. Idempotent, from any thread; returns when they are gone."""
        if os.getpid() != self._owner:
            return
        with self._condition:
            self._closing = True
            left, self._ready = list(self._ready), collections.deque()
            self._condition.notify_all()
        for sandbox in left:
            sandbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST_ONE)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register  # after client.py's, so it runs before: no launcher is started anew at the end
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()
