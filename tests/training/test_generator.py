"""Our generator over SkyRL's own, with real rollouts: every row comes back, in its place, with the reward it earned.

One process for all calls of a version (`generated.py`): with a stub of torch in the ci tier, with the real one and
what SkyRL's trainer does with an output in the night.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.skyrl.chatml import END
from tests.skyrl.environment import VERSIONS, skyrl_directory, trainer_python
from tests.small import RECIPE, SOLVE, build_small_image, small_task
from tests.support import REPOSITORY, needs

pytestmark = needs("userns", "overlay", "git", "skyrl_gym", "network")

TASK = small_task().model_dump_json()
NO_IMAGE = small_task("no-image").model_copy(
    update={"recipe": RECIPE.model_copy(update={"commands": ("false",)})}
).model_dump_json()  # fmt: skip
LONG = small_task("long").model_copy(update={"problem_statement": "x" * 2000}).model_dump_json()

RIGHT, WRONG = ["ls", SOLVE, "submit"], ["echo nope > answer.sh", "submit"]


def row(group: str, *tries: list[Any], task: str = TASK, **more: Any) -> dict[str, Any]:
    return {"task": task, "group": group, "tries": tries or (RIGHT,), **more}


MIXED = [row("a"), row("a", WRONG), row("a", task=NO_IMAGE), row("b"), row("b", WRONG), row("c"), row("c")]
STEP_WISE = {"step_wise_trajectories": True}
TEMPLATE = {"source": "name", "name_or_path": "qwen3_with_thinking"}
NEVER = {"max_infra_error_fraction": 1.0}  # the breaker is off
CUT = [row("a", [SOLVE, *["ls"] * 8]), row("a", WRONG)]

CALLS: dict[str, dict[str, Any]] = {
    "mixed": {"rows": MIXED},
    "mean": {"rows": MIXED, "training": {"failed_group_policy": "mean"}},
    "mixed-step-wise": {"rows": MIXED, "options": STEP_WISE},
    "unnamed": {"rows": [row("a"), row("a", task=NO_IMAGE)], "named": False, "training": NEVER},
    "evaluated": {"rows": MIXED, "phase": "eval"},
    "killed": {"rows": [row("a", ["ls", {"do": "kill"}], RIGHT), row("a"), row("b"), row("b", WRONG)]},
    "cut": {"rows": CUT, "options": {"max_input_length": 200}},
    "cut-step-wise": {"rows": CUT, "options": {"max_input_length": 200, **STEP_WISE}},
    "cut-templated": {
        "rows": [*CUT, row("b", task=NO_IMAGE), row("b")],
        "options": {"max_input_length": 200, "chat_template": TEMPLATE},
        "logprobs": None,
    },
    "long": {"rows": [row("a"), row("a", WRONG), row("b", task=LONG)], "options": {"max_input_length": 1000}},
    "long-step-wise": {"rows": [row("a"), row("b", task=LONG)], "options": {"max_input_length": 1000, **STEP_WISE}},
    "engine": {
        "rows": [
            row("a", ["ls", {"do": "raise"}], RIGHT),
            row("a", [{"do": "empty"}], RIGHT),
            row("b", ["ls", {"do": "wrong"}], WRONG),
            row("b", [{"do": "few_logprobs"}]),
            row("b", [{"do": "no_logprobs"}], RIGHT),
        ],
        "training": {**NEVER, "failed_group_policy": "mean"},
    },
    "late": {
        "rows": [row("a", [SOLVE, *["sleep 0.4"] * 8]), row("a", ["ls", {"do": "hang"}]), row("a", WRONG)],
        "training": {**NEVER, "time": 1.5, "failed_group_policy": "mean"},
        "rollout": {"step": 1.0},
        "margin": 1.0,
    },
    "narrow": {
        "rows": [row("a"), row("a"), row("b"), row("b", WRONG), row("c"), row("c", WRONG)],
        "training": {"running": 2, "starting": 1, "grading": 1},
        "max_env_workers": 1,
        "together": 2,
    },
    "other": {"rows": [row("a"), row("a", task=NO_IMAGE), row("p", ["any"], plain="yes")], "training": NEVER},
    "other-raises": {"rows": [row("a", ["ls", {"do": "hang"}]), row("p", ["any"], plain="raise")]},
    "cancelled": {"rows": [row("a", ["ls", {"do": "hang"}]), row("a", ["sleep 30"])], "cancel": 2.0},
    "again": {"rows": [row("a", RIGHT, WRONG), row("a", WRONG)], "training": {"running": 1}, "again": True},
    "batched": {"rows": [row("a")], "options": {"batched": True, "max_turns": 1}},
    "broken": {"rows": [row("a", task=NO_IMAGE), row("a", task=NO_IMAGE)]},
}


@pytest.fixture(scope="module")
def env(store_directory: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    build_small_image(store_directory, cache_directory)
    return {
        "images": {"store": str(store_directory), "cache": str(cache_directory)},
        "scaffold": {"name": "tests.small.Loop"},
        "cluster": {"kind": "local", "slots": 6},
        "out": str(tmp_path_factory.mktemp("run")),
    }


REAL = [pytest.param(f"{version}-torch", marks=pytest.mark.night) for version in VERSIONS]


class Outputs:
    """What each of CALLS put out, in an environment; made at the first use."""

    def __init__(self, env: dict[str, Any]) -> None:
        self._env = env
        self._made: dict[str, dict[str, Any]] = {}

    def of(self, environment: str) -> dict[str, Any]:
        if environment not in self._made:
            self._made[environment] = self._make(*environment.partition("-")[::2])
        return self._made[environment]

    def _make(self, version: str, torch: str) -> dict[str, Any]:
        calls = [
            {**call, "env": {**self._env, "training": call.get("training", {}), "rollout": call.get("rollout", {})}}
            for call in CALLS.values()
        ]
        done = subprocess.run(
            [str(trainer_python(version)) if torch else sys.executable, "-m", "tests.training.generated"],
            input=json.dumps({"path": "" if torch else str(skyrl_directory(version)), "calls": calls}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr[-8000:]
        print(done.stderr)
        return dict(zip(CALLS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def made(env: dict[str, Any]) -> Outputs:
    return Outputs(env)


@pytest.fixture(
    scope="module",
    params=[pytest.param("0.4.0", marks=pytest.mark.ci), pytest.param("0.3.0", marks=pytest.mark.night), *REAL],
)
def outputs(request: pytest.FixtureRequest, made: Outputs) -> dict[str, Any]:
    return made.of(request.param)


@pytest.fixture(scope="module", params=REAL)
def real_outputs(request: pytest.FixtureRequest, made: Outputs) -> dict[str, Any]:
    """With a real torch, so that SkyRL's trainer had them too."""
    return made.of(request.param)


