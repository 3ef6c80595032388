"""A training is refused early and in a sentence, and ends with nothing left, whichever way it ends."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training import entrypoint
from tests.skyrl.environment import VERSIONS
from tests.skyrl.process import TrainerProcess
from tests.small import build_small_image, small_task
from tests.support import needs

OURS = "environment.skyrl_gym.minisandbox"

no_skyrl = pytest.mark.skipif(importlib.util.find_spec("skyrl") is not None, reason="SkyRL is installed here")


# -- without SkyRL ---------------------------------------------------------------------------------


@no_skyrl
def test_without_skyrl_the_line_that_installs_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entrypoint.main(["trainer.epochs=1"])
    assert ended.value.code == 3
    assert capsys.readouterr().err == (
        "minisandbox: training needs SkyRL, which is not installed\nhint: pip install 'skyrl-minisandbox[skyrl]'\n"
    )


@no_skyrl
def test_the_package_that_skyrl_has_given_up_is_refused_with_the_version_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "skyrl_train").mkdir()
    (tmp_path / "skyrl_train" / "__init__.py").touch()
    facts = tmp_path / "skyrl_train-0.3.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: skyrl-train\nVersion: 0.3.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as refused:
        entrypoint.run(["trainer.epochs=1"])
    assert refused.value.message.startswith("skyrl-train 0.3.1 is installed, which SkyRL has given up for `skyrl`")
    assert refused.value.hint == "pip uninstall skyrl-train && pip install 'skyrl>=0.3,<0.5'"


def test_help_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    entrypoint.main(["--help"])
    assert "trainer.override_entrypoint=skyrl_minisandbox.training.entrypoint" in capsys.readouterr().out


def test_looking_at_the_entry_points_imports_neither_ray_nor_torch() -> None:
    names = "entrypoint, entrypoint_async, entrypoint_generate, last_words"
    code = f"import sys; from skyrl_minisandbox.training import {names}; print({{'ray', 'torch'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


# -- the configuration, and what is refused before Ray starts -------------------------------------------


@pytest.fixture(scope="module", params=VERSIONS)
def trainer(request: pytest.FixtureRequest) -> Iterator[TrainerProcess]:
    process = TrainerProcess(request.param)
    yield process
    process.close()


def ask(trainer: TrainerProcess, function: str, *keys: str, **more: Any) -> Any:
    return trainer.call(f"tests.training.refusals:{function}", timeout=120, keys=list(keys), **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the image of small tasks, and JSON lines of two rows."""
    path = tmp_path_factory.mktemp("data")
    build_small_image(path / "store", path / "cache")
    write_rows(path / "train.jsonl", 2)
    return path


