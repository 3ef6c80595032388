"""Deaths of what is ours under a rollout: masked once, told by name, and scored where the same row does it again.

The rest of the table of faults is in tests/rewards/test_fault_rows.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cluster import LocalCluster, RayCluster, connect
from skyrl_minisandbox.config import EnvConfig, ScaffoldConfig, make_config
from skyrl_minisandbox.node import MemoryKills, Node, NodeSetup
from skyrl_minisandbox.placement import Cluster, Place
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.fault import Event
from skyrl_minisandbox.sandbox import Limits
from skyrl_minisandbox.sandbox.limits import Cgroups
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.turn import Finished
from tests.ancestry import init_above, kill, launcher_above, marked, worker_above
from tests.machine import Process, descendants
from tests.small import SOLVE, Loop, build_small_image, request, small_task
from tests.support import REPOSITORY, needs, seconds

pytestmark = [pytest.mark.ci, needs("userns", "overlay", "git")]

ENDLESS, SHORT = "61.625", "4.625"


def task(mark: str = "") -> Task:
    """The small task, whose gold patch makes the tests sleep and then pass."""
    lines = [f"sleep {mark}"] if mark else []
    added = "".join(f"+{line}\n" for line in [*lines, "echo right"])
    patch = (
        "diff --git a/answer.sh b/answer.sh\n--- a/answer.sh\n+++ b/answer.sh\n"
        f"@@ -1 +1,{len(lines) + 1} @@\n-echo wrong\n{added}"
    )
    return small_task(timeout=90.0).model_copy(update={"gold_patch": patch})


@pytest.fixture
def config(store_directory: Path, cache_directory: Path, tmp_path: Path) -> EnvConfig:
    build_small_image(store_directory, cache_directory)
    return make_config(
        {
            "images": {"store": str(store_directory), "cache": str(cache_directory)},
            "scaffold": "gold",
            "cluster": {"kind": "local", "slots": 4, "workers": 1},
            "out": str(tmp_path / "run"),
        }
    )


@pytest.fixture
def cluster(config: EnvConfig) -> Iterator[LocalCluster]:
    found = connect(config)
    assert isinstance(found, LocalCluster)
    yield found
    found.shutdown()


@pytest.fixture
def two(cluster: LocalCluster, config: EnvConfig, tmp_path: Path) -> Iterator[LocalCluster]:
    """The same with a second node."""
    images = config.images
    node = Node(
        NodeSetup(
            "other", images.store, images.cache, workers=1, slots=4, out=str(tmp_path), sys_path=(str(REPOSITORY),)
        )
    )
    cluster._places.append(Place("other", node.slots, node))
    yield cluster
    node.shutdown()


def gold(cluster: Cluster, mark: str, **changes: Any) -> Finished:
    """A rollout of the gold patch."""
    asked = request(task(mark), **{"scaffold": ScaffoldConfig("gold"), **changes})
    cluster.open(asked)
    finished = cluster.step(asked.rollout_id, "").finished
    assert finished is not None
    held = [*cluster._rollouts, *(name for place in cluster._places for name in place.rollouts)]
    assert not [name for name in held if name.startswith(asked.rollout_id)]
    return finished


class Meanwhile:
    """Does something to the tests that run `sleep MARK`, as often as there are acts; `seen` is what it was told of."""

    def __init__(self, mark: str, *acts: Callable[[Process], int]) -> None:
        self.seen: list[int] = []
        self._mark, self._acts = mark, acts
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for act in self._acts:
            found = marked(self._mark)
            self.seen.append(act(found))
            while Path(f"/proc/{found.pid}").exists():
                time.sleep(0.01)

    def join(self) -> list[int]:
        self._thread.join(seconds(60))
        assert len(self.seen) == len(self._acts)
        return self.seen


def kills(above: Callable[[Process], int]) -> Callable[[Process], int]:
    def act(process: Process) -> int:
        worker = worker_above(process)
        kill(above(process))
        return worker

    return act


def verdict(finished: Finished) -> tuple[Outcome, float | None, str]:
    return finished.record.outcome, finished.record.reward, finished.event


# -- a worker process -------------------------------------------------------------------------------


def episode(config: EnvConfig, mark: str, **extras: Any) -> dict[str, Any]:
    """The end of one rollout of the gold patch, as the Env tells SkyRL."""
    from skyrl_minisandbox.env import MiniSandboxEnv

    env = MiniSandboxEnv(config, {"task": task(mark), **extras})
    env.init([])
    output = env.step("")
    assert output["done"]
    env.close()
    metadata: dict[str, Any] = output["metadata"]
    return metadata


@pytest.fixture
def of_envs(config: EnvConfig) -> Iterator[LocalCluster]:
    """The cluster that Envs of this configuration share."""
    pytest.importorskip("skyrl_gym")
    from skyrl_minisandbox.env import shared_cluster, shutdown

    found = shared_cluster(config)
    assert isinstance(found, LocalCluster)
    yield found
    shutdown()


def test_a_worker_that_dies_is_masked_and_the_retry_is_told_what_it_needs(
    config: EnvConfig, of_envs: LocalCluster
) -> None:
    meanwhile = Meanwhile(ENDLESS, kills(worker_above))
    metadata = episode(config, ENDLESS)
    (worker,) = meanwhile.join()
    record = metadata["record"]
    assert (record["outcome"], record["reward"], metadata["event"]) == ("infra_error", None, "worker_lost")
    assert f"worker process {worker}" in record["error"] and "SIGKILL" in record["error"]
    assert record["node"] == of_envs.status()[0].name
    again = episode(config, "", node=record["node"], before=metadata["event"])
    assert (again["record"]["outcome"], again["record"]["reward"]) == ("resolved", 1.0)


def test_a_row_whose_worker_dies_again_is_scored_and_takes_nobody_along(
    config: EnvConfig, of_envs: LocalCluster
) -> None:
    (common,) = of_envs.status()[0].pids
    beside = request(small_task())
    of_envs.open(beside)
    meanwhile = Meanwhile(ENDLESS, kills(worker_above))
    metadata = episode(config, ENDLESS, before="worker_lost")
    (worker,) = meanwhile.join()
    assert worker != common
    record = metadata["record"]
    assert (record["outcome"], record["reward"], metadata["event"]) == ("agent_error", 0.0, "worker_lost")
    assert of_envs.status()[0].pids == (common,)
    of_envs.step(beside.rollout_id, SOLVE)
    finished = of_envs.step(beside.rollout_id, "submit").finished
    assert finished is not None and verdict(finished) == (Outcome.RESOLVED, 1.0, "")


@pytest.mark.parametrize("before", ["worker_lost", "launcher_lost"])
def test_a_second_try_has_a_worker_of_its_own_that_ends_with_it(cluster: LocalCluster, before: str) -> None:
    (common,) = cluster.status()[0].pids
    meanwhile = Meanwhile(SHORT, worker_above)
    assert verdict(gold(cluster, SHORT, before=before)) == (Outcome.RESOLVED, 1.0, "")
    (worker,) = meanwhile.join()
    assert worker != common
    deadline = time.monotonic() + seconds(30)
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert cluster.status()[0].pids == (common,)


def test_a_try_after_anything_else_shares_its_worker(cluster: LocalCluster) -> None:
    meanwhile = Meanwhile(SHORT, worker_above)
    assert verdict(gold(cluster, SHORT, before="node_lost")) == (Outcome.RESOLVED, 1.0, "")
    assert meanwhile.join() == list(cluster.status()[0].pids)


def test_a_launcher_that_dies_takes_the_rollouts_of_its_worker_masked(cluster: LocalCluster) -> None:
    beside = request(small_task())
    cluster.open(beside)
    meanwhile = Meanwhile(ENDLESS, kills(launcher_above))
    assert verdict(gold(cluster, ENDLESS)) == (Outcome.INFRA_ERROR, None, Event.LAUNCHER_LOST)
    meanwhile.join()
    finished = cluster.step(beside.rollout_id, "true").finished
    assert finished is not None and verdict(finished) == (Outcome.INFRA_ERROR, None, Event.LAUNCHER_LOST)
    assert verdict(gold(cluster, "")) == (Outcome.RESOLVED, 1.0, "")  # by a launcher made anew


class Hungry(Loop):
    """A scaffold that takes memory without end, in the worker process."""

    def run(self, task: Any, sandbox: Any, policy: Any) -> Any:
        policy.query([{"role": "user", "content": "hungry"}])
        held = []
        while True:
            held.append(b"\1" * (16 << 20))


@needs("cgroup")
def test_a_machine_out_of_memory_is_ours_even_the_second_time(cluster: LocalCluster) -> None:
    (worker,) = cluster.status()[0].pids
    deadline = time.monotonic() + seconds(30)
    while not descendants(worker):  # its launcher stays outside
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asked = request(small_task(), scaffold=ScaffoldConfig(f"{__name__}.Hungry"), before="node_lost")
    with little_memory(worker):
        cluster.open(asked)
        with pytest.raises(Exception, match="no memory was left") as caught:
            cluster.step(asked.rollout_id, "go")
    from skyrl_minisandbox.rewards.fault import event_of, outcome_of

    assert event_of(caught.value) is Event.OUT_OF_MEMORY
    assert str(worker) in str(caught.value)
    assert outcome_of(Event.OUT_OF_MEMORY, before="worker_lost") is Outcome.INFRA_ERROR
    assert verdict(gold(cluster, "")) == (Outcome.RESOLVED, 1.0, "")


@contextlib.contextmanager
def little_memory(pid: int) -> Iterator[None]:
    """Move a process into a cgroup like a sandbox's, with 256 MiB: what a machine does that has no more."""
    cgroups = Cgroups()
    try:
        made = cgroups.create("little")
        cgroups.limit(made, {**vars(Limits()), "memory": 256 << 20})
        for directory in made.directories:
            Path(directory, "cgroup.procs").write_text(str(pid))
        yield
        made.remove()
    finally:
        cgroups.close()