def sums(out: dict[str, Any]) -> list[float]:
    return [sum(reward) if isinstance(reward, list) else reward for reward in out["rewards"]]


def trained(out: dict[str, Any]) -> list[bool]:
    return [any(mask) for mask in out["loss_masks"]]


def figures(out: dict[str, Any]) -> dict[str, float]:
    """Ours that are not 0, without those of time."""
    found = {name.removeprefix("minisandbox/"): value for name, value in out["metrics"].items() if "minis" in name}
    return {name.removesuffix("_mean"): value for name, value in found.items() if value and "seconds" not in name}


def answers(out: dict[str, Any], entry: int) -> str:
    """What the loss is on, decoded. Of the tests' tokenizer a token below 256 is a byte, and END the only other."""
    ids = [token for token, one in zip(out["response_ids"][entry], out["loss_masks"][entry], strict=True) if one]
    return "".join(chr(token) if token < 256 else END for token in ids)


def test_whatever_happens_nothing_is_left_open(outputs: dict[str, Any]) -> None:
    for name, out in outputs.items():
        assert (out["open"], out["sessions"]) == (0, []), name
        assert out["extras_untouched"], name


def test_a_failed_row_keeps_its_place_and_masks_its_group(outputs: dict[str, Any]) -> None:
    out = outputs["mixed"]
    assert sums(out) == [0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 1.0]
    assert trained(out) == [False] * 3 + [True] * 4
    assert out["stop_reasons"] == ["stop", "stop", "infra_error"] + ["stop"] * 4
    assert (out["texts"][2], out["loss_masks"][2], out["logprobs"][2]) == (END, [0], [0.0])
    assert answers(out, 3) == "".join(f"{answer}{END}" for answer in RIGHT)
    assert out["asked"]["a_2"] == 0  # the engine is not asked for an answer to nothing
    assert figures(out) == {
        "masked": pytest.approx(3 / 7),
        "retries": pytest.approx(2 / 7),
        "dropped_groups_infra_error": pytest.approx(1 / 3),
        "reward_unmasked": 0.75,
        "outcome_resolved": pytest.approx(4 / 7),
        "outcome_unresolved": pytest.approx(2 / 7),
        "outcome_infra_error": pytest.approx(1 / 7),
        "ended_by_submit": pytest.approx(6 / 7),
        "ended_by_error": pytest.approx(1 / 7),
    }
    assert out["metrics"]["environment/infra_error_mean"] == pytest.approx(1 / 7)
    assert out["metrics"]["environment/toy/resolved_mean"] == pytest.approx(2 / 3)


