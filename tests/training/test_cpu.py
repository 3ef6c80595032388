"""The CPU recipe: SkyRL's trainer, our Env with real sandboxes, and a policy that learns from their rewards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.skyrl.environment import VERSION
from tests.support import needs, seconds
from tests.training.conftest import Trainers
from tests.training.curves import CHANCE, CONTROL, LEARNED, CpuTraining, last, rewards

pytestmark = needs("userns", "overlay", "git", "network")

EXACT = 5e-4
"""Largest difference of two log-probabilities that is 0.000."""

SHORT = [
    "trainer.max_training_steps=3",
    "trainer.train_batch_size=8",
    "trainer.policy_mini_batch_size=8",
    "generator.n_samples_per_prompt=4",
]
"""Two steps of an epoch, and the first of another."""

OLDER = pytest.param("0.3.0", marks=pytest.mark.night)


@pytest.fixture(scope="module", params=[pytest.param(VERSION, marks=pytest.mark.ci), OLDER])
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuTraining]:
    found = CpuTraining(tmp_path_factory.mktemp("cpu"), request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def short(training: CpuTraining) -> list[dict[str, Any]]:
    return training.train(training.path / "short", *SHORT, "trainer.ckpt_interval=2")


# -- a whole training ----------------------------------------------------------------------------------


def test_three_steps_train_on_real_rewards_with_the_engines_log_probabilities(short: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in short] == [1, 2, 3]
    for line in short:
        assert line["generate/batch_num_seq"] == 32
        assert line["policy/rollout_train_logprobs_abs_diff_max"] < EXACT
        assert line["minisandbox/masked_mean"] == line["minisandbox/outcome_infra_error_mean"] == 0
        assert line["reward/avg_raw_reward"] == line["environment/toy/resolved_mean"]
        assert line["environment/create_seconds_mean"] > 0 and line["environment/grade_seconds_mean"] > 0
        assert line["policy/grad_norm"] > 0
    assert 0 < short[0]["reward/avg_raw_reward"] < 0.6
    # The weights of each step sampled the next one's rollouts, with probabilities of their own.
    assert len({line["policy/policy_entropy"] for line in short}) == 3


@pytest.mark.night
def test_two_trainings_with_one_seed_have_the_same_rollouts_also_over_a_restart(
    training: CpuTraining, short: list[dict[str, Any]]
) -> None:
    out = training.path / "again"
    keys = [*SHORT[1:], "trainer.ckpt_interval=2", "trainer.resume_mode=latest"]
    first = training.train(out, *keys, "trainer.max_training_steps=2")
    both = training.train(out, *keys, "trainer.max_training_steps=3")
    assert [line["rollouts"] for line in first] == [line["rollouts"] for line in short[:2]]
    assert [line["step"] for line in both] == [1, 2, 3]
    assert both[2]["rollouts"] == short[2]["rollouts"]
    assert len({line["rollouts"] for line in short}) == 3


@pytest.mark.night
def test_the_mean_reward_rises_from_chance_and_shuffled_rewards_keep_it_there(training: CpuTraining) -> None:
    learned = training.train(training.path / "learned", limit=seconds(2400))
    shuffled = training.train(training.path / "shuffled", f"mode={CONTROL}", limit=seconds(2400))
    assert abs(rewards(learned)[0] - CHANCE) < 0.15
    assert last(learned) >= LEARNED
    assert abs(last(shuffled) - CHANCE) < 0.15
    for line in [*learned, *shuffled]:
        assert line["policy/rollout_train_logprobs_abs_diff_max"] < EXACT
        assert line["minisandbox/masked_mean"] == 0


# -- its parts -----------------------------------------------------------------------------------------


def _ask(trainers: Trainers, function: str, **arguments: Any) -> Any:
    return trainers.call(VERSION, f"tests.training.cpu:{function}", timeout=120, **arguments)


@pytest.mark.ci
def test_an_answer_hangs_on_its_session_and_prompt_and_on_nothing_beside_them(trainers: Trainers) -> None:
    alone = _ask(trainers, "answers", order=[0, 1, 2, 3], together=False)
    assert _ask(trainers, "answers", order=[3, 1, 0, 2], together=True) == alone
    other = _ask(trainers, "answers", order=[0, 1, 2, 3], together=False, loads=2)
    assert [answer[1] for answer in other] != [answer[1] for answer in alone]
    greedy = [_ask(trainers, "answers", order=[0, 1], together=False, loads=n, temperature=0.0) for n in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.ci
def test_a_sampling_parameter_that_the_engine_lacks_is_refused(trainers: Trainers) -> None:
    said = _ask(trainers, "refused_sampling", params={"top_p": 0.9, "max_tokens": 1})
    assert "top_p" in said and "hint: generator.sampling_params.top_p=1.0" in said


@pytest.mark.ci
@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.use_kl_loss=false"),
        ("trainer.placement.colocate_all=true", "trainer.placement.colocate_all=false"),
        ("trainer.critic.model.path=critic", "trainer.critic.model.path=null"),
        ("trainer.policy.model.lora.rank=8", "trainer.policy.model.lora.rank=0"),
    ],
)
def test_what_takes_a_gpu_is_refused_by_its_key(trainers: Trainers, key: str, hint: str) -> None:
    assert f"hint: {hint}" in _ask(trainers, "refusal", keys=[key])
    assert _ask(trainers, "refusal", keys=[]) == ""


@pytest.mark.ci
@pytest.mark.parametrize("text", ["A", "sed -i 's/a/b/' x.py\n\tend  ", "héllo \u2603 \U0001f980", " lead", "a\r\nb"])
def test_the_tokenizer_writes_back_any_text_a_token_per_byte(trainers: Trainers, text: str) -> None:
    assert _ask(trainers, "round_trip", text=text) == text


@pytest.mark.ci
def test_gradients_hang_neither_on_the_size_of_a_part_nor_on_padding(trainers: Trainers) -> None:
    whole = _ask(trainers, "gradients", parts=12)
    for change in ({"parts": 5}, {"parts": 1}, {"parts": 12, "padding": 9}):
        found = _ask(trainers, "gradients", **change)
        assert all(abs(one - other) <= 1e-4 * max(1.0, abs(one)) for one, other in zip(whole, found, strict=True)), (
            change
        )
    assert all(norm > 0 for norm in itertools.islice(whole, 5))
