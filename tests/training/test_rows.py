"""Rows that could not be trained on keep their place and bias nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest

from skyrl_minisandbox.record import EndedBy, Outcome
from skyrl_minisandbox.training import rows as rows_module
from skyrl_minisandbox.training.rows import (
    INFRA_ERROR,
    PROMPT_TOO_LONG,
    Row,
    cut_observation,
    fill_side_channels,
    metrics,
    problem,
    settle,
    spans,
    with_reward,
)


def output(*rewards: float, whole: bool = False) -> dict[str, Any]:
    """Three tokens a row, the reward on the last."""
    return {
        "rewards": [float(r) if whole else [0.0, 0.0, float(r)] for r in rewards],
        "loss_masks": [[1, 0, 1] for _ in rewards],
        "is_last_step": None,
    }


def settled(out: dict[str, Any], rows: list[Row], policy: str = "mask_group", evaluating: bool = False) -> Any:
    return settle(out, rows, spans(out, None, len(rows)), policy=policy, evaluating=evaluating)


def failed(group: str, cause: str = INFRA_ERROR) -> Row:
    return Row(group, cause=cause, outcome=Outcome.INFRA_ERROR if cause == INFRA_ERROR else None)


def sums(out: dict[str, Any]) -> list[float]:
    return [sum(reward) if isinstance(reward, list) else reward for reward in out["rewards"]]


def trained(out: dict[str, Any]) -> list[bool]:
    return [any(mask) for mask in out["loss_masks"]]


@pytest.mark.parametrize("whole", [False, True])
def test_a_failed_row_masks_its_group_and_no_mean_moves(whole: bool) -> None:
    out = output(1, 0, 0, 1, 0, whole=whole)
    dropped = settled(out, [Row("a"), Row("a"), failed("a"), Row("b"), Row("b")])
    assert sums(out) == [0.5, 0.5, 0.5, 1.0, 0.0]
    assert trained(out) == [False, False, False, True, True]
    assert dropped == {INFRA_ERROR: 1, PROMPT_TOO_LONG: 0}
    if not whole:
        assert out["rewards"][0] == [0.0, 0.0, 0.5]  # on the last token, which pass@n looks at


@pytest.mark.parametrize("live", [3, 5, 6, 7, 11, 13])
def test_the_spread_of_a_masked_group_is_exactly_nothing(live: int) -> None:
    numpy = pytest.importorskip("numpy")  # as SkyRL's filter computes it
    out = output(*[0.1 * number for number in range(live)], 0)
    settled(out, [Row("a") for _ in range(live)] + [failed("a")])
    assert float(numpy.std(sums(out))) == 0.0
    assert sums(out)[0] == pytest.approx(statistics.mean(0.1 * number for number in range(live)), abs=1e-6)


def test_the_other_policy_masks_the_row_alone_at_the_mean_of_the_others() -> None:
    out = output(1, 0, 0, 1)
    rows = [Row("a"), Row("a"), failed("a"), Row("a")]
    assert settled(out, rows, "mean") == {INFRA_ERROR: 0, PROMPT_TOO_LONG: 0}
    assert sums(out) == [1.0, 0.0, pytest.approx(2 / 3), 1.0]
    assert trained(out) == [True, True, False, True]
    assert [row.masked for row in rows] == [False, False, True, False]


def test_equal_rewards_stay_exactly_equal() -> None:
    out = output(0.3, 0.3, 0.3, 0)
    settled(out, [Row("a"), Row("a"), Row("a"), failed("a")], "mean")
    assert sums(out) == [0.3] * 4


@pytest.mark.parametrize("policy", ["mask_group", "mean"])
def test_a_group_without_a_live_row_is_dropped_under_either_policy(policy: str) -> None:
    out = output(0, 0, 1)
    assert settled(out, [failed("a"), failed("a"), Row("b")], policy)[INFRA_ERROR] == 1
    assert sums(out) == [0.0, 0.0, 1.0]
    assert trained(out) == [False, False, True]


def test_a_dropped_group_is_counted_under_one_cause() -> None:
    out = output(0, 0, 0, 0)
    rows = [failed("a", PROMPT_TOO_LONG), failed("a"), failed("b", PROMPT_TOO_LONG), failed("b", PROMPT_TOO_LONG)]
    assert settled(out, rows) == {INFRA_ERROR: 1, PROMPT_TOO_LONG: 1}


def test_nothing_changes_where_nothing_failed() -> None:
    out = output(1, 0)
    before = repr(out)
    settled(out, [Row("a"), Row("a")])
    assert repr(out) == before


def test_an_evaluation_keeps_its_mean_and_touches_no_other_row() -> None:
    out = output(1, 0, 0, 0, 0, 0)
    rows = [Row("a"), Row("a"), failed("a"), Row("b"), Row("b"), failed("c")]
    settled(out, rows, evaluating=True)
    assert sums(out) == [1.0, 0.0, 0.5, 0.0, 0.0, 0.25]  # of its group, else of all
    assert trained(out) == [True] * 6


def test_in_step_wise_mode_every_turn_of_the_group_is_masked() -> None:
    out = {
        "rewards": [[0.0], [0.0, 1.0], [0.0], [0.0, 0.0], [0.0, 1.0]],
        "loss_masks": [[1], [1, 1], [0], [1, 0], [1, 1]],
        "is_last_step": [False, True, True, False, True],
        "trajectory_ids": ["a", "a", "b", "c", "c"],
    }
    where = spans(out, ["a", "b", "c"], 3)
    assert where == [range(2), range(2, 3), range(3, 5)]
    settle(out, [Row("g"), failed("g"), Row("h")], where, policy="mask_group", evaluating=False)
    assert sums(out) == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert trained(out) == [False, False, False, True, True]


def test_a_row_that_skyrl_dropped_shifts_no_other() -> None:
    out = {"is_last_step": [True, True], "trajectory_ids": ["a", "c"]}
    assert spans(out, ["a", "b", "c"], 3) == [range(1), range(1, 1), range(1, 2)]


def test_a_stub_has_the_side_channels_that_others_have() -> None:
    numpy = pytest.importorskip("numpy")
    routes = numpy.ones((4, 2, 3), dtype=numpy.uint8)
    support = numpy.ones((2, 5), dtype=numpy.int32)
    out = {"rollout_expert_indices": [routes, None], "rollout_sample_support": [None, support]}
    fill_side_channels(out)
    assert (out["rollout_expert_indices"][1] == numpy.zeros((1, 2, 3))).all()
    assert out["rollout_expert_indices"][1].dtype == numpy.uint8
    assert (out["rollout_sample_support"][0] == numpy.full((1, 5), -1)).all()
    assert out["rollout_expert_indices"][0] is routes
    assert out["rollout_sample_support"][1] is support


def test_side_channels_of_0_3_0_are_lists_and_mostly_there_are_none() -> None:
    out: dict[str, Any] = {"rollout_expert_indices": [[[[1, 2], [3, 4]]] * 3, None]}
    fill_side_channels(out)
    assert out["rollout_expert_indices"][1] == [[[0, 0], [0, 0]]]
    none: dict[str, Any] = {"rollout_expert_indices": None, "rollout_sample_support": [None, None]}
    fill_side_channels(none)
    assert none == {"rollout_expert_indices": None, "rollout_sample_support": [None, None]}


def test_figures_of_a_call() -> None:
    out = output(1, 0, 0, 1, 0)
    rows = [
        Row("a", outcome=Outcome.RESOLVED, ended_by=EndedBy.SUBMIT),
        failed("a"),
        Row("b", outcome=Outcome.UNRESOLVED, ended_by=EndedBy.LENGTH, retries=2, waited=4.0),
        Row("b", outcome=Outcome.RESOLVED, ended_by=EndedBy.TIME),
        Row("c", ours=False),
    ]
    dropped = settled(out, rows)
    figures = metrics(rows, out, spans(out, None, 5), dropped)
    assert {name: value for name, value in figures.items() if value} == {
        "minisandbox/masked_mean": 0.5,
        "minisandbox/retries_mean": 0.5,
        "minisandbox/wait_seconds_mean": 1.0,
        "minisandbox/dropped_groups_infra_error_mean": 0.5,
        "minisandbox/outcome_resolved_mean": 0.5,
        "minisandbox/outcome_unresolved_mean": 0.25,
        "minisandbox/outcome_infra_error_mean": 0.25,
        "minisandbox/ended_by_submit_mean": 0.25,
        "minisandbox/ended_by_length_mean": 0.25,
        "minisandbox/ended_by_time_mean": 0.25,
        "minisandbox/reward_unmasked_mean": 0.5,
    }


def test_every_figure_is_one_that_skyrl_merges_as_a_mean() -> None:
    """By the name, in this order: `avg` or `mean`, `min`, `max`, else the sum; and `minisandbox` has a `min`."""
    out = output(1)
    names = metrics([Row("a")], out, spans(out, None, 1), settled(out, [Row("a")]))
    assert len(names) > 15
    assert all("mean" in name for name in names)


def test_without_an_unmasked_row_there_is_no_mean_of_them() -> None:
    out = output(0)
    rows = [failed("a")]
    figures = metrics(rows, out, spans(out, None, 1), settled(out, rows))
    assert "minisandbox/reward_unmasked_mean" not in figures


@dataclass
class Entry:
    """As SkyRL's TrajectoryOutput."""

    response_ids: Any = field(default_factory=lambda: [1, 2, 3, 4])
    loss_mask: Any = field(default_factory=lambda: [1, 1, 0, 0])
    rollout_logprobs: Any = field(default_factory=lambda: [-0.5, -0.5, 0.0, 0.0])
    reward: Any = field(default_factory=lambda: [0.0] * 4)
    env_metrics: Any = field(default_factory=dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"reward": 1.0}, ""),
        ({"rollout_logprobs": None}, ""),
        ({"response_ids": []}, "the policy answered nothing"),
        ({"loss_mask": [1]}, "1 of a mask for 4 tokens"),
        ({"rollout_logprobs": [0.0]}, "1 log-probabilities for 4 tokens"),
        ({"reward": [0.0]}, "1 rewards for 4 tokens"),
        ({"reward": float("nan")}, "a reward that is no number: nan"),
        ({"reward": [0.0, 0.0, 0.0, float("inf")]}, "a reward that is no number"),
        ({"reward": None}, "a reward that is no number: None"),
        ({"response_ids": [1, 2, 3, "4"]}, "a token that is no number"),
        ({"env_metrics": None}, "figures that are no numbers: None"),
        ({"env_metrics": {"turns_mean": "many"}}, "figures that are no numbers"),
    ],
)
def test_what_would_fail_the_whole_batch_is_named(changes: dict[str, Any], words: str) -> None:
    found = problem(Entry(**changes))
    assert found.startswith(words) if words else found == ""


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert problem(Entry(response_ids=list(numpy.arange(4)), reward=numpy.float64(1.0))) == ""


def test_an_observation_that_nobody_answers_is_cut_off() -> None:
    entry = Entry()
    cut_observation(entry)
    assert (entry.response_ids, entry.loss_mask) == ([1, 2], [1, 1])
    assert (entry.rollout_logprobs, entry.reward) == ([-0.5, -0.5], [0.0, 0.0])
    assert with_reward(entry.reward, 1.0) == [0.0, 1.0]
    assert with_reward(0.0, 1.0) == 1.0


def test_the_module_needs_nothing_of_skyrl() -> None:
    assert not any(name.split(".")[0] in ("skyrl", "torch", "numpy") for name in vars(rows_module))