def test_under_the_other_policy_only_the_row_is_masked(outputs: dict[str, Any]) -> None:
    out = outputs["mean"]
    assert sums(out) == [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    assert trained(out) == [True, True, False, True, True, True, True]


def test_step_wise_rows_are_masked_turn_by_turn(outputs: dict[str, Any]) -> None:
    out = outputs["mixed-step-wise"]
    assert out["owners"] == ["a_0"] * 3 + ["a_1"] * 2 + ["a_2"] + ["b_0"] * 3 + ["b_1"] * 2 + ["c_0"] * 3 + ["c_1"] * 3
    masked = [owner[0] == "a" for owner in out["owners"]]
    assert trained(out) == [not each for each in masked]
    assert [value for value, each in zip(sums(out), masked, strict=True) if each] == [0.5] * 6
    assert sums(out)[6:] == [0.0, 0.0, 1.0] + [0.0, 0.0] + [0.0, 0.0, 1.0] * 2
    assert sum(out["last"]) == 7


def test_without_names_each_row_is_a_group_of_its_own(outputs: dict[str, Any]) -> None:
    out = outputs["unnamed"]
    assert (sums(out), trained(out)) == ([1.0, 0.0], [True, False])


def test_an_evaluation_has_the_mean_of_what_ran(outputs: dict[str, Any]) -> None:
    out = outputs["evaluated"]
    assert sums(out) == [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    assert trained(out) == [True, True, False, True, True, True, True]


def test_rollouts_of_a_dead_worker_come_again_and_are_trained(outputs: dict[str, Any]) -> None:
    out = outputs["killed"]
    assert sums(out) == [1.0, 1.0, 1.0, 0.0]
    assert all(trained(out))
    assert figures(out)["retries"] >= 0.25
    assert answers(out, 0) == "".join(f"{answer}{END}" for answer in RIGHT)  # of the second try alone


def test_a_full_context_has_the_reward_of_its_patch(outputs: dict[str, Any]) -> None:
    out = outputs["cut"]
    assert (sums(out), out["stop_reasons"][0]) == ([1.0, 0.0], "length")
    assert out["rewards"][0][-1] == 1.0 and out["loss_masks"][0][-1] == 1
    assert figures(out)["ended_by_length"] == 0.5
    assert out["metrics"]["environment/resolved_mean"] == 0.5


def test_a_full_context_of_a_step_wise_rollout_ends_at_its_last_answer(outputs: dict[str, Any]) -> None:
    out = outputs["cut-step-wise"]
    last = out["owners"].index("a_1") - 1
    assert out["last"][last]
    assert sums(out)[: last + 1] == [0.0] * last + [1.0]
    assert out["rewards"][last][-1] == 1.0 and out["texts"][last] == f"ls{END}"
    assert out["metrics"]["environment/resolved_mean"] == 0.5


def test_with_a_template_of_ones_own_rewards_are_numbers(outputs: dict[str, Any]) -> None:
    out = outputs["cut-templated"]
    assert out["rewards"] == [1.0, 0.0, 1.0, 1.0]
    assert trained(out) == [True, True, False, False]
    assert out["logprobs"] is None


@pytest.mark.parametrize("name", ["long", "long-step-wise"])
def test_a_first_prompt_that_is_too_long_costs_its_row(outputs: dict[str, Any], name: str) -> None:
    out = outputs[name]
    assert out["loss_masks"][-1] == [0] and out["asked"]["b_0"] == 0
    assert all(trained(out)[:-1])
    assert figures(out)["dropped_groups_prompt_too_long"] == 0.5
    assert "outcome_infra_error" not in figures(out) and "retries" not in figures(out)


def test_what_the_engine_breaks_costs_a_retry_or_a_row(outputs: dict[str, Any]) -> None:
    out = outputs["engine"]
    assert sums(out) == [1.0, 1.0, 0.0, 0.5, 1.0]
    assert trained(out) == [True, True, True, False, True]
    assert figures(out)["retries"] == pytest.approx((1 + 1 + 1 + 2 + 1) / 5)


def test_a_late_rollout_is_graded_and_an_engine_that_hangs_is_given_up(outputs: dict[str, Any]) -> None:
    out = outputs["late"]
    assert sums(out) == [1.0, 0.5, 0.0]
    assert trained(out) == [True, False, True]
    assert figures(out)["ended_by_time"] == pytest.approx(1 / 3)
    assert 2 <= out["asked"]["a_0"] < 9  # it had some of its time
    assert out["asked"]["a_1"] == 2  # once: a second try would have begun after `training.time`
    assert out["seconds"] < 30


def test_no_ratio_of_rows_to_slots_and_threads_deadlocks(outputs: dict[str, Any]) -> None:
    out = outputs["narrow"]  # twelve rows of two calls in two slots, with one thread of SkyRL's
    assert sums(out) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert out["most_open"] == 2


def test_a_generator_outlives_its_event_loop(outputs: dict[str, Any]) -> None:
    out = outputs["again"]  # in each of which the second row waits for the first
    assert sums(out) == [0.0, 0.0]
    assert out["most_open"] == 1


def test_rows_of_other_envs_are_skyrls_own(outputs: dict[str, Any]) -> None:
    out = outputs["other"]
    assert sums(out) == [1.0, 1.0, 0.25]
    assert trained(out) == [False, False, True]
    assert figures(out)["masked"] == 1.0  # of ours


def test_what_another_env_raises_comes_through_after_ours_have_closed(outputs: dict[str, Any]) -> None:
    out = outputs["other-raises"]
    assert (out["error"], out["message"]) == ("ArithmeticError", "another Env's fault")
    assert out["seconds"] < 30


def test_a_cancelled_call_leaves_nothing_and_does_not_wait_for_a_grade(outputs: dict[str, Any]) -> None:
    out = outputs["cancelled"]
    assert out["error"] == "CancelledError"
    assert out["seconds"] < 15


def test_batched_generation_is_refused(outputs: dict[str, Any]) -> None:
    assert outputs["batched"]["error"] == "InputError"
    assert "generator.batched" in outputs["batched"]["message"]


def test_a_step_whose_rollouts_die_ends_with_the_causes(outputs: dict[str, Any]) -> None:
    out = outputs["broken"]
    assert out["error"] == "InfraErrorsError"
    assert "2 of the last 2 rollouts" in out["message"] and "store_gone 2" in out["message"]


def test_the_trainer_takes_what_comes_out(real_outputs: dict[str, Any]) -> None:
    taken = {name: out for name, out in real_outputs.items() if "error" not in out}
    assert len(taken) > 12
    for name, out in taken.items():
        assert trained(out)[0] or "a" not in out["trainer"]["sampled"], name
        twice, once = out["trainer"]["twice"], out["metrics"]
        ours = [key for key in once if key.startswith(("minisandbox/", "environment/"))]
        assert {key: twice[key] for key in ours} == pytest.approx({key: once[key] for key in ours}), name


def test_the_trainers_filters_drop_a_masked_group(real_outputs: dict[str, Any]) -> None:
    mixed, mean, step_wise = (real_outputs[name]["trainer"] for name in ("mixed", "mean", "mixed-step-wise"))
    assert mixed["sampled"] == mixed["varied"] == ["b"]  # `c` has no spread
    assert mean["sampled"] == ["a", "b"]
    assert step_wise["sampled"] == ["b", "c"]  # SkyRL looks at turns there
    assert step_wise["merged"] == 7
