"""The Env as SkyRL's generator uses it: make, init, step …, get_metrics, close."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skyrl_gym

import skyrl_minisandbox
from skyrl_minisandbox import env as env_module
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.env import Episode, MiniSandboxEnv, shared_cluster, shutdown, strip_special_tokens
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord
from tests.small import SOLVE, build_small_image, small_task
from tests.support import needs

pytestmark = needs("userns", "overlay", "git", "skyrl_gym")

PROMPT = [{"role": "user", "content": "the prompt of the row"}]


@pytest.fixture(scope="module")
def config(
    store_directory: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EnvConfig]:
    build_small_image(store_directory, cache_directory)
    yield make_config(
        {
            "images": {"store": str(store_directory), "cache": str(cache_directory)},
            "scaffold": "tests.small.Loop",
            "cluster": {"kind": "local", "slots": 2},
            "out": str(tmp_path_factory.mktemp("run")),
        }
    )
    shutdown()


def make(config: Any, **extras: Any) -> Any:
    skyrl_minisandbox.register()
    extras.setdefault("task", small_task().model_dump_json())
    return skyrl_gym.make("minisandbox", env_config=config, extras=extras)


def scaffolded(config: EnvConfig, scaffold: str) -> EnvConfig:
    return make_config({**vars(config), "scaffold": scaffold})


def test_an_episode_in_the_order_of_skyrls_generator(config: EnvConfig) -> None:
    env = make(config, max_turns=9)
    messages, metadata = env.init(PROMPT)
    assert [m["role"] for m in messages] == ["system", "user"]
    assert metadata["rollout_id"].startswith("small-1.")
    output = env.step("cat answer.sh<|im_end|>")
    assert output["observations"] == [{"role": "user", "content": "exit code 0\necho wrong\n"}]
    assert (output["reward"], output["done"]) == (0.0, False)
    env.step(SOLVE)
    output = env.step("submit")
    assert (output["observations"], output["reward"], output["done"]) == ([], 1.0, True)
    record = RolloutRecord.from_json(output["metadata"]["record"])
    assert (record.outcome, record.ended_by, record.turns) == (Outcome.RESOLVED, EndedBy.SUBMIT, 3)
    assert output["metadata"]["infra_error"] is False
    assert "+echo right" in output["metadata"]["patch"]
    assert output["metadata"]["trajectory"]["messages"][2] == {"role": "assistant", "content": "cat answer.sh"}
    json.dumps(output["metadata"])
    metrics = env.get_metrics()
    assert metrics["resolved_mean"] == 1.0
    assert all(name.endswith(("_mean", "_max")) and isinstance(value, float) for name, value in metrics.items())
    env.close()
    env.close()


@pytest.mark.parametrize("task", [small_task(), small_task().model_dump(mode="json"), small_task().model_dump_json()])
def test_a_row_may_hold_its_task_in_any_form(config: EnvConfig, task: Any) -> None:
    env = make(scaffolded(config, "gold"), task=task)
    env.init(PROMPT)
    assert env.step("")["reward"] == 1.0


def test_the_turn_limit_of_skyrl_ends_in_a_grade(config: EnvConfig) -> None:
    env = make(config, max_turns=2)
    env.init(PROMPT)
    assert not env.step("true")["done"]
    output = env.step(SOLVE)
    assert (output["done"], output["reward"]) == (True, 1.0)
    assert output["metadata"]["record"]["ended_by"] == "turn_limit"


@pytest.mark.parametrize(("scaffold", "reward"), [("gold", 1.0), ("empty", 0.0)])
def test_a_scaffold_that_never_asks_shows_the_prompt_and_ends_at_the_first_step(
    config: EnvConfig, scaffold: str, reward: float
) -> None:
    env = make(scaffolded(config, scaffold))
    assert env.init(PROMPT)[0] == PROMPT
    output = env.step("whatever")
    assert (output["done"], output["reward"]) == (True, reward)
    other = make(scaffolded(config, scaffold))
    assert other.init([])[0] == [{"role": "user", "content": small_task().problem_statement}]
    other.close()


def test_finish_grades_what_was_cut_short(config: EnvConfig) -> None:
    env = make(config)
    env.init(PROMPT)
    env.step(SOLVE)
    finished = env.finish()
    assert finished is not None
    assert (finished.record.reward, finished.record.ended_by) == (1.0, EndedBy.LENGTH)
    assert env.finish() is finished
    output = env.step("more")
    assert (output["done"], output["reward"]) == (True, 1.0)


def test_close_grades_what_is_open_where_the_episode_says_so(config: EnvConfig) -> None:
    episode = Episode(grade_on_close=True)
    env = make(config, episode=episode, data_source="toy/small")
    assert episode.env is env and "episode" not in env.extras
    env.init(PROMPT)
    env.step(SOLVE)
    assert env.get_metrics() == {}
    env.close()
    record = env.finished.record
    assert (record.reward, record.ended_by, record.outcome) == (1.0, EndedBy.LENGTH, Outcome.RESOLVED)
    metrics = env.get_metrics()
    assert metrics["resolved_mean"] == metrics["toy/small/resolved_mean"] == 1.0
    env.close()
    assert env.finished.record is record
    assert [status.open for status in shared_cluster(config).status()] == [0]


def test_an_answer_after_the_deadline_ends_the_episode_graded(config: EnvConfig) -> None:
    episode = Episode()
    env = make(config, episode=episode)
    env.init(PROMPT)
    episode.deadline = time.monotonic() + 60
    assert not env.step(SOLVE)["done"]
    episode.deadline = time.monotonic()
    output = env.step("echo 'echo wrong' > answer.sh")
    assert (output["done"], output["reward"]) == (True, 1.0)  # that came too late
    assert output["metadata"]["record"]["ended_by"] == "time"


def test_an_episode_that_was_closed_while_it_opened_is_not_left_open(
    config: EnvConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = shared_cluster(config)
    reached, closed, turns, opens = threading.Event(), threading.Event(), [], cluster.open

    def open_late(*args: Any, **more: Any) -> Any:
        reached.set()
        closed.wait(60)
        turns.append(opens(*args, **more))
        return turns[0]

    monkeypatch.setattr(cluster, "open", open_late)
    env = make(config)
    opening = threading.Thread(target=env.init, args=(PROMPT,))
    opening.start()
    assert reached.wait(60)
    env.close()
    closed.set()
    opening.join(60)
    assert turns and not turns[0].done  # it did open
    assert [status.open for status in cluster.status()] == [0]
    assert env.step("x")["metadata"]["infra_error"]


def test_with_a_generator_that_masks_nothing_is_said(
    config: EnvConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_module, "_unmasked", 0)
    env = make(config, task=None, episode=Episode())
    env.init(PROMPT)
    assert env.step("x")["reward"] == 0.0
    assert env_module.unmasked() == 0


def test_each_call_has_a_longest_time(config: EnvConfig) -> None:
    """Above all deadlines inside, so that it is reached by a fault of the Env alone."""
    env = make(config)
    env.init(PROMPT)
    ending = env._request(env.task).ending_seconds
    bounds = env.config.rollout
    assert env.longest("init") > bounds.setup + bounds.step
    assert env.longest("step") > bounds.step + bounds.setup + 2 * ending
    assert env.longest("step", gradings=5) - env.longest("step", gradings=1) > 4 * ending
    assert env.longest("step") - env.longest("close") == bounds.step
    env.close()


def test_close_in_the_middle_leaves_nothing_open(config: EnvConfig) -> None:
    env = make(config)
    env.init(PROMPT)
    env.close()
    env.close()
    assert env.finished is None
    assert env.get_metrics() == {}
    assert [status.open for status in shared_cluster(config).status()] == [0]


@pytest.mark.parametrize(
    ("extras", "words"),
    [
        ({"task": None}, "a row needs `task` or `task_id`"),
        ({"task": "{not json"}, "the row's `task` is no task"),
        ({"task": {"id": "half"}}, "problem_statement"),
    ],
)
def test_a_bad_row_is_named_and_never_raises(config: EnvConfig, extras: dict[str, Any], words: str) -> None:
    env = make(config, **extras)
    assert env.init(PROMPT)[0] == PROMPT
    output = env.step("anything")
    assert output["done"]
    assert output["metadata"]["record"]["reward"] is None
    assert output["metadata"]["infra_error"] is True
    assert words in output["metadata"]["record"]["error"]
    env.close()


def test_a_failure_of_ours_is_no_number_but_in_skyrls_slot_and_that_is_said_once(
    config: EnvConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_module, "_unmasked", 0)
    for _ in range(2):
        env = make(config, task=None)
        env.init(PROMPT)
        with caplog.at_level(logging.WARNING):
            assert env.step("x")["reward"] == 0.0
        metrics = env.get_metrics()
        assert metrics["infra_error_mean"] == 1.0
        assert "resolved_mean" not in metrics
    assert sum("cannot mask" in record.message for record in caplog.records) == 1
    assert env_module.unmasked() == 2


def test_step_without_init_and_after_close_does_not_raise(config: EnvConfig) -> None:
    env = make(config)
    assert env.step("x")["metadata"]["record"]["outcome"] == "infra_error"
    env = make(config)
    env.init(PROMPT)
    env.close()
    assert env.step("x")["metadata"]["record"]["outcome"] == "infra_error"


def test_metrics_of_many_episodes_are_means_and_maxima() -> None:
    together = MiniSandboxEnv.aggregate_metrics(
        [
            {"infra_error_mean": 0.0, "resolved_mean": 1.0, "grade_seconds_max": 3.0},
            {"infra_error_mean": 0.0, "resolved_mean": 0.0, "grade_seconds_max": 5.0},
            {"infra_error_mean": 1.0, "grade_seconds_max": 0.0},
        ]
    )
    assert together == {
        "infra_error_mean": pytest.approx(1 / 3),
        "resolved_mean": 0.5,
        "grade_seconds_max": 5.0,
    }
    assert MiniSandboxEnv.aggregate_metrics([]) == {}


def test_making_an_env_starts_nothing(config: EnvConfig) -> None:
    shutdown()
    env = make(config)
    assert env_module._clusters == {}
    env.close()
    assert env_module._clusters == {}


def test_a_wrong_config_is_told_when_the_env_is_made() -> None:
    with pytest.raises(InputError, match="unknown key `scafold`"):
        make({"scafold": "gold"})


def test_registering_again_changes_nothing() -> None:
    skyrl_minisandbox.register()
    skyrl_minisandbox.register()
    assert "minisandbox" in skyrl_gym.registry


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("ls<|im_end|>", "ls"),
        ("ls\n<|im_end|>\n", "ls"),
        ("ls</s>", "ls"),
        ("ls<|eot_id|><|endoftext|>", "ls"),
        ("echo '<|im_end|>' > x", "echo '<|im_end|>' > x"),
        ("ls\n", "ls\n"),
        ("", ""),
    ],
)
def test_only_special_tokens_at_the_end_are_stripped(text: str, plain: str) -> None:
    assert strip_special_tokens(text) == plain


def test_many_env_threads_share_one_cluster_and_none_waits_for_a_slot(config: EnvConfig) -> None:
    rewards: dict[int, float] = {}
    opened = threading.Barrier(6, timeout=60)

    def episode(number: int) -> None:
        env = make(config, task=small_task(f"small-{number}").model_dump_json())
        env.init(PROMPT)
        opened.wait()  # all six are open at once, on two slots
        if number % 2:
            env.step(SOLVE)
        rewards[number] = env.step("submit")["reward"]
        env.close()

    threads = [threading.Thread(target=episode, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rewards == {number: float(number % 2) for number in range(6)}
    assert shared_cluster(config).oversubscribed >= 4
    assert len(env_module._clusters) == 1


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=[needs("ray"), pytest.mark.ci])])
def test_a_process_that_just_ends_leaves_nothing(config: EnvConfig, kind: str) -> None:
    program = (
        "import sys, skyrl_gym, skyrl_minisandbox\n"
        "from tests.small import small_task\n"
        "skyrl_minisandbox.register()\n"
        "config = {'images': {'store': sys.argv[1], 'cache': sys.argv[2]}, 'scaffold': 'tests.small.Loop',"
        " 'cluster': sys.argv[3]}\n"
        "env = skyrl_gym.make('minisandbox', env_config=config, extras={'task': small_task().model_dump_json()})\n"
        "print(len(env.init([])[0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, config.images.store, config.images.cache, kind],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    runs = Path(config.images.cache) / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []
