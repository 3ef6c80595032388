"""Where each rollout goes, and how its node is waited for: a `Cluster` of whatever nodes there are.

Placement: a node that has the image and a free slot, else the one with the most free slots; a rollout
beyond all slots starts at once and is counted, because waiting inside SkyRL's bounded pool of env
threads would deadlock it.

Gradings do wait, in the order in which their rollouts ended: they load a machine most, and whoever waits for one holds
its slot all the same, so that this line always moves. Waiting for it counts against no deadline.

A grading that broke is repeated here, once, on another node where there is one: see `rewards.fault`.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, NodeLost, WorkerLost
from skyrl_minisandbox.node import NodeStatus
from skyrl_minisandbox.record import EndedBy, Outcome
from skyrl_minisandbox.turn import CANCELLATION, Finished, RolloutRequest, Turn
from skyrl_minisandbox.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARGIN = 60.0
"""Seconds beyond a node's own deadlines before the driver gives it up: the way there, a busy machine."""


class Handle(Protocol):
    """A node as the driver sees it: `Node` itself, or an actor."""

    def open(self, request: RolloutRequest) -> Future[Turn]: ...
    def grade(self, request: RolloutRequest, patch: str) -> Future[Turn]: ...
    def step(self, rollout_id: str, text: str) -> Future[Turn]: ...
    def judge(self, rollout_id: str) -> Future[Turn]: ...
    def close(self, rollout_id: str, grade: bool, ended_by: EndedBy) -> Future[Turn | None]: ...


@dataclasses.dataclass
class Place:
    """What the driver knows of one node. images: recipe digests of what it has checked out."""

    name: str
    slots: int
    handle: Handle
    rollouts: set[str] = dataclasses.field(default_factory=set)
    images: set[str] = dataclasses.field(default_factory=set)
    alive: bool = True

    @property
    def free(self) -> int:
        return self.slots - len(self.rollouts)


