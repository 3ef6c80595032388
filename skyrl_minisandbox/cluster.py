"""One Node per machine, kept alive.

`LocalCluster` has one Node in this process. `RayCluster` has one actor per living Ray node: one that died is dropped
with its rollouts at the next `open` after it, and a new one gets its actor then. An `open` waits for that only where
there is no other: a machine that has just died is still listed by Ray for a while, and nothing starts there.

Actors belong to the process that made them: they end with it, so an attached Ray keeps nothing of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from skyrl_minisandbox.channel import EXCHANGES, Caller
from skyrl_minisandbox.claims import sweep
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import NodeError, one_line
from skyrl_minisandbox.node import Node, NodeActor, NodeSetup, NodeStatus
from skyrl_minisandbox.own_ray import NAMESPACE, RayConnection
from skyrl_minisandbox.placement import MARGIN, Cluster, Place
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.turn import RolloutRequest, Turn

logger = logging.getLogger(__name__)

NODE_START = 120.0
"""Seconds that a node's actor has to come up."""

TRIES = 3
TRY_PAUSE = 0.5

_dead: set[str] = set()
"""Ray's names of actors that have died. Ray (2.57, 2.60) gives a dead one for its name as long as this process has a
handle of it, so that the next on the same node has another name."""

REFRESH = 10.0
"""Seconds between looks at Ray's list of nodes; a lost node is noticed by its calls at once."""


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
        self._updating = threading.Lock()  # one look at the nodes at a time; guards _joining
        self._joining: dict[str, threading.Thread] = {}  # node id -> who waits for its actor
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
                self._places = [p for p in self._places if p.alive and cast(RayNode, p.handle).node_id in wanted]
                known = {cast(RayNode, place.handle).node_id for place in self._places}
                alone = not self._places
            for node_id in wanted:
                if node_id not in known and not (node_id in self._joining and self._joining[node_id].is_alive()):
                    arguments = (living[node_id], self._start(living[node_id]))
                    self._joining[node_id] = threading.Thread(target=self._join, args=arguments, daemon=True)
                    self._joining[node_id].start()
            for thread in self._joining.values() if alone else ():
                thread.join()
            self._looked = time.monotonic() if self._places else -REFRESH

    def _join(self, machine: dict[str, Any], node: RayNode) -> None:
        """Make a place of a node whose actor is being started."""
        import ray

        try:
            place = self._started(machine, node)
        except Exception as error:  # Ray has ended, or this cluster
            logger.error("node %s does not start: %s", node.name, one_line(error))
            return
        if place is None:
            return
        with self._lock:
            if not self._closed:
                self._places.append(place)
                return
        with contextlib.suppress(Exception):  # as may Ray be
            ray.kill(cast(RayNode, place.handle).actor)

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
                max_concurrency=EXCHANGES,
                enable_task_events=False,  # of each exchange, for Ray's dashboard: 0.05 ms
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