def test_what_was_killed_for_memory_is_counted_where_a_process_is() -> None:
    counted = MemoryKills(os.getpid())
    counted.look()
    assert not counted.grew()
    gone = MemoryKills(2**22 + 1)  # above every pid
    gone.look()
    assert not gone.grew()


# -- a grading that breaks: once more, elsewhere ----------------------------------------------------


def test_a_grading_whose_sandbox_dies_is_repeated_alone_on_the_other_node(two: LocalCluster) -> None:
    common = {pid for place in two._places for pid in place.handle.status().pids}  # type: ignore[attr-defined]
    meanwhile = Meanwhile(SHORT, kills(init_above), worker_above)
    finished = gold(two, SHORT)
    first, second = meanwhile.join()
    assert first in common and second not in common
    assert verdict(finished) == (Outcome.RESOLVED, 1.0, "")
    assert not finished.repeat
    assert finished.report is not None and finished.report["outcome"] == "resolved"
    assert finished.record.seconds.grade > 4.0
    assert finished.record.rollout_id.count(".again") == 0


def test_a_grading_whose_sandbox_dies_twice_is_the_patchs_doing(two: LocalCluster) -> None:
    meanwhile = Meanwhile(ENDLESS, kills(init_above), kills(init_above))
    finished = gold(two, ENDLESS)
    meanwhile.join()
    assert verdict(finished) == (Outcome.UNRESOLVED, 0.0, "")
    names = [place.name for place in two._places]
    assert f"twice, on {finished.record.node} and on " in finished.record.error
    assert all(name in finished.record.error for name in names)
    assert "the sandbox died under the patch" in finished.record.error


