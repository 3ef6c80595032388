"""Calls from a driver to a node's actor, many in one message where many come at once.

A call through Ray takes a millisecond and a half of CPU on both sides together, whatever is in it; a step of a rollout
takes a third of one. So what is called while messages are on their way goes along in the next one, and answers come
back the same way:

    Caller (driver)   exchange ──>  [(call, method, arguments), …]
                      <───────────  [(call, value, failure), …]    when there is one, or when another exchange has come

Two exchanges are under way at most: one of which the actor keeps hold of while nothing is answered, and one that brings
it more. Where one caller calls at a time, each call is one exchange, as it would be without us.

The messages are pickled by us: both ends are ours, and Ray takes longer for it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import pickle
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from skyrl_minisandbox.errors import MiniSandboxError, one_line

UNDER_WAY = 2

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
            self._actor.exchange.remote(self._channel, messages).future().add_done_callback(self._returned)
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


@dataclasses.dataclass
class Desk:
    """Of one driver. kept: the exchange that waits for answers; it is let go by a result."""

    answers: list[Answer] = dataclasses.field(default_factory=list)
    kept: asyncio.Future[None] | None = None

    def let_go(self) -> None:
        if self.kept is not None and not self.kept.done():
            self.kept.set_result(None)


class Callee:
    """The actor's end: its own asynchronous methods, by name. Used in the actor's event loop only."""

    def __init__(self, *methods: Callable[..., Awaitable[Any]]) -> None:
        self._methods = {method.__name__: method for method in methods}
        self._desks: dict[str, Desk] = collections.defaultdict(Desk)
        self._running: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly

    async def exchange(self, channel: str, messages: list[Message]) -> bytes:
        """Begin what is asked; give what is answered, as soon as there is some or another exchange comes."""
        loop = asyncio.get_running_loop()
        desk = self._desks[channel]
        for call, message in messages:
            task = loop.create_task(self._run(desk, call, *pickle.loads(message)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        desk.let_go()
        if not desk.answers:
            desk.kept = loop.create_future()
            await desk.kept
        answers, desk.answers = desk.answers, []
        return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)

    async def _run(self, desk: Desk, call: int, method: str, arguments: tuple[Any, ...]) -> None:
        value: Any = None
        failure: Exception | None = None
        try:
            value = await self._methods[method](*arguments)
        except MiniSandboxError as error:
            failure = error
        except Exception as error:
            failure = RuntimeError(one_line(error))  # its class may not be known, or not be pickled, where it goes
        desk.answers.append((call, value, failure))
        desk.let_go()