class Cluster(abc.ABC):
    """All nodes. Thread-safe; verbs block, each with a deadline.

    oversubscribed: rollouts that were started beyond the slots.
    """

    def __init__(self, config: EnvConfig) -> None:
        self._config = config
        self._gradings = WaitingLine()
        self.oversubscribed = 0
        self._lock = threading.Lock()  # guards what is below
        self._places: list[Place] = []
        self._rollouts: dict[str, tuple[Place, RolloutRequest]] = {}

    @property
    def slots(self) -> int:
        """Rollouts that all nodes together should run at once."""
        with self._lock:
            return sum(place.slots for place in self._places if place.alive)

    def open(self, request: RolloutRequest, *, avoid: frozenset[str] = frozenset()) -> Turn:
        """Place a rollout and run it to its first question. `avoid`: names of nodes, where there are others.

        Raises `NodeError` when the node is lost or does not answer in time.
        """
        place = self._place(request, avoid)
        bounds = request.bounds
        turn = self._wait(
            request.rollout_id, lambda: place.handle.open(request), bounds.setup + bounds.step + CANCELLATION
        )
        place.images.add(request.task.recipe.digest())
        return turn

    def step(self, rollout_id: str, text: str) -> Turn:
        """Answer a rollout. Raises `NodeError` when its node is lost or does not answer in time."""
        place, request = self._placed(rollout_id)
        turn = self._wait(
            rollout_id,
            lambda: place.handle.step(rollout_id, text),
            request.bounds.step + request.stopping_seconds,
        )
        return self._judged(request, place, turn)

    def close(self, rollout_id: str, *, grade: bool, ended_by: EndedBy = EndedBy.LENGTH) -> Turn | None:
        """End a rollout, graded or given up (None). Idempotent."""
        if not grade:
            self._gradings.send_away(rollout_id, NodeError("the rollout was given up"))
        with self._lock:
            placed = self._rollouts.get(rollout_id)
        if placed is None:
            return None
        place, request = placed
        try:
            turn = self._wait(
                rollout_id, lambda: place.handle.close(rollout_id, grade, ended_by), request.stopping_seconds
            )
            return None if turn is None else self._judged(request, place, turn)
        finally:
            self._forget(rollout_id)

    @abc.abstractmethod
    def status(self) -> list[NodeStatus]:
        """A snapshot of each node."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """End every rollout, worker and, if it is ours, Ray. Idempotent."""

    @abc.abstractmethod
    def _update(self) -> None:
        """Make the places those of the living nodes."""

    @abc.abstractmethod
    def _lost(self, place: Place) -> None:
        """A call found the node dead."""

    def _place(self, request: RolloutRequest, avoid: frozenset[str]) -> Place:
        """A place for a rollout, taken."""
        self._update()
        with self._lock:
            place = choose([p for p in self._places if p.alive], request.task.recipe.digest(), avoid)
            if place.free <= 0:
                self.oversubscribed += 1
            place.rollouts.add(request.rollout_id)
            self._rollouts[request.rollout_id] = (place, request)
            return place

    def _gradings_at_once(self) -> int:
        """Looked at anew for each rollout that ends, so that it follows nodes that come and go."""
        training = self._config.training
        return training.grading or (training.running or self.slots) // 2

    def _judged(self, request: RolloutRequest, place: Place, turn: Turn) -> Turn:
        """The turn; where the scaffold has ended, with its grade. The first of this process to end is the first."""
        if not turn.ungraded:
            return turn
        rollout_id = request.rollout_id
        with self._gradings.turn(rollout_id, self._gradings_at_once()):
            turn = self._wait(rollout_id, lambda: place.handle.judge(rollout_id), request.judging_seconds)
            return self._settled(request, place, turn)

    def _settled(self, request: RolloutRequest, place: Place, turn: Turn) -> Turn:
        """The turn; where its grading broke, with the grade of another node, or of another process of this one."""
        if turn.finished is None or not turn.finished.repeat:
            return turn
        first = turn.finished
        logger.warning("rollout %s is graded again: %s", request.rollout_id, first.record.error)
        again = dataclasses.replace(request, rollout_id=f"{request.rollout_id}.again")
        other = self._place(again, frozenset([place.name]))
        seconds = request.bounds.setup + request.ending_seconds
        second = self._wait(again.rollout_id, lambda: other.handle.grade(again, first.patch), seconds).finished
        if second is None:
            raise NodeError(f"node {other.name} gave no grade for rollout {request.rollout_id}")
        return Turn([], _together(first, second))

    def _placed(self, rollout_id: str) -> tuple[Place, RolloutRequest]:
        with self._lock:
            if rollout_id not in self._rollouts:
                raise NodeError(f"rollout {rollout_id} is not open")
            return self._rollouts[rollout_id]

    def _wait(self, rollout_id: str, call: Callable[[], Future[T]], seconds: float) -> T:
        """The call's result; whatever ends the rollout also ends our record of it."""
        place, _ = self._placed(rollout_id)
        try:
            return self._answer(place, rollout_id, call, seconds)
        except NodeError as error:
            error.node = place.name
            raise

    def _answer(self, place: Place, rollout_id: str, call: Callable[[], Future[T]], seconds: float) -> T:
        try:
            turn = call().result(seconds + MARGIN)
            if turn is not None and not isinstance(turn, Turn):
                raise TypeError(f"it answered with a {type(turn).__name__}")
        except MiniSandboxError:
            self._forget(rollout_id)
            raise
        except TimeoutError:
            self._forget(rollout_id)
            place.handle.close(rollout_id, False, EndedBy.ERROR)  # it ends there whenever it can
            # All that a node does has deadlines of its own, so that a process of it hangs as a whole.
            raise WorkerLost(
                f"node {place.name} did not answer for rollout {rollout_id} within {seconds + MARGIN:g} s"
            ) from None
        except Exception as error:
            self._forget(rollout_id)
            if not is_lost(error):
                place.handle.close(rollout_id, False, EndedBy.ERROR)  # nobody else will, and it would wait for `idle`
                raise NodeError(f"node {place.name} failed: {type(error).__name__}: {error}") from error
            place.alive = False
            self._lost(place)
            raise NodeLost(f"node {place.name} is lost: {str(error).splitlines()[0]}") from error
        if isinstance(turn, Turn) and turn.done:
            self._forget(rollout_id)
        return turn

    def _forget(self, rollout_id: str) -> None:
        with self._lock:
            placed = self._rollouts.pop(rollout_id, None)
            if placed is not None:
                placed[0].rollouts.discard(rollout_id)


def choose(places: list[Place], image: str, avoid: frozenset[str]) -> Place:
    """Where a rollout goes. Raises `NodeError` when there is no node at all."""
    if not places:
        raise NodeError("no node is alive", hint="ray status")
    candidates = [place for place in places if place.name not in avoid] or places
    warm = [place for place in candidates if image in place.images and place.free > 0]
    return max(warm or candidates, key=lambda place: place.free)


def is_lost(error: BaseException) -> bool:
    """Whether Ray says that the other side is gone, and not that what ran there raised."""
    exceptions = sys.modules.get("ray.exceptions")  # without Ray nothing is ever lost
    return (
        exceptions is not None
        and isinstance(error, exceptions.RayError)
        and not isinstance(error, exceptions.RayTaskError)
    )


def _together(first: Finished, second: Finished) -> Finished:
    """A rollout whose grading broke, with the grade that was made of its patch elsewhere."""
    ours = second.record.outcome is Outcome.INFRA_ERROR
    seconds = dataclasses.replace(
        first.record.seconds, grade=first.record.seconds.grade + second.record.seconds.grade
    )
    error = second.record.error
    if second.repeat:
        error = f"twice, on {first.record.node} and on {second.record.node}: {error}"
    record = dataclasses.replace(
        first.record,
        outcome=second.record.outcome,
        ended_by=EndedBy.ERROR if ours else first.record.ended_by,
        reward=second.record.reward,
        seconds=seconds,
        error=error,
    )
    return dataclasses.replace(
        second,
        record=record,
        repeat=False,
        trajectory=first.trajectory,
        history_divergence=first.history_divergence,
    )
