"""SkyRL 0.4.0's own generator drives our Env: rows, rewards, loss masks, metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.skyrl.chatml import END, START, ChatML
from tests.skyrl.environment import skyrl_directory
from tests.small import SOLVE, build_small_image, small_task
from tests.support import REPOSITORY, needs

pytestmark = [pytest.mark.ci, needs("userns", "overlay", "git", "skyrl_gym", "network")]

MAX_TURNS = 4

KINDS = [  # answers, reward, how many of them are given
    (["cat answer.sh", SOLVE, "submit"], 1.0, 3),
    (["submit"], 0.0, 1),
    (["echo nope > answer.sh", "submit"], 0.0, 2),
    (["true", "false", "ls", SOLVE, "never given"], 1.0, 4),  # the turn limit, graded
]


@pytest.fixture(scope="module")
def path() -> Path:
    return skyrl_directory()


def generate(config: dict[str, Any], path: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    given = {"path": str(path), "env": config, "max_turns": MAX_TURNS, "rows": rows, **more}
    done = subprocess.run(
        [sys.executable, "-m", "tests.skyrl.episodes"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def config(store_directory: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    build_small_image(store_directory, cache_directory)
    return {
        "images": {"store": str(store_directory), "cache": str(cache_directory)},
        "scaffold": {"name": "tests.small.Loop"},
        "cluster": {"kind": "local"},
        "out": str(tmp_path_factory.mktemp("run")),
    }


@pytest.fixture(scope="module")
def output(config: dict[str, Any], path: Path) -> Any:
    rows = [
        {"task": small_task(f"small-{number}").model_dump_json(), "answers": KINDS[number % len(KINDS)][0]}
        for number in range(16)
    ]
    return generate(config, path, rows)


def test_every_row_comes_back_with_the_reward_of_the_table(output: Any) -> None:
    assert len(output["rewards"]) == 16
    assert [sum(row) for row in output["rewards"]] == [KINDS[n % 4][1] for n in range(16)]
    assert output["finished"] == sorted(f"{n}_0" for n in range(16))
    assert set(output["stop_reasons"]) == {"stop"}


def test_the_prompt_is_the_scaffolds_own(output: Any) -> None:
    for prompt in output["prompts"]:
        assert prompt == (
            f"{START}system\nAnswer with a shell command.{END}\n"
            f"{START}user\n{small_task().problem_statement}{END}\n{START}assistant\n"
        )


def test_the_loss_is_on_the_models_tokens_and_on_no_others(output: Any) -> None:
    tokenizer = ChatML()
    for number in range(16):
        answers, _, given = KINDS[number % 4]
        ids, mask = output["response_ids"][number], output["loss_masks"][number]
        assert len(ids) == len(mask) == len(output["logprobs"][number])
        ours = [token for token, one in zip(ids, mask, strict=True) if one]
        assert tokenizer.decode(ours) == "".join(f"{answer}{END}" for answer in answers[:given])
        others = tokenizer.decode([token for token, one in zip(ids, mask, strict=True) if not one])
        assert others.count(f"{START}user\nexit code ") == given - 1
        assert all(
            (logprob == -0.5) == bool(one) for logprob, one in zip(output["logprobs"][number], mask, strict=True)
        )


def test_the_reward_is_on_the_last_token_of_the_model(output: Any) -> None:
    for number in range(16):
        reward, mask = output["rewards"][number], output["loss_masks"][number]
        last = max(place for place, one in enumerate(mask) if one)
        assert [place for place, value in enumerate(reward) if value] == ([last] if KINDS[number % 4][1] else [])


def test_the_metrics_of_the_env_reach_skyrl(output: Any) -> None:
    metrics = output["metrics"]
    assert metrics["environment/resolved_mean"] == 0.5
    assert metrics["environment/infra_error_mean"] == 0.0
    assert metrics["environment/turns_mean"] == 2.5
    assert metrics["environment/grade_seconds_max"] > 0


def test_one_bad_row_does_not_take_the_batch_along(config: dict[str, Any], path: Path) -> None:
    good = {"task": small_task().model_dump_json(), "answers": [SOLVE, "submit"]}
    bad = {"task": "{}", "answers": ["anything"]}
    out = generate(config, path, [good, bad, good])
    assert [sum(row) for row in out["rewards"]] == [1.0, 0.0, 1.0]
    assert out["metrics"]["environment/infra_error_mean"] == pytest.approx(1 / 3)
    assert out["metrics"]["environment/resolved_mean"] == 1.0


def test_a_full_context_leaves_no_sandbox_behind(config: dict[str, Any], path: Path) -> None:
    row = {"task": small_task().model_dump_json(), "answers": ["true"] * 9}
    out = generate(config, path, [row], max_input_length=200)
    assert out["stop_reasons"] == ["length"]
    assert [sum(row) for row in out["rewards"]] == [0.0]