def write_rows(path: Path, number: int, **changed: Any) -> None:
    tasks = [small_task(f"small-{n}") for n in range(number)]
    rows = [
        {
            "prompt": [{"role": "user", "content": task.problem_statement}],
            "env_class": "minisandbox",
            "data_source": "small",
            "task": task.model_dump_json(),
            **changed,
        }
        for task in tasks
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def good(data: Path) -> list[str]:
    """What a training needs at least; the checks pass."""
    return [
        f"data.train_data=['{data}/train.jsonl']",
        "trainer.eval_interval=-1",
        "trainer.logger=console",
        "trainer.placement.policy_num_gpus_per_node=1",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2",
        "trainer.micro_train_batch_size_per_gpu=1",
        "trainer.micro_forward_batch_size_per_gpu=1",
        "generator.max_turns=5",
        "generator.batched=false",
        "generator.n_samples_per_prompt=2",
        "generator.inference_engine.num_engines=1",
        f"{OURS}.images.store={data}/store",
        f"{OURS}.images.cache={data}/cache",
    ]


REFUSED = [
    (["trainer.epoch=3"], "unknown key `trainer.epoch`", "did you mean `trainer.epochs`?"),
    (["trainer.max_turns=3"], "unknown key `trainer.max_turns`", "did you mean `generator.max_turns`?"),
    (["trainer.epochs=many"], "`trainer.epochs=many` must be a whole number", ""),
    (["trainer.policy=3"], "`trainer.policy` must have keys of its own, but is `3`", ""),
    (["trainer.eval_before_train=maybe"], "`trainer.eval_before_train=maybe` must be true or false", ""),
    ([f"{OURS}.scafold=gold"], f"unknown key `{OURS}.scafold`", "did you mean `scaffold`?"),
    ([f"{OURS}.rollout.turn=3"], f"unknown key `{OURS}.rollout.turn`", "did you mean `turns`?"),
    ([f"{OURS}.rollout.turns=x"], f"`{OURS}.rollout.turns=x` must be a whole number", ""),
    (["+trainer.epochs=3"], "`+trainer.epochs`: keys need no `+` here", "trainer.epochs=3"),
    (["trainer"], "`trainer` is not `key=value`", ""),
    (["--epochs=3"], "`--epochs=3` is not `key=value`", ""),
    (
        ["generator.inference_engine.async_engine=false"],
        "SkyRL refuses the configuration: `async_engine=False` is no longer supported",
        "",
    ),
]


@pytest.mark.ci
@needs("network")
def test_a_key_that_cannot_be_is_named_with_its_neighbours(trainer: TrainerProcess) -> None:
    for keys, message, hint in REFUSED:
        error = ask(trainer, "refused", *keys)
        assert error["message"].startswith(message), keys
        assert hint in error["hint"], keys
        assert error["exit_code"] == 2, keys


@pytest.mark.ci
@needs("network")
def test_a_dotlist_makes_what_hydra_makes(trainer: TrainerProcess) -> None:
    keys = [
        f"{OURS}.scaffold=gold",
        f"{OURS}.scaffold.options.x=1",
        f"{OURS}.reward={{name: fraction, memo: true}}",
        f"{OURS}.cluster=local",
        "trainer.max_prompt_length=777",
        "data.train_data=/data/train.parquet",
        "trainer.seed=1e3",
    ]
    whole = ask(trainer, "built", *keys)
    ours = whole["environment"]["skyrl_gym"]["minisandbox"]
    assert ours["scaffold"] == {"name": "gold", "options": {"x": 1}}
    assert (ours["reward"]["name"], ours["reward"]["memo"]) == ("fraction", True)
    assert ours["cluster"]["kind"] == "local"
    assert whole["environment"]["env_class"] == "minisandbox"
    assert whole["generator"]["max_input_length"] == 777, "SkyRL derives it"
    assert whole["data"]["train_data"] == ["/data/train.parquet"]
    assert whole["trainer"]["seed"] == 1000
    assert trainer.call("tests.training.refusals:differences", timeout=60) == []
    trainer.call("tests.training.refusals:expected_here", timeout=60)


@pytest.mark.ci
@needs("network", "userns", "overlay", "git")
def test_what_would_fail_once_engines_are_up_is_refused_before(
    trainer: TrainerProcess, data: Path, tmp_path: Path
) -> None:
    keys = good(data)
    assert ask(trainer, "refused", *keys, mode="sync") == {}

    def error(*more: str, mode: str = "sync") -> dict[str, Any]:
        found: dict[str, Any] = ask(trainer, "refused", *keys, *more, mode=mode)
        assert found.get("exit_code") == 2, (more, found)
        return found

    assert "`generator.batched=true`" in error("generator.batched=true")["message"]
    assert error("generator.max_turns=1")["hint"] == "generator.max_turns=50"
    assert "SkyRL refuses" in error("trainer.algorithm.advantage_estimator=guess")["message"]
    assert "max_env_workers=0" in error("environment.skyrl_gym.max_env_workers=0")["message"]
    long = error(
        "generator.max_input_length=4000",
        "generator.sampling_params.max_generate_length=200",
        "generator.inference_engine.engine_init_kwargs.max_model_len=4096",
    )
    assert long["hint"] == "generator.inference_engine.engine_init_kwargs.max_model_len=4200"

    asynchronous = ["trainer.fully_async.enabled=true", "trainer.placement.colocate_all=false"]
    asynchronous += ["trainer.algorithm.policy_loss_type=rollout_is"]
    many = error(*asynchronous, mode="async")
    assert many["hint"] == "trainer.fully_async.num_parallel_generation_workers=10"
    fits = "trainer.fully_async.num_parallel_generation_workers=10"
    assert ask(trainer, "refused", *keys, *asynchronous, fits, mode="async") == {}
    assert "colocate_all=false" in error(*asynchronous, fits, "trainer.placement.colocate_all=true")["hint"]

    no_class = error(mode="tests.training.trees.Mine")
    assert no_class["message"] == "mode `tests.training.trees.Mine`: `tests.training.trees` has no `Mine`"
    nowhere = error(f"data.train_data=['{tmp_path}/train.parquet']")
    assert nowhere["message"] == f"`data.train_data`: there is no file {tmp_path}/train.parquet"
    nothing = error("data.val_data=[]", mode="generate")
    assert nothing["message"] == "an evaluation needs `data.val_data`"
    never = error("trainer.eval_interval=-1", f"data.val_data=['{tmp_path}/val.parquet']", mode="generate")
    assert never["message"] == f"`data.val_data`: there is no file {tmp_path}/val.parquet", "it is read all the same"
    write_rows(tmp_path / "bad.jsonl", 1, task="{}")
    bad = error(f"data.train_data=['{tmp_path}/bad.jsonl']")
    assert bad["message"].startswith(f"`data.train_data`: {tmp_path}/bad.jsonl: the row's `task` is no task")
    write_rows(tmp_path / "theirs.jsonl", 1, task="{}", env_class="gsm8k")
    assert ask(trainer, "refused", *keys, f"data.train_data=['{tmp_path}/theirs.jsonl']", mode="sync") == {}


@pytest.mark.ci
@needs("network", "userns", "overlay", "git")
def test_missing_images_are_told_with_the_command_that_builds_them(
    trainer: TrainerProcess, data: Path, tmp_path: Path
) -> None:
    error = ask(trainer, "refused", *good(data), f"{OURS}.images.store={tmp_path}/store", mode="sync")
    assert error["message"] == f"1 of 1 images are not in the store {tmp_path}/store: those of small-0"
    assert error["hint"] == f"minisandbox image build tasks=… images.store={tmp_path}/store"
    assert not (tmp_path / "store").exists(), "nothing was made by looking"


@pytest.mark.ci
@needs("network", "userns", "overlay", "git")
def test_every_running_rollout_has_a_thread_of_the_env(trainer: TrainerProcess, data: Path) -> None:
    whole = ask(trainer, "built", *good(data), f"{OURS}.training.running=500", checked="sync")
    assert whole["environment"]["skyrl_gym"]["max_env_workers"] >= 500
