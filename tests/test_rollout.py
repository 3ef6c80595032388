"""One episode in this process: how it ends, and what each end is worth."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox import rollout as rollout_module
from skyrl_minisandbox.alarms import ALARMS
from skyrl_minisandbox.config import RewardConfig, RolloutConfig, ScaffoldConfig
from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.turn import Finished, Turn
from tests.small import GOLD, SOLVE, AtOnce, build_small_image, request, small_task
from tests.support import needs, seconds

pytestmark = needs("userns", "overlay", "git")


@dataclasses.dataclass
class Machine:
    store: Store
    cache: Cache
    made: list[Rollout] = dataclasses.field(default_factory=list)

    def rollout(self, task_id: str = "small-1", **changes: Any) -> Rollout:
        made = AtOnce(request(small_task(task_id), **changes), store=self.store, cache=self.cache, node="here")
        self.made.append(made)
        return made


@pytest.fixture
def machine(store_directory: Path, cache_directory: Path) -> Iterator[Machine]:
    build_small_image(store_directory, cache_directory)
    found = Machine(Store(store_directory), Cache(cache_directory))
    yield found
    for rollout in found.made:
        rollout.abort()


def play(rollout: Rollout, *texts: str) -> Finished:
    turn = rollout.open()
    for text in texts:
        assert not turn.done, turn
        turn = rollout.step(text)
    assert turn.finished is not None
    return turn.finished


def verdict(record: RolloutRecord) -> tuple[str, str, float | None]:
    return record.outcome.value, record.ended_by.value, record.reward


def test_a_solved_task_has_reward_1(machine: Machine) -> None:
    rollout = machine.rollout()
    turn = rollout.open()
    assert [m["role"] for m in turn.messages] == ["system", "user"]
    turn = rollout.step("cat answer.sh")
    assert turn.messages == [{"role": "user", "content": "exit code 0\necho wrong\n"}]
    rollout.step(SOLVE)
    turn = rollout.step("submit")
    assert turn.finished is not None
    record = turn.finished.record
    assert verdict(record) == ("resolved", "submit", 1.0)
    assert record.turns == 3
    assert record.node == "here"
    assert turn.finished.tests == {"check.sh::answer": "PASSED", "check.sh::other": "PASSED"}
    assert "+echo right" in turn.finished.patch
    assert all(value > 0 for value in vars(record.seconds).values())
    assert RolloutRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_what_is_too_large_for_a_patch_is_told_and_does_not_cost_the_fix(machine: Machine) -> None:
    finished = play(machine.rollout(), f"{SOLVE}; truncate -s 40M core", "submit")
    assert verdict(finished.record) == ("resolved", "submit", 1.0)
    assert finished.record.error.startswith("not in the patch: 1 untracked file of 40960 KiB, the largest 'core'")


def test_the_end_is_given_again_however_often_it_is_asked_for(machine: Machine) -> None:
    rollout = machine.rollout()
    finished = play(rollout, "submit")
    assert rollout.step("more").finished is finished
    assert rollout.close(grade=True) == Turn([], finished)
    rollout.abort()
    rollout.abort()


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["submit"], ("empty_patch", "submit", 0.0)),
        (["echo changed > other.txt", "submit"], ("unresolved", "submit", 0.0)),
        ([f"{SOLVE}; rm other.txt", "submit"], ("unresolved", "submit", 0.0)),
    ],
)
def test_what_does_not_solve_has_reward_0(machine: Machine, texts: list[str], expected: Any) -> None:
    assert verdict(play(machine.rollout(), *texts).record) == expected


@pytest.mark.parametrize(("scaffold", "expected"), [("gold", ("resolved", 1.0)), ("empty", ("empty_patch", 0.0))])
def test_a_scaffold_that_never_asks_ends_at_the_first_step(
    machine: Machine, scaffold: str, expected: tuple[str, float]
) -> None:
    rollout = machine.rollout(scaffold=ScaffoldConfig(scaffold))
    assert rollout.open() == Turn([])
    record = rollout.step("whatever").finished.record  # type: ignore[union-attr]
    assert (record.outcome.value, record.reward) == expected
    assert record.turns == 0


def test_the_turn_limit_ends_in_a_grade(machine: Machine) -> None:
    finished = play(machine.rollout(max_turns=2), "true", SOLVE)
    assert verdict(finished.record) == ("resolved", "turn_limit", 1.0)
    assert finished.record.turns == 2


def test_a_step_that_takes_too_long_ends_in_a_grade(machine: Machine) -> None:
    rollout = machine.rollout(bounds=RolloutConfig(step=0.5), options={"command_timeout": 600.0})
    started = time.monotonic()
    finished = play(rollout, SOLVE, "sleep 600")
    assert verdict(finished.record) == ("resolved", "time", 1.0)
    assert time.monotonic() - started < 300
    assert not rollout.stuck


def test_all_steps_together_have_a_limit(machine: Machine) -> None:
    rollout = machine.rollout(bounds=RolloutConfig(time=0.5))
    finished = play(rollout, f"{SOLVE}; sleep 0.3", "sleep 0.4")
    assert verdict(finished.record) == ("resolved", "time", 1.0)


def test_waiting_for_the_model_does_not_count_as_the_agents_time(machine: Machine) -> None:
    rollout = machine.rollout(bounds=RolloutConfig(time=5.0))
    rollout.open()
    time.sleep(0.5)
    rollout.step("true")
    finished = rollout.step("submit").finished
    assert finished is not None
    assert finished.record.seconds.agent < 0.5


def test_a_rollout_that_nobody_answers_gives_back_what_it_holds(machine: Machine) -> None:
    rollout = machine.rollout(bounds=RolloutConfig(idle=0.3))
    rollout.open()
    init = rollout._sandbox.pid  # type: ignore[union-attr]
    assert rollout._policy.wait_ended(30)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{init}").exists() or machine.cache._held:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    finished = rollout.step("true").finished
    assert finished is not None
    assert verdict(finished.record) == ("infra_error", "error", None)


def test_closing_early_grades_when_asked_to(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    rollout.step(SOLVE)
    turn = rollout.close(grade=True)
    assert turn is not None and turn.finished is not None
    assert verdict(turn.finished.record) == ("resolved", "length", 1.0)


def test_closing_early_does_not_take_a_submission_for_a_full_context(machine: Machine) -> None:
    rollout = machine.rollout(scaffold=ScaffoldConfig("gold"))
    rollout.open()
    turn = rollout.close(grade=True)
    assert turn is not None and turn.finished is not None
    assert verdict(turn.finished.record) == ("resolved", "submit", 1.0)


def test_closing_without_a_grade_leaves_nothing_and_no_number(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    init = rollout._sandbox.pid  # type: ignore[union-attr]
    assert Path(f"/proc/{init}").exists()
    assert rollout.close(grade=False) is None
    assert not Path(f"/proc/{init}").exists()
    assert machine.cache._held == {}


def test_nothing_is_held_after_the_end(machine: Machine) -> None:
    rollout = machine.rollout()
    play(rollout, SOLVE, "submit")
    assert machine.cache._held == {}
    assert rollout._held._sandboxes == []


def test_what_waits_for_its_grade_gives_the_same_end_until_it_is_graded(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    Rollout.step(rollout, SOLVE)
    waits = Turn([], ungraded=True)
    assert Rollout.step(rollout, "submit") == waits and not waits.done
    assert Rollout.step(rollout, "more") == waits
    assert Rollout.close(rollout, grade=True) == waits
    assert rollout._held._sandboxes == []
    turn = rollout.judge()
    assert turn.finished is not None
    assert verdict(turn.finished.record) == ("resolved", "submit", 1.0)
    assert rollout.judge() is turn and machine.cache._held == {}


def test_what_waits_for_its_grade_and_is_given_up_is_never_a_number(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    Rollout.step(rollout, SOLVE)
    assert Rollout.step(rollout, "submit").ungraded
    assert rollout.close(grade=False) is None
    assert machine.cache._held == {}
    turn = rollout.judge()
    assert turn.finished is not None
    assert verdict(turn.finished.record) == ("infra_error", "error", None)


def test_what_runs_cannot_be_graded(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    with pytest.raises(NodeError, match="has not ended"):
        rollout.judge()


def test_abort_ends_a_step_that_runs(machine: Machine) -> None:
    rollout = machine.rollout(options={"command_timeout": 600.0})
    rollout.open()
    ended: list[Turn] = []
    thread = threading.Thread(target=lambda: ended.append(rollout.step("sleep 600")))
    thread.start()
    time.sleep(0.2)
    rollout.abort()
    thread.join(30)
    assert ended[0].finished is not None
    assert ended[0].finished.record.reward is None


def test_a_scaffold_that_fails_after_an_answer_is_scored(machine: Machine) -> None:
    finished = play(machine.rollout(options={"fail": 2}), SOLVE)
    assert verdict(finished.record) == ("resolved", "error", 1.0)
    assert finished.record.error == "ValueError: a fault of the scaffold"


def test_a_scaffold_that_fails_before_any_answer_is_ours(machine: Machine) -> None:
    finished = play(machine.rollout(options={"fail": 1}))
    assert verdict(finished.record) == ("infra_error", "error", None)
    assert finished.record.error == "ValueError: a fault of the scaffold"


def test_killing_everything_inside_is_a_result_and_the_rollout_goes_on(machine: Machine) -> None:
    finished = play(machine.rollout(), "kill -9 -1", SOLVE, "submit")
    assert verdict(finished.record) == ("resolved", "submit", 1.0)


def test_a_dead_sandbox_on_a_healthy_node_is_the_agents(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    os.kill(rollout._sandbox.pid, signal.SIGKILL)  # type: ignore[union-attr]
    finished = rollout.step("true").finished
    assert finished is not None
    assert verdict(finished.record) == ("agent_error", "error", 0.0)


def test_a_dead_launcher_is_ours(machine: Machine) -> None:
    rollout = machine.rollout()
    rollout.open()
    os.kill(rollout._held.launcher.pid, signal.SIGKILL)  # type: ignore[union-attr]
    finished = rollout.step("sleep 600").finished  # its init may take a moment to notice
    assert finished is not None
    assert verdict(finished.record) == ("infra_error", "error", None)


def test_an_image_that_is_not_there_is_ours_and_names_the_way_out(machine: Machine, tmp_path: Path) -> None:
    machine.store = Store(tmp_path / "store")
    finished = play(machine.rollout())
    assert finished.record.outcome is Outcome.INFRA_ERROR
    assert "small-1" in finished.record.error
    assert "minisandbox image build tasks.ids=[small-1]" in finished.record.error


@pytest.mark.parametrize(("name", "word"), [("Rewriting", "history"), ("Networked", "network")])
def test_a_scaffold_that_cannot_be_turned_inside_out_is_refused(machine: Machine, name: str, word: str) -> None:
    finished = play(machine.rollout(scaffold=ScaffoldConfig(f"tests.small.{name}")))
    assert finished.record.outcome is Outcome.INFRA_ERROR
    assert f"tests.small.{name}" in finished.record.error
    assert word in finished.record.error


def test_a_scaffold_that_ignores_its_end_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "CANCELLATION", 0.2)
    rollout = machine.rollout(options={"deaf": 3.0})
    rollout.open()
    rollout.step(SOLVE)
    turn = rollout.close(grade=True)
    assert turn is not None and turn.finished is not None
    assert turn.finished.record.outcome is Outcome.RESOLVED
    assert rollout.stuck


def broken_reward(report: Any) -> float:
    return float("nan")


def test_a_reward_that_is_no_number_is_never_written(machine: Machine) -> None:
    finished = play(machine.rollout(reward=RewardConfig("tests.test_rollout.broken_reward")), SOLVE, "submit")
    assert finished.record.reward is None
    assert finished.record.outcome is Outcome.INFRA_ERROR
    assert "broken_reward" in finished.record.error


def test_a_reward_gets_its_options_and_what_it_needs(machine: Machine) -> None:
    reward = RewardConfig("shaped", {"applies": 1, "compiles": 2, "tests": 1})
    worth = [
        play(machine.rollout(reward=reward), command, "submit").record.reward
        for command in ("echo 'x = 1' > new.py", "echo 'x = = 1' > new.py", f"{SOLVE}; rm other.txt", SOLVE)
    ]
    assert worth == [pytest.approx(3 / 4), pytest.approx(1 / 4), pytest.approx(1 / 4 + 1 / 8), 1.0]


def test_the_agent_and_the_trajectory_see_no_solution_and_no_hidden_test(machine: Machine) -> None:
    finished = play(machine.rollout(), "cat answer.sh; grep -rs 'short test summary' /srv /tmp", SOLVE, "submit")
    text = json.dumps(finished.trajectory)
    assert "short test summary info" not in text
    assert json.dumps(GOLD)[1:-1] not in text


def test_the_ending_of_the_agent_stands_beside_the_grade(machine: Machine) -> None:
    finished = play(machine.rollout(max_turns=1), "true")
    assert finished.record.outcome is Outcome.EMPTY_PATCH
    assert finished.record.ended_by is EndedBy.TURN_LIMIT


def test_a_cache_that_is_damaged_below_the_top_is_ours_and_mended(tmp_path: Path, store_directory: Path) -> None:
    build_small_image(store_directory, tmp_path / "cache")
    here = Machine(Store(store_directory), Cache(tmp_path / "cache"))
    assert play(here.rollout(), SOLVE, "submit").record.outcome is Outcome.RESOLVED
    (head,) = (tmp_path / "cache/l").rglob(".git/HEAD")
    head.unlink()
    rollout = here.rollout()
    rollout.open()
    rollout.step(SOLVE)
    turn = rollout.step("submit")
    assert turn.finished is not None
    assert verdict(turn.finished.record) == ("infra_error", "error", None)
    assert "damaged" in turn.finished.record.error
    assert play(here.rollout(), SOLVE, "submit").record.outcome is Outcome.RESOLVED


class Begun:
    """A rollout whose texts are handed over without waiting for what comes of them."""

    def __init__(self, machine: Machine, **changes: Any) -> None:
        self.rollout = Rollout(
            request(small_task(), **changes), store=machine.store, cache=machine.cache, node="here"
        )
        machine.made.append(self.rollout)
        self.rollout.open()
        self.replies: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def begin(self, text: str) -> bool:
        return self.rollout.begin(text, self.replies.put)

    def reply(self) -> Any:
        """What came of the last one, once."""
        found = self.replies.get(timeout=seconds(60))
        assert self.replies.empty()
        return found


def test_a_step_can_be_begun_without_waiting_for_it(machine: Machine) -> None:
    one = Begun(machine)
    assert one.begin("sleep 0.3; cat answer.sh")
    assert one.replies.empty()
    assert not one.begin("too early") and one.replies.empty()
    assert one.reply() == Turn([{"role": "user", "content": "exit code 0\necho wrong\n"}])
    assert one.begin(SOLVE)
    assert isinstance(one.reply(), Turn)
    assert one.begin("submit")
    assert one.reply()() == Turn([], ungraded=True)
    assert not one.begin("more") and one.rollout.step("more").ungraded
    finished = one.rollout.judge().finished
    assert finished is not None and verdict(finished.record) == ("resolved", "submit", 1.0)
    said = [m["content"] for m in finished.trajectory["messages"] if m["role"] == "assistant"]
    assert said == ["sleep 0.3; cat answer.sh", SOLVE, "submit"]
    assert not ALARMS._set


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bounds": RolloutConfig(step=0.5)}, "time"),
        ({"bounds": RolloutConfig(time=0.5)}, "time"),
        ({"max_turns": 1}, "turn_limit"),
    ],
)
def test_one_that_was_begun_has_the_same_limits(machine: Machine, changes: dict[str, Any], expected: str) -> None:
    one = Begun(machine, **changes)
    began = time.monotonic()
    assert one.begin("sleep 30" if expected == "time" else SOLVE)
    assert one.reply()() == Turn([], ungraded=True)
    assert time.monotonic() - began < 15
    finished = one.rollout.judge().finished
    assert finished is not None and finished.record.ended_by.value == expected
    assert one.replies.empty()


def test_one_that_was_begun_and_is_given_up_is_told_and_blocks_nothing(machine: Machine) -> None:
    one = Begun(machine)
    assert one.begin("sleep 30")
    init = one.rollout._sandbox.pid  # type: ignore[union-attr]
    one.rollout.abort()
    assert not Path(f"/proc/{init}").exists()
    finished = one.reply()().finished
    assert finished is not None and finished.record.outcome is Outcome.INFRA_ERROR
    assert one.rollout.close(grade=True).finished is finished  # type: ignore[union-attr]
    assert machine.cache._held == {} and one.replies.empty()


def test_one_whose_scaffold_fails_is_told(machine: Machine) -> None:
    one = Begun(machine, options={"fail": 2})
    assert one.begin(SOLVE)
    assert one.reply()() == Turn([], ungraded=True)
    finished = one.rollout.judge().finished
    assert finished is not None and verdict(finished.record) == ("resolved", "error", 1.0)
