"""One try of a row: what the generator and its Env know of each other, and the thread that each call of an Env has."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from skyrl_minisandbox.env import Episode
from skyrl_minisandbox.training.rows import Row

T = TypeVar("T")


class Attempt(Episode):
    """One try of a row.

    answers: how many went to the Env. cut: SkyRL closed it unfinished. overdue: the engine's time is over.
    """

    def __init__(self, row: Row, seconds: float) -> None:
        super().__init__(grade_on_close=True)
        self.row = row
        self.seconds = seconds
        self.answers = 0
        self.cut = False
        self.patience = 0.0
        self.overdue = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, patience: float) -> None:
        """The rollout is set up. patience: seconds past the deadline after which the engine is given up."""
        self.patience = patience
        if self.seconds:
            self.deadline = time.monotonic() + self.seconds

    @contextlib.contextmanager
    def in_env(self) -> Iterator[None]:
        """Meanwhile the engine's time does not run: an Env has deadlines of its own, and its grading may queue."""
        self.stop()
        try:
            yield
        finally:
            if self.deadline is not None:
                left = max(0.0, self.deadline - time.monotonic()) + self.patience
                self._timer = asyncio.get_running_loop().call_later(left, self._late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        if not self.overdue.done():
            self.overdue.set_result(None)


def in_thread(name: str, call: Callable[[], T]) -> asyncio.Future[T]:
    """In a daemon thread of its own: one that hangs takes no other's place and does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=f"minisandbox-{name}", daemon=True).start()
    waited = asyncio.wrap_future(future)
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
    return waited
