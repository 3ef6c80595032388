"""`minisandbox train`: one tree over SkyRL's configuration and ours, and recipes that SkyRL's own checks take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cli.tree import TRAINING, config_directory, groups, headline, keys
from tests.skyrl.environment import VERSIONS
from tests.skyrl.process import TrainerProcess

OURS = "environment.skyrl_gym.minisandbox"
DATA = ["data.train_data=[/data/train.parquet]", "data.val_data=[/data/validation.parquet]"]
NEEDED = {  # beside the data
    "qwen3_32b_multinode": ["out=/shared/run", "images.store=/shared/store"],
    "evaluate": ["trainer.policy.model.path=/exports/global_step_10/policy"],
}
RECIPES = groups(training=True)["experiment"]
FACTS: dict[str, dict[str, Any]] = {
    "cpu": {"mode": "skyrl_minisandbox.training.cpu.CpuExperiment", "colocate": False},
    "evaluate": {"mode": "generate", "model": "/exports/global_step_10/policy", "colocate": False, "engine_gpus": 8},
    "fully_async": {"mode": "async", "model": "Qwen/Qwen3-8B", "gpus": 4, "engine_gpus": 4},
    "lora": {"mode": "sync", "model": "Qwen/Qwen3-8B", "gpus": 4, "lora": 32},
    "qwen3_32b_multinode": {"mode": "sync", "model": "Qwen/Qwen3-32B", "gpus": 16},
    "qwen3_8b_8gpu": {"mode": "sync", "model": "Qwen/Qwen3-8B", "gpus": 8, "lora": 0},
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[str], TrainerProcess]]:
    """A process for each version that is asked for."""
    started: dict[str, TrainerProcess] = {}

    def process(version: str) -> TrainerProcess:
        if version not in started:
            started[version] = TrainerProcess(version)
        return started[version]

    yield process
    for one in started.values():
        one.close()


@pytest.fixture(params=VERSIONS)
def trainer(request: pytest.FixtureRequest, processes: Callable[[str], TrainerProcess]) -> TrainerProcess:
    return processes(request.param)


@pytest.fixture
def newest(processes: Callable[[str], TrainerProcess]) -> TrainerProcess:
    """For what does not depend on SkyRL's version."""
    return processes(VERSIONS[-1])


def ask(trainer: TrainerProcess, function: str, *overrides: str) -> Any:
    return trainer.call(f"tests.training.trees:{function}", timeout=120, keys=list(overrides))


# -- the recipes ---------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_skyrl_takes_it_and_it_is_what_its_name_says(
    trainer: TrainerProcess, recipe: str
) -> None:
    found = ask(trainer, "checked", f"experiment={recipe}", *DATA, *NEEDED.get(recipe, []))
    for fact, value in FACTS[recipe].items():
        assert found[fact] == value, fact
    if found["max_model_len"] is not None:
        assert found["longest"] <= found["max_model_len"]
    if found["colocate"]:
        assert found["engine_gpus"] == found["gpus"]
    if found["mode"] == "async":
        assert found["async"] and not found["colocate"] and found["gpus"] + found["engine_gpus"] == 8


@pytest.mark.ci
@pytest.mark.parametrize("model", groups(training=True)["model"])
def test_a_model_goes_with_a_recipe(newest: TrainerProcess, model: str) -> None:
    gpus = 8 if model != "qwen3_8b" else 16
    engines = {"qwen3_0_6b": 8, "qwen3_8b": 8, "qwen3_32b": 2}[model]
    more = [f"trainer.placement.policy_num_gpus_per_node={gpus}", f"generator.inference_engine.num_engines={engines}"]
    found = ask(newest, "checked", "experiment=qwen3_8b_8gpu", f"model={model}", *more, *DATA)
    assert found["engine_gpus"] == gpus and found["model"].startswith("Qwen/Qwen3-")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_was_run(recipe: str) -> None:
    said = headline(config_directory() / "experiment" / f"{recipe}.yaml")
    assert "Was run" in said
    if recipe != "cpu":
        assert "Was not run" in said


@pytest.mark.parametrize("path", [path for group in TRAINING for path in (config_directory() / group).iterdir()])
def test_no_key_of_a_recipe_is_without_its_reason(path: Path) -> None:
    found = list(keys(path))
    assert not [key.name for key in found if key.default == "???"]  # over a default it does nothing: ${needed:what}
    assert found and all(key.sentence.endswith(".") for key in found), [key.name for key in found if not key.sentence]


