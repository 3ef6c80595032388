"""So many at once; the others wait in the order in which they came."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from skyrl_minisandbox.errors import NodeError


class WaitingLine:
    """A semaphore whose waiters can be sent away, and whose limit may change.

    Thread-safe. Waiting has no deadline: who is inside has one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._inside = 0
        self._limit = 1
        self._waiting: collections.deque[tuple[str, Future[None]]] = collections.deque()
        self._closed: NodeError | None = None

    @contextlib.contextmanager
    def turn(self, name: str, limit: int) -> Iterator[None]:
        """Be inside, after those who came before.

        limit: how many may be inside from now on; 1 at least, whatever is said.
        Raises `NodeError` when sent away, or when the line is closed.
        """
        mine: Future[None] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._limit = max(1, limit)
            self._waiting.append((name, mine))
        try:
            self._admit()
            mine.result()
        except BaseException:  # sent away, or Ctrl-C: then whoever admits us must not wait for us to leave
            with self._lock:
                self._waiting = collections.deque(each for each in self._waiting if each[1] is not mine)
            if mine.done() and mine.exception() is None:
                self._leave()
            raise
        try:
            yield
        finally:
            self._leave()

    def send_away(self, name: str, error: NodeError) -> None:
        """Have those who wait under this name raise `error`. Who is inside already is left alone."""
        with self._lock:
            gone = [mine for waiting, mine in self._waiting if waiting == name]
            self._waiting = collections.deque(each for each in self._waiting if each[0] != name)
        for mine in gone:
            mine.set_exception(error)

    def close(self, error: NodeError) -> None:
        """Have all who wait, and all who come later, raise `error`. Idempotent."""
        with self._lock:
            self._closed = error
            waiting, self._waiting = self._waiting, collections.deque()
        for _, mine in waiting:
            mine.set_exception(error)

    def __len__(self) -> int:
        """How many wait."""
        with self._lock:
            return len(self._waiting)

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
        self._admit()

    def _admit(self) -> None:
        with self._lock:
            while self._waiting and self._inside < self._limit:
                _, mine = self._waiting.popleft()
                mine.set_result(None)
                self._inside += 1
