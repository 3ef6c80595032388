"""Where rollouts go, how their nodes are waited for, and who waits for a grade."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cluster import LocalCluster, connect
from skyrl_minisandbox.config import EnvConfig, RolloutConfig, make_config
from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.placement import Cluster, Place, choose
from tests.small import SOLVE, cluster_config, play, request, small_task
from tests.support import needs

sandboxes = needs("userns", "overlay", "git")


@pytest.fixture(scope="module")
def config(store_directory: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> EnvConfig:
    return cluster_config(store_directory, cache_directory, tmp_path_factory.mktemp("run"))


# -- placement --------------------------------------------------------------------------------------


class Nowhere:
    def open(self, request: Any) -> Future[Any]:
        raise AssertionError("not asked")

    step = close = open


def place(name: str, slots: int, *, open: int = 0, images: tuple[str, ...] = ()) -> Place:
    return Place(name, slots, Nowhere(), {str(n) for n in range(open)}, set(images))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("places", "avoid", "chosen"),
    [
        ([place("a", 4), place("b", 4, open=1, images=("image",))], set(), "b"),
        ([place("a", 4), place("b", 4, open=4, images=("image",))], set(), "a"),
        ([place("a", 4, open=2), place("b", 8, open=2)], set(), "b"),
        ([place("a", 4, open=9), place("b", 4, open=5)], set(), "b"),
        ([place("a", 4), place("b", 4, images=("image",))], {"b"}, "a"),
        ([place("b", 4, images=("image",))], {"b"}, "b"),
    ],
    ids=[
        "the one with the image",
        "not where it is full",
        "the one with most room",
        "the least crowded when all are full",
        "elsewhere at a second try",
        "the only one there is",
    ],
)
def test_a_rollout_goes_to(places: list[Place], avoid: set[str], chosen: str) -> None:
    assert choose(places, "image", frozenset(avoid)).name == chosen


def test_no_node_at_all_is_an_error() -> None:
    with pytest.raises(NodeError, match="no node is alive"):
        choose([], "image", frozenset())


# -- without Ray ------------------------------------------------------------------------------------


@sandboxes
def test_the_local_cluster_runs_a_rollout_and_ends(config: EnvConfig) -> None:
    cluster = connect(make_config({**vars(config), "cluster": "local"}))
    assert isinstance(cluster, LocalCluster)
    assert play(cluster, SOLVE, "submit").record.reward == 1.0
    pids = cluster.status()[0].pids
    cluster.shutdown()
    cluster.shutdown()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(NodeError):
        play(cluster)


@sandboxes
def test_a_node_that_does_not_answer_in_time_fails_only_that_rollout(
    config: EnvConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = connect(make_config({**vars(config), "cluster": "local"}))
    try:
        asked = request(small_task())
        cluster.open(asked)
        with monkeypatch.context() as patch:
            patch.setattr("skyrl_minisandbox.placement.MARGIN", -1e4)
            with pytest.raises(NodeError, match="did not answer"):
                cluster.step(asked.rollout_id, "sleep 600")
        with pytest.raises(NodeError, match="is not open"):
            cluster.step(asked.rollout_id, "true")
        assert play(cluster, SOLVE, "submit").record.reward == 1.0
    finally:
        cluster.shutdown()


# -- gradings wait ----------------------------------------------------------------------------------


class Watched:
    """A node whose gradings are counted."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self.under_way = self.most = self.all = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def judge(self, rollout_id: str) -> Future[Any]:
        with self._lock:
            self.under_way += 1
            self.all += 1
            self.most = max(self.most, self.under_way)
        future: Future[Any] = self._node.judge(rollout_id)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self.under_way -= 1


@pytest.fixture
def watched(config: EnvConfig) -> Iterator[tuple[LocalCluster, Watched]]:
    """One grading at a time."""
    found = LocalCluster(make_config({**vars(config), "cluster": "local", "training": {"grading": 1}}))
    node = Watched(found._places[0].handle)
    found._places[0].handle = node
    yield found, node
    found.shutdown()


def solved(cluster: LocalCluster, **changes: Any) -> Any:
    asked = request(small_task(), **changes)
    cluster.open(asked)
    cluster.step(asked.rollout_id, SOLVE)
    return asked


@sandboxes
@pytest.mark.ci
def test_rollouts_that_end_together_are_graded_one_after_the_other(watched: tuple[LocalCluster, Watched]) -> None:
    cluster, node = watched
    asked = [solved(cluster) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        ends: list[Future[Any]] = [threads.submit(cluster.step, each.rollout_id, "submit") for each in asked[:3]]
        ends += [threads.submit(cluster.close, each.rollout_id, grade=True) for each in asked[3:]]
        turns = [end.result(60) for end in ends]
    assert [turn.finished.record.reward for turn in turns] == [1.0] * 6
    assert (node.all, node.most) == (6, 1)
    assert cluster._rollouts == {} and cluster._places[0].rollouts == set()


@sandboxes
@pytest.mark.ci
def test_waiting_for_a_grade_counts_against_no_deadline(
    watched: tuple[LocalCluster, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, _ = watched
    asked = solved(cluster, bounds=RolloutConfig(step=30.0))
    whole = asked.bounds.step + asked.stopping_seconds
    monkeypatch.setattr("skyrl_minisandbox.placement.MARGIN", 4.0 - whole)  # the step has 4 s
    assert asked.judging_seconds + 4.0 - whole > 15
    with ThreadPoolExecutor(1) as threads:
        with cluster._gradings.turn("another", 1):
            end = threads.submit(cluster.step, asked.rollout_id, "submit")
            with pytest.raises(TimeoutError):
                end.result(5)
        assert end.result(60).finished.record.reward == 1.0  # type: ignore[union-attr]


@sandboxes
@pytest.mark.ci
@pytest.mark.parametrize("ending", ["given up", "shut down"])
def test_one_that_waits_for_a_grade_hears_at_once_that_it_is_over(
    watched: tuple[LocalCluster, Watched], ending: str
) -> None:
    cluster, node = watched
    asked = solved(cluster)
    with ThreadPoolExecutor(1) as threads, cluster._gradings.turn("another", 1):
        end = threads.submit(cluster.step, asked.rollout_id, "submit")
        deadline = time.monotonic() + 60
        while not len(cluster._gradings):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if ending == "given up":
            assert cluster.close(asked.rollout_id, grade=False) is None
        else:
            cluster.shutdown()
        with pytest.raises(NodeError, match=ending):
            end.result(60)
    assert node.all == 0
    if ending == "given up":
        assert play(cluster, SOLVE, "submit").record.reward == 1.0


@pytest.mark.parametrize(
    ("training", "many"), [({"grading": 5}, 5), ({"running": 9}, 4), ({}, 6)], ids=["as said", "of running", "of slots"]
)
def test_half_of_what_runs_is_graded_at_once_unless_it_is_said(training: dict[str, int], many: int) -> None:
    class Places(LocalCluster):
        def __init__(self) -> None:
            Cluster.__init__(self, make_config({"training": training}))
            self._places = [place("a", 8), place("b", 4), place("c", 64)]
            self._places[2].alive = False

    assert Places()._gradings_at_once() == many
