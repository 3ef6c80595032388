"""Calls from a driver to a node's actor, many in one message where many come at once.

A call through Ray takes a millisecond and a half of CPU on both sides together, whatever is in it; a step of a rollout
takes a third of one. So what is called while messages are on their way goes along in the next one, and answers come
back the same way:

    Caller (driver)   exchange ──>  [(call, method, arguments), …]
                      <───────────  [(call, value, failure), …]    when there is one, another exchange has come, or
                                                                   none did for long

Two exchanges are under way at most: one of which the actor keeps hold of while nothing is answered, and one that brings
it more. Where one caller calls at a time, each call is one exchange, as it would be without us.

What goes either way is bytes that we have pickled: both ends are ours, and Ray passes on one bytes object as it is.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from skyrl_minisandbox.errors import MiniSandboxError, one_line

UNDER_WAY = 2

EXCHANGES = 64
"""Threads of the actor: 32 processes may share it. Threads, because Ray takes longer for an asynchronous actor."""

KEPT = 30.0
"""Seconds that the actor keeps hold of an exchange. Who waits comes again; a driver that is gone holds no thread."""

_FOLLOWING = ThreadPoolExecutor(1, thread_name_prefix="channel")
"""One thread for all channels of a process. None of their own: it would hold on to the actor, and that to its name."""


class Caller:
    """The driver's end. Thread-safe.

    actor: a Ray actor with the method `exchange` of a `Callee`.

    When the actor is lost, every call fails with what Ray says, those under way and all later ones.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._channel = uuid.uuid4().hex  # an actor may have several drivers
        self._lock = threading.Lock()  # guards all below
        self._calls: dict[int, Future[Any]] = {}
        self._last = 0
        self._waiting: list[Message] = []
        self._under_way = 0
        self._over: BaseException | None = None

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Ask for something; the Future gets the answer, our error that came instead, or Ray's."""
        future: Future[Any] = Future()
        message = pickle.dumps((method, arguments), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._over is not None:
                future.set_exception(self._over)
                return future
            self._last += 1
            self._waiting.append((self._last, message))
            self._calls[self._last] = future
        self._exchange()
        return future

    def _exchange(self) -> None:
        """Send what waits, or ask for what is not answered, if that is to be done and nobody else does it."""
        with self._lock:
            wanted = self._waiting or (self._calls and not self._under_way)
            if not wanted or self._under_way >= UNDER_WAY or self._over is not None:
                return
            messages, self._waiting = self._waiting, []
            self._under_way += 1
        try:
            # Not ray.get: a thread in there when Ray shuts down does not come back.
            data = pickle.dumps((self._channel, messages), pickle.HIGHEST_PROTOCOL)
            self._actor.exchange.remote(data).future().add_done_callback(self._returned)
        except Exception as error:
            self._fail(error)

    def _returned(self, done: Future[bytes]) -> None:
        """In a thread of Ray's, which must not call Ray: what comes next is left to ours."""
        try:
            answers: list[Answer] = pickle.loads(done.result())
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            self._under_way -= 1
            answered = [(self._calls.pop(call, None), value, failure) for call, value, failure in answers]
            more = bool(self._waiting or (self._calls and not self._under_way))
        if more:
            with contextlib.suppress(RuntimeError):  # this process ends
                _FOLLOWING.submit(self._exchange)
        for future, value, failure in answered:
            if future is None:
                continue  # it has failed, as all did
            future.set_exception(failure) if failure is not None else future.set_result(value)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._over = error
            calls, self._calls = self._calls, {}
        for future in calls.values():
            future.set_exception(error)


Message = tuple[int, bytes]
Answer = tuple[int, Any, Exception | None]


class Desk:
    """What is answered and not sent yet, of one driver. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the two below
        self._answers: list[Answer] = []
        self._exchanges = 0

    def put(self, answer: Answer) -> None:
        """Have it sent."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()

    def take(self) -> list[Answer]:
        """All there are, as soon as there is one; none when another has come for them, or for too long."""
        deadline = time.monotonic() + KEPT
        with self._changed:
            self._exchanges += 1
            mine = self._exchanges
            self._changed.notify_all()  # whoever waits already goes, and can bring more
            while not self._answers and self._exchanges == mine and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            answers, self._answers = self._answers, []
        return answers


class Callee:
    """The actor's end: methods, by name, each of which gives a Future. Thread-safe; `exchange` holds its thread."""

    def __init__(self, *methods: Callable[..., Future[Any]]) -> None:
        self._methods = {method.__name__: method for method in methods}
        self._lock = threading.Lock()  # guards the one below
        self._desks: dict[str, Desk] = {}

    def exchange(self, data: bytes) -> bytes:
        """Begin what is asked; give what is answered, as soon as there is some or another exchange comes."""
        channel, messages = pickle.loads(data)
        with self._lock:
            desk = self._desks.setdefault(channel, Desk())
        for call, message in messages:
            self._begin(desk, call, message)
        return pickle.dumps(desk.take(), pickle.HIGHEST_PROTOCOL)

    def _begin(self, desk: Desk, call: int, message: bytes) -> None:
        try:
            method, arguments = pickle.loads(message)
            future = self._methods[method](*arguments)
        except Exception as error:
            desk.put((call, None, _plain(error)))
            return

        def answered(done: Future[Any]) -> None:
            error = done.exception()
            desk.put((call, None, _plain(error)) if error is not None else (call, done.result(), None))

        future.add_done_callback(answered)


def _plain(error: BaseException) -> Exception:
    """An error for the other side: the class of one that is not ours may not be known there, or not be pickled."""
    return error if isinstance(error, MiniSandboxError) else RuntimeError(one_line(error))
