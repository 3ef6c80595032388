"""A worker's table of rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.worker import Worker, WorkerSetup
from tests.small import SOLVE, build_small_image, request, small_task
from tests.support import needs

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
    assert worker.step(asked.rollout_id, "submit").done
    assert worker.close(asked.rollout_id, False, EndedBy.LENGTH) is None
    with pytest.raises(NodeError, match="is not open"):
        worker.step(asked.rollout_id, "true")
    assert notices == []


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


def test_the_end_gives_up_what_is_open(worker: Worker) -> None:
    asked = request(small_task())
    worker.open(asked)
    init = worker._rollouts[asked.rollout_id]._sandbox.pid  # type: ignore[union-attr]
    worker.end()
    assert not Path(f"/proc/{init}").exists()
    with pytest.raises(NodeError, match="ending"):
        worker.open(request(small_task()))
