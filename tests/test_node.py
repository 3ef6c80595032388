"""One machine's rollouts: worker processes that can be lost, and nothing left when the owner goes."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import NodeError, WorkerLost
from skyrl_minisandbox.node import Node, NodeSetup
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.turn import Finished
from tests.machine import descendants
from tests.small import SOLVE, build_small_image, request, small_task
from tests.support import REPOSITORY, needs

pytestmark = needs("userns", "overlay", "git")

SECONDS = 60.0


@pytest.fixture
def setup(store_directory: Path, cache_directory: Path, tmp_path: Path) -> NodeSetup:
    build_small_image(store_directory, cache_directory)
    return NodeSetup(
        "here", str(store_directory), str(cache_directory), slots=3, out=str(tmp_path), sys_path=(str(REPOSITORY),)
    )


@pytest.fixture
def node(setup: NodeSetup) -> Iterator[Node]:
    found = Node(setup)
    yield found
    found.shutdown()


def gone(pid: int) -> bool:
    """Wait for a process that is no child of ours to end."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ready, _, _ = select.select([fd], [], [], SECONDS)
    os.close(fd)
    return bool(ready)


def ended(node: Node, rollout_id: str, text: str) -> Finished:
    """A rollout that ends with this answer, graded at once."""
    assert node.step(rollout_id, text).result(SECONDS).ungraded
    finished = node.judge(rollout_id).result(SECONDS).finished
    assert finished is not None
    return finished


def test_a_rollout_goes_through_a_worker_process(node: Node, tmp_path: Path) -> None:
    asked = request(small_task())
    assert [m["role"] for m in node.open(asked).result(SECONDS).messages] == ["system", "user"]
    assert node.status().open == 1
    node.step(asked.rollout_id, SOLVE).result(SECONDS)
    finished = ended(node, asked.rollout_id, "submit")
    assert (finished.record.reward, finished.record.node) == (1.0, "here")
    assert node.status().open == 0
    assert sorted(p.name for p in (tmp_path / "logs" / "here").iterdir()) == ["worker-1.log", "worker-2.log"]


def test_more_rollouts_than_slots_start_at_once(node: Node) -> None:
    asked = [request(small_task(f"small-{n}")) for n in range(5)]
    futures = [node.open(each) for each in asked]
    assert all(future.result(SECONDS).messages for future in futures)
    assert (node.status().open, node.status().slots) == (5, 3)
    ends = [node.close(each.rollout_id, True, EndedBy.LENGTH) for each in asked]
    assert all(end.result(SECONDS).ungraded for end in ends)  # type: ignore[union-attr]
    assert node.status().open == 5  # until they are graded
    grades = [node.judge(each.rollout_id) for each in asked]
    assert {grade.result(SECONDS).finished.record.task_id for grade in grades} == {f"small-{n}" for n in range(5)}  # type: ignore[union-attr]
    assert node.status().open == 0


def test_each_of_many_gets_its_own_answers_and_a_slow_one_keeps_none_waiting(node: Node) -> None:
    asked = [request(small_task(f"small-{n}")) for n in range(9)]
    for future in [node.open(each) for each in asked]:
        assert future.result(SECONDS).messages
    slow, *others = (each.rollout_id for each in asked)
    waits = node.step(slow, "sleep 600")
    for turn in range(15):
        steps = {rollout: node.step(rollout, f"echo {rollout} {turn}") for rollout in others}
        for rollout, step in steps.items():
            (message,) = step.result(SECONDS).messages
            assert message["content"] == f"exit code 0\n{rollout} {turn}\n"
    assert not waits.done()
    node.close(slow, False).result(SECONDS)
    assert waits.result(SECONDS).finished.record.outcome.value == "infra_error"  # type: ignore[union-attr]
    assert ended(node, others[0], "submit").record.ended_by.value == "submit"


def test_a_worker_that_reads_what_is_no_request_ends_and_loses_only_its_rollouts(node: Node) -> None:
    first, second = request(small_task("small-1")), request(small_task("small-2"))
    for future in [node.open(each) for each in (first, second)]:
        assert future.result(SECONDS).messages
    waiting = node.step(first.rollout_id, "sleep 600")
    worker = node._leases[first.rollout_id]
    worker._socket.sendall(b"no pickle\n")
    assert waiting.result(SECONDS).finished.record.outcome.value == "infra_error"  # type: ignore[union-attr]
    assert gone(worker.pid)
    assert "cannot be read or begun" in worker._log.read_text()
    assert node.step(second.rollout_id, "true").result(SECONDS).messages


def test_ready_sandboxes_go_with_the_node(setup: NodeSetup) -> None:
    node = Node(setup)
    asked = [dataclasses.replace(request(small_task(f"small-{n}")), pool=2) for n in range(4)]
    for future in [node.open(each) for each in asked]:
        assert future.result(SECONDS).messages
    for each in asked:
        node.step(each.rollout_id, SOLVE).result(SECONDS)
        assert ended(node, each.rollout_id, "submit").record.reward == 1.0
    below = [process.pid for pid in node.status().pids for process in descendants(pid)]
    assert below
    node.shutdown()
    assert all(gone(pid) for pid in below)


