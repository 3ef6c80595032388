"""The scaffold turned inside out: its queries become observations, the trainer's texts their answers.

Two threads meet here. The scaffold's thread calls `query` and blocks until a text comes; the rollout's side
calls `first` once and then `answer` per text, and blocks until the scaffold asks again or ends:

    scaffold thread                    rollout side
    query(messages) ───── added ─────> first(timeout)
         ^ ─────────────── text ────── answer(text, timeout)
         │ ... commands run ...              │ waits
    query(messages) ───── added ───────────> returns
    end()           ───── None ────────────> returns None

Who has many of them gives the text and does not wait: `give` has the answer brought by the scaffold's own thread.

One condition variable holds all but the text itself; nobody polls, and every wait has a deadline (monotonic clock).
"""

from __future__ import annotations

import operator
import queue
import threading
import time
from collections.abc import Callable

from skyrl_minisandbox.errors import PolicyError
from skyrl_minisandbox.policies.policy import Message, PolicyStopped
from skyrl_minisandbox.record import EndedBy

PATIENCE = 6 * 3600.0
"""Seconds that a scaffold waits for a text. Trainers pause for evaluation and checkpoints; a driver that is
gone is noticed by its lease long before."""


Then = Callable[[list[Message] | None], None]
"""Called with what `answer` would return."""