# -- the tree is the dataclasses -----------------------------------------------------------------------


@pytest.mark.ci
def test_the_tree_has_the_dataclasses_keys_and_no_other(trainer: TrainerProcess) -> None:
    names = set(trainer.call("tests.training.trees:key_names", timeout=60))
    found = trainer.call("tests.training.trees:tree_keys", timeout=60)
    below = {f"{key}.{inside}" for key, keys in found.items() if "." in key for inside in keys}
    ours = {name.removeprefix(f"{OURS}.") for name in names if name.startswith(OURS)}
    skyrl = {name for name in names if not name.startswith(OURS)}
    optional = {key for key in found if "." in key}
    tree = set(found["keys"]) - {"mode", "policy.name"}
    # Of a reward's options a choice may bring some; the dataclass knows only that there are.
    assert (tree - optional) | below == skyrl | ours


@pytest.mark.ci
def test_what_is_not_set_is_as_skyrl_makes_it(trainer: TrainerProcess) -> None:
    assert ask(trainer, "built") == ask(trainer, "dotlist")


SAME = {
    "derived": [
        "trainer.max_prompt_length=777",  # generator.max_input_length follows
        "generator.sampling_params.max_generate_length=99",  # the evaluation's
        "generator.sampling_params.temperature=0.7",  # the loss's
        "trainer.policy.model.path=/m",  # the reference model's
    ],
    "below what is null, and in mappings": [
        "generator.eval_sampling_params.top_p=0.9",
        "trainer.policy.fsdp_config.mixed_precision.param_dtype=fp16",
        "generator.inference_engine.engine_init_kwargs.max_model_len=4096",
        "generator.chat_template_kwargs={a: {b: [1, x]}, c: '1'}",
        "trainer.policy.megatron_config.transformer_config_kwargs.recompute_granularity=selective",
    ],
    "kinds of values": [
        "generator.eval_sampling_params=null",
        "trainer.resume_mode=null",
        "trainer.policy.optimizer_config.lr=3e-5",
        "trainer.policy.optimizer_config.adam_betas=[0.9,0.95]",
        "trainer.run_name='null'",
        "trainer.project_name='1e5'",
        "data.train_data=/a/b.parquet",
    ],
    "ours": [
        f"{OURS}.scaffold=gold",
        f"{OURS}.scaffold.options.depth=3",
        f"{OURS}.training.retries=5",
        f"{OURS}.sandbox.memory=8GiB",
        f"{OURS}.tasks.ids=[a,b]",
        f"{OURS}.reward.options={{a: 1}}",
    ],
}


@pytest.mark.ci
@pytest.mark.parametrize("given", SAME.values(), ids=SAME.keys())
def test_an_override_does_what_it_does_in_skyrl_s_command(trainer: TrainerProcess, given: list[str]) -> None:
    assert ask(trainer, "built", *given) == ask(trainer, "dotlist", *given)