def test_a_rollout_that_is_given_up_is_gone(node: Node) -> None:
    asked = request(small_task())
    node.open(asked).result(SECONDS)
    assert node.close(asked.rollout_id, False).result(SECONDS) is None
    assert node.close(asked.rollout_id, False).result(SECONDS) is None
    with pytest.raises(NodeError, match="is not open"):
        node.step(asked.rollout_id, "true")


def test_a_killed_worker_loses_its_rollouts_and_no_others_and_is_replaced(node: Node) -> None:
    first, second = request(small_task("small-1")), request(small_task("small-2"))
    node.open(first).result(SECONDS)
    node.open(second).result(SECONDS)
    victim = node._leases[first.rollout_id]
    assert victim is not node._leases[second.rollout_id]
    waiting = node.step(first.rollout_id, "sleep 600")
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(NodeError) as raised:
        waiting.result(SECONDS)
    assert str(victim.pid) in raised.value.message
    assert "SIGKILL" in raised.value.message
    assert "worker-1.log" in raised.value.message
    with pytest.raises(NodeError, match="is not open"):
        node.step(first.rollout_id, "true")
    assert node.step(second.rollout_id, SOLVE).result(SECONDS).messages
    assert ended(node, second.rollout_id, "submit").record.reward == 1.0
    status = node.status()
    assert (status.lost_workers, len(status.pids), victim.pid in status.pids) == (1, 2, False)
    third = request(small_task("small-3"))
    assert node.open(third).result(SECONDS).messages


def test_a_worker_that_is_killed_while_its_rollouts_wait_for_a_grade_loses_them(node: Node) -> None:
    asked = request(small_task())
    node.open(asked).result(SECONDS)
    node.step(asked.rollout_id, SOLVE).result(SECONDS)
    assert node.step(asked.rollout_id, "submit").result(SECONDS).ungraded
    worker = node._leases[asked.rollout_id]
    os.kill(worker.pid, signal.SIGKILL)
    assert gone(worker.pid)
    with pytest.raises(WorkerLost, match="SIGKILL"):  # whether its end is known by now or not
        node.judge(asked.rollout_id).result(SECONDS)
    assert node.status().open == 0
    with pytest.raises(NodeError, match="is not open"):
        node.judge(asked.rollout_id)


@pytest.mark.ci
def test_a_stuck_scaffold_costs_its_worker_and_not_the_rollouts_beside_it(node: Node) -> None:
    deaf = request(small_task("small-1"), options={"deaf": 600.0})
    node.open(deaf).result(SECONDS)
    worker = node._leases[deaf.rollout_id]
    others = [request(small_task(f"small-{n}")) for n in (2, 3)]
    for each in others:
        node.open(each).result(SECONDS)
    beside = next(each for each in others if node._leases[each.rollout_id] is worker)
    end = node.close(deaf.rollout_id, True, EndedBy.LENGTH).result(SECONDS)
    assert end is not None and end.ungraded
    assert node.judge(deaf.rollout_id).result(SECONDS).done
    assert worker.pid in node.status().pids  # it drains
    assert len(node.status().pids) == 3
    node.step(beside.rollout_id, SOLVE).result(SECONDS)
    assert ended(node, beside.rollout_id, "submit").record.reward == 1.0
    assert gone(worker.pid)
    assert worker.pid not in node.status().pids


def test_a_shutdown_ends_every_process(setup: NodeSetup) -> None:
    node = Node(setup)
    asked = request(small_task())
    node.open(asked).result(SECONDS)
    waiting = node.step(asked.rollout_id, "sleep 600")
    below = [process.pid for pid in node.status().pids for process in (*descendants(pid),)]
    assert below
    node.shutdown()
    node.shutdown()
    assert all(gone(pid) for pid in below)
    with pytest.raises(NodeError):
        node.open(request(small_task()))
    assert waiting.exception(SECONDS) is not None or waiting.result().done


_OWNER = """
import sys, time
from skyrl_minisandbox.node import Node, NodeSetup
from tests.small import request, small_task
node = Node(NodeSetup("here", sys.argv[1], sys.argv[2], out=sys.argv[3], sys_path=(sys.argv[4],)))
for number in (1, 2):
    asked = request(small_task(f"small-{number}"))
    node.open(asked).result(60)
    node.step(asked.rollout_id, "sleep 600")
time.sleep(0.5)
print("open", flush=True)
sys.stdin.read()
"""


def test_kill_minus_9_of_the_owner_takes_workers_launchers_and_sandboxes_along(setup: NodeSetup) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, setup.store, setup.cache, setup.out, str(REPOSITORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "open\n"
    below = descendants(owner.pid)
    assert len(below) >= 2 + 2 + 2 + 2  # workers, launchers, inits, sleeps
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + SECONDS
    assert all(gone(process.pid) for process in below)
    assert time.monotonic() < deadline