class InvertedPolicy:
    """The policy that `env.step` feeds.

    patience: seconds that `query` waits for a text before it raises `PolicyError`.
    history_divergence: messages that the scaffold removed or rewrote, or answers that it did not keep,
        since they stay in the trainer's stream.
    turns: texts that were handed to the scaffold.
    """

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.history_divergence = 0
        self.turns = 0
        self._changed = threading.Condition()  # guards everything below
        self._seen = Said([])  # the scaffold's history as of its last query, and our answer
        self._added: list[Message] | None = None  # what it asks with, until it is answered
        # Handed over, not yet taken; None wakes whoever waits for one. A queue, as C has it: every turn waits for it.
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._then: Then | None = None  # who is to be told what comes of it
        self._stopped: EndedBy | None = None
        self._ended = False

    # -- the scaffold's side ----------------------------------------------------------------------

    def query(self, messages: list[Message]) -> str:
        """Hand out what is new in `messages` and block until a text comes.

        Raises `PolicyStopped` once the rollout has ended, `PolicyError` when nobody answers.
        """
        history = Said(messages)
        with self._changed:
            self._raise_if_stopped()
            self._added, lost = compare(self._seen, history)
            self.history_divergence += lost
            added, then = self._added, self._told()
            self._changed.notify_all()
        if then is not None:
            then(added)
        text = self._take(self.patience)
        with self._changed:
            self._raise_if_stopped()
            if text is None:  # nobody can give one any more, but may have at the last moment
                self._added = None
                text = self._take(0.0)
            if text is None:
                raise PolicyError(
                    f"no text came for the scaffold within {self.patience:.0f} s",
                    hint="the driver that calls env.step is gone or paused; close the rollout",
                )
            self.turns += 1
            history.add("assistant", text)
            self._seen = history
            return text

    def end(self) -> None:
        """The scaffold's run is over, however it went. Called by the thread that ran it, last of all."""
        with self._changed:
            self._ended = True
            then = self._told()
            self._changed.notify_all()
        if then is not None:
            then(None)

    # -- the rollout's side -----------------------------------------------------------------------

    def first(self, timeout: float | None = None) -> list[Message] | None:
        """Wait for the scaffold's first query; its messages, or None when it ended without asking.

        timeout: seconds, None for as long as it takes. Raises `TimeoutError`.
        """
        with self._changed:
            return self._next(timeout)

    def answer(self, text: str, timeout: float | None = None) -> list[Message] | None:
        """Hand `text` to the scaffold and wait for what it adds before its next query.

        Returns messages without the answer itself (an empty list when it asks again with nothing new), or
        None when the scaffold ended. Raises `TimeoutError` when it does neither within `timeout` seconds:
        it goes on in its thread then, and waiting again is `first`.
        """
        told: queue.SimpleQueue[list[Message] | None] = queue.SimpleQueue()
        then = told.put
        if not self.give(text, then):
            with self._changed:
                if self._over():
                    return None
            raise RuntimeError("`answer` without a query that waits for it")
        try:
            return told.get(timeout=None if timeout is None else max(0.0, timeout))
        except queue.Empty:
            if not self.take_back(then):
                return told.get()  # it came at the last moment
        raise TimeoutError(f"the scaffold neither asked nor ended within {timeout} s")

    def give(self, text: str, then: Then) -> bool:
        """Hand `text` to the scaffold without waiting: `then` is called once, by the thread that asks again, ends, or
        calls `stop`, and must not wait for the scaffold. False, and nothing happens, where no query waits for a text.
        """
        with self._changed:
            if self._over() or self._added is None:
                return False
            self._added = None
            self._then = then
            self._texts.put(text)
            return True

    def take_back(self, then: Then) -> bool:
        """Have `then` not called any more; False where it has been, or is about to be."""
        with self._changed:
            mine = self._then == then
            if mine:
                self._then = None
            return mine

    def awaits(self, then: Then) -> bool:
        """Whether `then` is still to be called."""
        with self._changed:
            return self._then == then

    def stop(self, ended_by: EndedBy = EndedBy.TURN_LIMIT) -> None:
        """Unwind the scaffold: its present or next `query` raises `PolicyStopped(ended_by)`.

        Idempotent (the first reason stands), from any thread. A scaffold that is in a command is not
        interrupted by this; closing its sandbox does that.
        """
        with self._changed:
            if self._stopped is None:
                self._stopped = ended_by
            self._added = None
            then = self._told()
            self._texts.put(None)
            self._changed.notify_all()
        if then is not None:
            then(None)

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait until the scaffold's run is over; False when it is not within `timeout` seconds."""
        with self._changed:
            return self._wait(lambda: self._ended, timeout)

    # -- below the lock ---------------------------------------------------------------------------

    def _over(self) -> bool:
        return self._ended or self._stopped is not None

    def _take(self, timeout: float) -> str | None:
        try:
            return self._texts.get(timeout=timeout)
        except queue.Empty:
            return None

    def _told(self) -> Then | None:
        then, self._then = self._then, None
        return then

    def _next(self, timeout: float | None) -> list[Message] | None:
        if not self._wait(lambda: self._added is not None or self._over(), timeout):
            raise TimeoutError(f"the scaffold neither asked nor ended within {timeout} s")
        return None if self._over() else self._added

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise PolicyStopped(self._stopped)

    def _wait(self, predicate: Callable[[], bool], timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not predicate():
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            self._changed.wait(remaining)
        return True


class Said:
    """A copy of a conversation that nobody else can change.

    Two lists of texts, which C makes and compares: every query brings the whole history.
    """

    def __init__(self, messages: list[Message]) -> None:
        self._roles: list[str] = list(map(operator.itemgetter("role"), messages))
        self._contents: list[str] = list(map(operator.itemgetter("content"), messages))

    def add(self, role: str, content: str) -> None:
        self._roles.append(role)
        self._contents.append(content)

    def begins_with(self, other: Said) -> bool:
        length = len(other._contents)
        return self._contents[:length] == other._contents and self._roles[:length] == other._roles

    def pairs(self, start: int = 0) -> list[tuple[str, str]]:
        return list(zip(self._roles[start:], self._contents[start:], strict=True))

    def __len__(self) -> int:
        return len(self._contents)


def compare(seen: Said, history: Said) -> tuple[list[Message], int]:
    """What `history` adds to `seen`, and how many of `seen` it lost.

    seen: the last query's messages followed by the answer to it (or empty).
    Returns the messages for the trainer, whose stream holds all of `seen` already: neither the answer nor
    any other assistant message is among them, as a trainer can only take those from its own model.
    """
    if history.begins_with(seen):
        return _for_trainer(history.pairs(len(seen))), 0
    before, now = seen.pairs(), history.pairs()
    common = 0
    while common < min(len(before), len(now)) and before[common] == now[common]:
        common += 1
    # Something was lost. What counts as new begins after the last message that both have.
    lost, start, position = 0, common, common
    for message in before[common:]:
        try:
            position = now.index(message, position) + 1
            start = position
        except ValueError:
            lost += 1
    return _for_trainer(now[start:]), lost


def _for_trainer(new: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in new if role != "assistant"]
