"""A worker's table of rollouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.worker import Worker, WorkerSetup
from tests.small import SOLVE, build_small_image, request, small_task
from tests.support import needs, seconds

pytestmark = needs("userns", "overlay", "git")


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def worker(store_directory: Path, cache_directory: Path, notices: list[str]) -> Worker:
    build_small_image(store_directory, cache_directory)
    return Worker(WorkerSetup("here", str(store_directory), str(cache_directory)), notices.append)


def test_a_finished_rollout_is_forgotten(worker: Worker, notices: list[str]) -> None:
    asked = request(small_task())
    worker.open(asked)
    with pytest.raises(NodeError, match="is open already"):
        worker.open(asked)
    worker.step(asked.rollout_id, SOLVE)
    assert worker.step(asked.rollout_id, "submit").ungraded
    assert worker.judge(asked.rollout_id).done
    with pytest.raises(NodeError, match="is not open"):
        worker.judge(asked.rollout_id)
    assert worker.close(asked.rollout_id, False, EndedBy.LENGTH) is None
    with pytest.raises(NodeError, match="is not open"):
        worker.step(asked.rollout_id, "true")
    assert notices == []


def test_one_that_waits_for_its_grade_holds_no_sandbox_and_can_still_be_given_up(worker: Worker) -> None:
    asked = [request(small_task()) for _ in range(2)]
    for each in asked:
        worker.open(each)
        worker.step(each.rollout_id, SOLVE)
    inits = [worker._rollouts[each.rollout_id]._sandbox.pid for each in asked]  # type: ignore[union-attr]
    assert worker.step(asked[0].rollout_id, "submit").ungraded
    turn = worker.close(asked[1].rollout_id, True, EndedBy.LENGTH)
    assert turn is not None and turn.ungraded
    assert not [pid for pid in inits if Path(f"/proc/{pid}").exists()]
    assert worker.close(asked[0].rollout_id, False, EndedBy.LENGTH) is None
    with pytest.raises(NodeError, match="is not open"):
        worker.judge(asked[0].rollout_id)
    finished = worker.judge(asked[1].rollout_id).finished
    assert finished is not None
    assert (finished.record.reward, finished.record.ended_by) == (1.0, EndedBy.LENGTH)
    assert worker._rollouts == {} and worker._places()[1].pinned() == frozenset()


def test_a_stuck_scaffold_is_told_before_its_grade(
    worker: Worker, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skyrl_minisandbox.rollout.CANCELLATION", 0.2)
    asked = request(small_task(), options={"deaf": 3.0})
    worker.open(asked)
    worker.step(asked.rollout_id, SOLVE)
    turn = worker.close(asked.rollout_id, True, EndedBy.LENGTH)
    assert turn is not None and turn.ungraded
    assert notices == ["stuck"]
    assert worker.judge(asked.rollout_id).finished.record.reward == 1.0  # type: ignore[union-attr]


def test_a_fault_of_our_own_code_leaves_no_sandbox(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(small_task())
    worker.open(asked)
    rollout = worker._rollouts[asked.rollout_id]
    init = rollout._sandbox.pid  # type: ignore[union-attr]

    def fault(self: Rollout, text: str) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(Rollout, "step", fault)
    with pytest.raises(KeyError):
        worker.step(asked.rollout_id, "true")
    assert not Path(f"/proc/{init}").exists()
    assert worker._rollouts == {}


def test_a_pool_gives_its_rollouts_ready_sandboxes_and_ends_with_its_worker(worker: Worker) -> None:
    first, second = (dataclasses.replace(request(small_task()), pool=2) for _ in range(2))
    worker.open(first)
    ((pool, _),) = worker._places()[2]._pools.values()
    assert pool.wait_full(seconds(30))
    waiting = [sandbox.pid for sandbox in pool._ready]
    worker.open(second)
    assert worker._rollouts[second.rollout_id]._sandbox.pid in waiting  # type: ignore[union-attr]
    worker.step(second.rollout_id, SOLVE)
    worker.step(second.rollout_id, "submit")
    finished = worker.judge(second.rollout_id).finished
    assert finished is not None and finished.record.reward == 1.0  # graded in ready ones too
    assert pool.wait_full(seconds(30))
    waiting = [sandbox.pid for sandbox in pool._ready]
    worker.end()
    assert not [pid for pid in waiting if Path(f"/proc/{pid}").exists()]


def test_an_upper_on_disk_lies_in_the_cache_and_goes_with_the_rollout(worker: Worker) -> None:
    asked = dataclasses.replace(request(small_task()), on_disk=True)
    worker.open(asked)
    worker.step(asked.rollout_id, "echo x > mark-of-the-upper")
    scratch = worker._places()[1].scratch()
    assert list(scratch.rglob("mark-of-the-upper"))
    worker.step(asked.rollout_id, SOLVE)
    worker.step(asked.rollout_id, "submit")
    assert worker.judge(asked.rollout_id).finished.record.reward == 1.0  # type: ignore[union-attr]
    assert not list(scratch.iterdir())


def test_the_end_gives_up_what_is_open(worker: Worker) -> None:
    asked = request(small_task())
    worker.open(asked)
    init = worker._rollouts[asked.rollout_id]._sandbox.pid  # type: ignore[union-attr]
    worker.end()
    assert not Path(f"/proc/{init}").exists()
    with pytest.raises(NodeError, match="ending"):
        worker.open(request(small_task()))