def test_with_one_node_it_is_repeated_there_by_another_process(cluster: LocalCluster) -> None:
    meanwhile = Meanwhile(SHORT, kills(init_above), worker_above)
    assert verdict(gold(cluster, SHORT)) == (Outcome.RESOLVED, 1.0, "")
    first, second = meanwhile.join()
    assert first != second


def test_closing_early_repeats_a_grading_too(two: LocalCluster) -> None:
    meanwhile = Meanwhile(SHORT, kills(init_above), worker_above)
    asked = request(task(SHORT), scaffold=ScaffoldConfig("gold"))
    two.open(asked)
    turn = two.close(asked.rollout_id, grade=True)
    meanwhile.join()
    assert turn is not None and turn.finished is not None
    assert verdict(turn.finished) == (Outcome.RESOLVED, 1.0, "")


def test_a_worker_that_dies_over_the_repeated_grading_is_ours(config: EnvConfig, of_envs: LocalCluster) -> None:
    meanwhile = Meanwhile(ENDLESS, kills(init_above), kills(worker_above))
    metadata = episode(config, ENDLESS)
    meanwhile.join()
    record = metadata["record"]
    assert (record["outcome"], record["reward"], metadata["event"]) == ("infra_error", None, "worker_lost")


def test_a_launcher_that_dies_over_the_repeated_grading_is_ours(two: LocalCluster) -> None:
    meanwhile = Meanwhile(ENDLESS, kills(init_above), kills(launcher_above))
    finished = gold(two, ENDLESS)
    meanwhile.join()
    assert verdict(finished) == (Outcome.INFRA_ERROR, None, Event.LAUNCHER_LOST)


# -- a node -----------------------------------------------------------------------------------------


@needs("ray", "skyrl_gym")
def test_a_node_that_dies_under_a_grading_is_ours_however_often(config: EnvConfig) -> None:
    import ray

    from skyrl_minisandbox.env import shared_cluster, shutdown

    through_ray = make_config({**vars(config), "cluster": {"slots": 2, "workers": 1}})
    try:
        cluster = shared_cluster(through_ray)
        assert isinstance(cluster, RayCluster)
        for before in ("", "worker_lost"):
            name = cluster.status()[0].name

            def end_actor(process: Process) -> int:
                ray.kill(cluster._places[0].handle.actor)  # type: ignore[attr-defined]
                return process.pid

            meanwhile = Meanwhile(ENDLESS, end_actor)
            metadata = episode(through_ray, ENDLESS, before=before)
            meanwhile.join()
            record = metadata["record"]
            assert (record["outcome"], record["reward"], metadata["event"]) == ("infra_error", None, "node_lost")
            assert f"node {name} is lost" in record["error"]
            assert record["node"] == name
            again = episode(through_ray, "")
            assert again["record"]["reward"] == 1.0
    finally:
        shutdown()
