"""Deadlines that mostly are not reached: one thread looks after all of a process, and setting one starts none."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Hashable

RETRY = 1.0
"""Seconds until what could not be done, as no thread can be started, is tried again."""


class Alarms:
    """Thread-safe. An action runs in a thread of its own."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As made anew: in a forked child the thread is not there, and what was set is the parent's."""
        self._changed = threading.Condition()  # guards all below
        self._set: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._wakes = math.inf  # when the thread looks again, at the latest
        self._watching = False

    def set(self, key: Hashable, seconds: float, action: Callable[[], None]) -> None:
        """Have `action` called once after `seconds`, in place of what was set for `key`."""
        when = time.monotonic() + seconds
        with self._changed:
            self._set[key] = (when, action)
            if not self._watching:
                with contextlib.suppress(RuntimeError):  # the next one tries again
                    self._start()
            elif when < self._wakes:
                self._changed.notify()

    def cancel(self, key: Hashable) -> None:
        """Forget what is set for `key`, if there is something. It may be under way."""
        with self._changed:
            self._set.pop(key, None)

    def start(self) -> None:
        """Have the thread now, so that no `set` depends on whether one can be started. Raises `RuntimeError`."""
        with self._changed:
            if not self._watching:
                self._start()

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="alarms", daemon=True).start()
        self._watching = True

    def _watch(self) -> None:
        while True:
            for key, action in self._due():
                try:
                    threading.Thread(target=action, name="alarm", daemon=True).start()
                except RuntimeError:
                    self._once_more(key, action)

    def _once_more(self, key: Hashable, action: Callable[[], None]) -> None:
        with self._changed:
            self._set.setdefault(key, (time.monotonic() + RETRY, action))

    def _due(self) -> list[tuple[Hashable, Callable[[], None]]]:
        """Wait until there is something to do, or may be; what that is."""
        with self._changed:
            now = time.monotonic()
            late = [key for key, (when, _) in self._set.items() if when <= now]
            if late:
                return [(key, self._set.pop(key)[1]) for key in late]
            self._wakes = min((when for when, _ in self._set.values()), default=math.inf)
            # A cancelled one is waited for all the same: to wake up for nothing, rarely, is cheaper than to be told.
            self._changed.wait(None if self._wakes == math.inf else min(self._wakes - now, threading.TIMEOUT_MAX))
            self._wakes = -math.inf  # awake: it looks anyway
            return []


ALARMS = Alarms()
"""Of this process."""
os.register_at_fork(after_in_child=ALARMS.forget)