@pytest.mark.ci
def test_every_number_can_be_set(trainer: TrainerProcess) -> None:
    """All of them at once, by both ways in."""
    tree = ask(trainer, "plain")["tree"]

    def numbers(node: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{path}{name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{path}{name}", value

    both = [pair for section in ("trainer", "generator") for pair in numbers(tree[section], f"{section}.")]
    given = [f"{key}={value + 1}" for key, value in both]
    assert len(given) > 100
    assert ask(trainer, "built", *given) == ask(trainer, "dotlist", *given)


# -- what is refused, and what is short ----------------------------------------------------------------


REFUSED = [
    (["trainer.epoch=3"], "unknown key `trainer.epoch`", "`trainer.epochs`"),
    (["sandbox.memry=1GiB"], "unknown key `sandbox.memry`", "`sandbox.memory`"),
    (["memory=1GiB"], "unknown key `memory`", "`sandbox.memory`"),
    ([f"{OURS}.sandbox.memry=1GiB"], "unknown key `sandbox.memry`", "`sandbox.memory`"),
    (["generator.eval_sampling_params.top=1"], "unknown key `generator.eval_sampling_params.top`", "params.top_p`"),
    (["trainer.epochs=many"], "`trainer.epochs=many` must be a whole number", ""),
    (["training.retries=-1"], "`training.retries=-1` must be 0 or above", ""),
    (["experiment=cpus"], "unknown choice `experiment=cpus`", "did you mean `experiment=cpu`?"),
    (["model=qwen"], "unknown choice `model=qwen`", "a directory, or a name of a model hub with its `/`"),
    (["trainer.policy={}"], "`trainer.policy` has keys of its own", ""),
    (["+trainer.epochs=3"], "cannot read `+trainer.epochs=3`", "without `+`"),
    (["seed=1,2"], "`trainer.seed=1,2` has several values; one run has one", "--multirun"),
    (["policy=openai", "policy.base_url=x", "policy.model=y"], "`policy=openai` cannot answer in training", "rollout"),
    (["mode=fast"], "unknown `mode=fast`", "sync, async, generate, or a dotted path"),
    (["experiment=lora"], "`data.train_data` is not set: files that minisandbox", "data.train_data=… data.val_data=…"),
    (["experiment=evaluate", *DATA], "`trainer.policy.model.path` is not set: the checkpoint", "model.path=…"),
    (["experiment=qwen3_32b_multinode", *DATA], "`images.store` is not set", "images.store=… out=… on the"),
]


@pytest.mark.ci
@pytest.mark.parametrize("given,message,hint", REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_cannot_be_is_named_with_what_can(
    newest: TrainerProcess, given: list[str], message: str, hint: str
) -> None:
    said, help_ = ask(newest, "refused", *given)
    assert said.startswith(message) and hint in help_


@pytest.mark.ci
def test_short_forms_stand_for_the_long_ones(newest: TrainerProcess) -> None:
    found = ask(newest, "plain", "seed=7", "model=Org/Name", "scaffold=my.agents.Mine", "out=run")["tree"]
    assert found["trainer"]["seed"] == 7
    assert found["trainer"]["policy"]["model"]["path"] == "Org/Name"
    assert found["scaffold"]["name"] == "my.agents.Mine"
    assert found["out"].startswith("/") and found["trainer"]["ckpt_path"] == f"{found['out']}/checkpoints"


@pytest.mark.ci
def test_choices_of_the_user_s_own_are_found(newest: TrainerProcess, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults: [lora, _self_]\ntrainer: {epochs: 77}\n")
    where = f"hydra.searchpath=[{tmp_path}]"
    arguments = ["train", "--cfg", "job", where, "experiment=mine", *DATA]
    code, out, err = newest.call("tests.training.trees:command", timeout=60, arguments=arguments)
    assert (code, err) == (0, "") and "epochs: 77" in out and "rank: 32" in out
    for wrong, said in (("trianer: {epochs: 1}", "`trianer`"), ("trainer: {epoch: 1}", "`trainer.epoch`")):
        mine.write_text(f"# @package _global_\n{wrong}\n")
        arguments = ["train", where, "experiment=mine"]
        code, out, err = newest.call("tests.training.trees:command", timeout=60, arguments=arguments)
        assert code == 2 and said in err, err


@pytest.mark.ci
def test_cfg_job_prints_everything_and_it_can_be_read_again(newest: TrainerProcess) -> None:
    import yaml

    arguments = ["train", "--cfg", "job", "experiment=lora", *DATA]
    code, out, err = newest.call("tests.training.trees:command", timeout=60, arguments=arguments)
    assert (code, err) == (0, "")
    found = yaml.safe_load(out)
    assert found == ask(newest, "plain", "experiment=lora", *DATA)["tree"]
    assert found["trainer"]["policy"]["model"]["lora"]["rank"] == 32 and found["sandbox"]["memory"] == "4GiB"


@pytest.mark.ci
def test_help_prints_skyrl_s_keys_with_its_sentences(newest: TrainerProcess) -> None:
    code, out, _ = newest.call("tests.training.trees:command", timeout=60, arguments=["train", "--help"])
    assert code == 0
    for line in ("trainer.epochs=1", "generator.eval_sampling_params.temperature=1.0", "training.retries=2"):
        assert f"  {line}\n" in out
    assert "experiment=lora" in out


@pytest.mark.ci
def test_a_sweep_is_checked_before_its_first_job(newest: TrainerProcess, tmp_path: Path) -> None:
    arguments = ["train", "-m", f"out={tmp_path}/sweep", "experiment=cpu", "data.train_data=[hub/name]"]
    arguments += ["trainer.epochs=1,many"]
    code, _, err = newest.call("tests.training.trees:command", timeout=120, arguments=arguments)
    assert code == 2 and "`trainer.epochs=many` must be a whole number" in err
    assert not (tmp_path / "sweep").exists()
