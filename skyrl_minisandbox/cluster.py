"""One Node per machine, kept alive, and where each rollout goes.

`LocalCluster` has one Node in this process. `RayCluster` has one actor per living Ray node: a new
node gets its actor, one that died is dropped with its rollouts, at the next `open` after it.
Placement: a node that has the image and a free slot, else the one with the most free slots; a rollout
beyond all slots starts at once and is counted, because waiting inside SkyRL's bounded pool of env
threads would deadlock it.

Gradings do wait, in the order in which their rollouts ended: they load a machine most, and whoever waits for one holds
its slot all the same, so that this line always moves. Waiting for it counts against no deadline.

A grading that broke is repeated here, once, on another node where there is one: see `rewards.fault`.

Actors belong to the process that made them: they end with it, so an attached Ray keeps nothing of ours.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from skyrl_minisandbox.channel import Caller
from skyrl_minisandbox.claims import sweep
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, NodeLost, WorkerLost
from skyrl_minisandbox.node import Node, NodeActor, NodeSetup, NodeStatus
from skyrl_minisandbox.own_ray import NAMESPACE, RayConnection
from skyrl_minisandbox.record import EndedBy, Outcome
from skyrl_minisandbox.turn import CANCELLATION, Finished, RolloutRequest, Turn
from skyrl_minisandbox.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARGIN = 60.0
"""Seconds beyond a node's own deadlines before the driver gives it up: the way there, a busy machine."""

NODE_START = 120.0
"""Seconds that a node's actor has to come up."""

TRIES = 3
TRY_PAUSE = 0.5

_dead: set[str] = set()
"""Ray's names of actors that have died. Ray (2.57, 2.60) gives a dead one for its name as long as this process has a
handle of it, so that the next on the same node has another name."""

REFRESH = 10.0
"""Seconds between looks at Ray's list of nodes; a lost node is noticed by its calls at once."""


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


def connect(config: EnvConfig) -> Cluster:
    """The cluster of `config.cluster`. What a crashed run of this machine left is removed first."""
    for path in sweep(Path(config.images.cache)):
        logger.warning("removed what a run that crashed had left: %s", path)
    return LocalCluster(config) if config.cluster.kind == "local" else RayCluster(config)


class LocalCluster(Cluster):
    """One Node in this process, without Ray."""

    def __init__(self, config: EnvConfig) -> None:
        super().__init__(config)
        self._node = Node(_setup(config, os.uname().nodename))
        self._places.append(Place(self._node.setup.name, self._node.slots, self._node))

    def status(self) -> list[NodeStatus]:
        return [self._node.status()]

    def shutdown(self) -> None:
        self._gradings.close(_shut_down())
        self._node.shutdown()

    def _update(self) -> None:
        pass  # this process lives, so its Node does

    def _lost(self, place: Place) -> None:
        pass  # never: without Ray nothing says so


class RayCluster(Cluster):
    """One actor per living Ray node."""

    def __init__(self, config: EnvConfig) -> None:
        super().__init__(config)
        self._ray = RayConnection(config)
        self._updating = threading.Lock()  # one look at the nodes at a time
        self._looked = -REFRESH
        self._closed = False
        try:
            self._update()
        except BaseException:
            self._ray.close()
            raise

    def status(self) -> list[NodeStatus]:
        import ray

        self._check_open()
        with self._lock:
            handles = [cast(RayNode, place.handle) for place in self._places if place.alive]
        found: list[NodeStatus] = ray.get([handle.actor.status.remote() for handle in handles], timeout=MARGIN)
        return found

    def shutdown(self) -> None:
        import ray

        self._closed = True
        self._gradings.close(_shut_down())
        with self._lock:
            places, self._places = self._places, []
        if ray.is_initialized():
            handles = [cast(RayNode, place.handle) for place in places if place.alive]
            ray.wait(
                [handle.actor.shutdown.remote() for handle in handles],
                num_returns=len(handles),
                timeout=MARGIN,
            ) if handles else None
            for handle in handles:
                ray.kill(handle.actor)
        self._ray.close()

    def _lost(self, place: Place) -> None:
        logger.error("node %s is lost with %d rollouts", place.name, len(place.rollouts))
        _dead.add(cast(RayNode, place.handle).label)
        self._looked = -REFRESH

    def _update(self) -> None:
        """One idempotent pass: a place for each living node, none for the others."""
        import ray

        with self._updating:
            self._check_open()
            if time.monotonic() - self._looked < REFRESH:
                return
            living = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            here = ray.get_runtime_context().get_node_id()
            order = sorted(living, key=lambda node_id: (node_id != here, node_id))
            wanted = order[: self._config.cluster.nodes or None]
            with self._lock:
                kept = [p for p in self._places if p.alive and cast(RayNode, p.handle).node_id in wanted]
            known = {cast(RayNode, place.handle).node_id for place in kept}
            missing = [living[node_id] for node_id in wanted if node_id not in known]
            made = [self._start(node) for node in missing]  # all at once
            started = [place for place in map(self._started, missing, made) if place is not None]
            with self._lock:
                self._places = kept + started
            self._looked = time.monotonic() if self._places else -REFRESH

    def _check_open(self) -> None:
        if self._closed:
            raise _shut_down()
        _expect_ray()

    def _start(self, node: dict[str, Any]) -> RayNode:
        """Get or create the actor pinned to this node; by name, so that all processes of a job share it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._check_open()
        node_id: str = node["NodeID"]
        setup = _setup(self._config, f"{node['NodeManagerHostname']}-{node_id[:6]}")
        job = ray.get_runtime_context().get_job_id()
        which = hashlib.sha256(repr(setup).encode()).hexdigest()[:8]
        names = (f"node-{node_id[:12]}-{job}-{which}-{number}" for number in itertools.count())
        label = next(name for name in names if name not in _dead)
        actor = (
            ray.remote(NodeActor)
            .options(
                name=label,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=10_000,  # calls wait for sandboxes, they do not compute
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(setup)
        )
        return RayNode(setup.name, node_id, label, actor)

    def _started(self, machine: dict[str, Any], node: RayNode) -> Place | None:
        """Wait for the actor."""
        import ray

        for _ in range(TRIES):
            try:
                status: NodeStatus = ray.get(node.actor.status.remote(), timeout=NODE_START)
                return Place(node.name, status.slots, node)
            except ray.exceptions.RayActorError as error:
                logger.error("node %s does not start: %s", node.name, error)
                _dead.add(node.label)
                time.sleep(TRY_PAUSE)
                node = self._start(machine)
            except ray.exceptions.GetTimeoutError:
                logger.error("node %s did not start within %g s", node.name, NODE_START)
                break
        return None


class RayNode:
    """The driver's end of a `NodeActor`."""

    def __init__(self, name: str, node_id: str, label: str, actor: Any) -> None:
        """label: the actor's name in Ray."""
        self.name, self.node_id, self.label, self.actor = name, node_id, label, actor
        self._caller = Caller(actor)

    def open(self, request: RolloutRequest) -> Future[Turn]:
        return self._call("open", request)

    def grade(self, request: RolloutRequest, patch: str) -> Future[Turn]:
        return self._call("grade", request, patch)

    def step(self, rollout_id: str, text: str) -> Future[Turn]:
        return self._call("step", rollout_id, text)

    def judge(self, rollout_id: str) -> Future[Turn]:
        return self._call("judge", rollout_id)

    def close(self, rollout_id: str, grade: bool, ended_by: EndedBy) -> Future[Turn | None]:
        return self._call("close", rollout_id, grade, ended_by)

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        _expect_ray()
        return self._caller.call(method, *arguments)


def _expect_ray() -> None:
    """Raises `NodeError` without Ray: its own functions would start another one, of its defaults."""
    import ray

    if not ray.is_initialized():
        raise _shut_down()


def _shut_down() -> NodeError:
    return NodeError("the cluster has been shut down")


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


def _setup(config: EnvConfig, name: str) -> NodeSetup:
    return NodeSetup(
        name=name,
        store=config.images.store,
        cache=config.images.cache,
        workers=config.cluster.workers,
        slots=config.cluster.slots,
        out=config.out,
        sys_path=tuple(os.path.abspath(path) for path in sys.path),
    )
