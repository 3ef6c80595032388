"""`minisandbox train` where SkyRL is not, and its command line; tests/training/test_recipes.py has the tree."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.cli.main import main, read
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.training_tree import spelled
from skyrl_minisandbox.cli.tree import Tree, check_key, keys, translate
from skyrl_minisandbox.errors import InputError
from tests.skyrl.environment import trainer_python
from tests.support import seconds

no_skyrl = pytest.mark.skipif(importlib.util.find_spec("skyrl") is not None, reason="SkyRL is installed here")


@no_skyrl
def test_without_skyrl_the_line_that_installs_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=cpu"]) == 3
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "minisandbox: training needs SkyRL, which is not installed\nhint: pip install 'skyrl-minisandbox[skyrl]'\n",
    )


@no_skyrl
def test_help_works_without_skyrl(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-h"]) == 0
    short = capsys.readouterr().out
    assert "--cfg job" in short and "experiment=NAME" in short and len(short.splitlines()) <= 24
    assert main(["train", "--help"]) == 0
    long = capsys.readouterr().out
    assert "experiment=lora" in long and "  training.retries=2\n" in long and "trainer.train_batch_size=16" in long
    assert "shown where SkyRL is installed" in long


@pytest.mark.parametrize("said", [["--cfg", "job"], ["--cfg=job"], ["--cfg job"]])
def test_an_option_of_two_words_is_read_as_hydra_reads_it(said: list[str]) -> None:
    request = read("train", ["seed=1", *said, "out=x"])
    assert request.options == {"--cfg job"} and request.overrides == ("seed=1", "out=x")


@pytest.mark.parametrize("said", [["--cfg", "hydra"], ["--cfg"], ["--sweep"]])
def test_an_option_that_is_not_there_is_refused(said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read("train", said)
    assert caught.value.hint == "options: --cfg job, --multirun, -m, -h, --help"


def test_a_rollout_has_no_model_that_is_trained() -> None:
    with pytest.raises(InputError) as caught:
        load_settings(["policy=inverted"])
    assert "`minisandbox train` trains" in caught.value.message and "policy=openai" in caught.value.hint


def test_keys_of_skyrl_s_command_and_of_every_verb_are_understood() -> None:
    assert spelled("environment.skyrl_gym.minisandbox.scaffold=gold") == "scaffold=gold"
    assert spelled("environment.skyrl_gym.max_env_workers=4") == "environment.skyrl_gym.max_env_workers=4"
    assert spelled("seed=1,2") == "trainer.seed=1,2"
    assert spelled("trainer.seed=1") == "trainer.seed=1"


TREE = Tree(
    "train",
    {"model": ["small"], "scaffold": ["gold", "mini"]},
    open=frozenset({"engine.options"}),
    optional={"engine.other": {"depth": 1}},
)
PLAIN = {"engine": {"options": {}, "other": None, "size": 1}}


def test_what_may_have_several_values_is_told_from_a_list() -> None:
    given = ["scaffold=gold,mini", "model=/a/b,/c/d", "engine.size=1,2", "engine.options.x=[1,2]"]
    said = translate(given, TREE, many=True)
    assert said.choices == ["scaffold=gold,mini"]
    assert said.values == ["trainer.policy.model.path=/a/b,/c/d", "engine.size=1,2", "++engine.options.x=[1,2]"]
    with pytest.raises(InputError, match="several values"):
        translate(["engine.size=1,2"], TREE)
    with pytest.raises(InputError, match="unknown choice `scaffold=golf`"):
        translate(["scaffold=gold,golf"], TREE, many=True)


def test_keys_below_what_is_null_are_known() -> None:
    check_key("engine.other.depth", PLAIN, TREE)
    check_key("engine.options.anything", PLAIN, TREE, TREE.open)
    for key in ("engine.other.width", "engine.depth", "engine.sizes"):
        with pytest.raises(InputError, match=f"unknown key `{key}`"):
            check_key(key, PLAIN, TREE, TREE.open)


def test_a_key_of_a_nested_file_has_its_sections_and_its_own_comment(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    lines = ["# @package _global_", "# Head.", "a:", "  b:", "    # First.", "    c: 1"]
    lines += ["  # Second,", "  # longer.", "  d: ''", "e: 2"]
    path.write_text("\n".join(lines) + "\n")
    found = [("a.b.c", "1", "First."), ("a.d", "''", "Second, longer."), ("e", "2", "")]
    assert [tuple(key) for key in keys(path)] == found


# -- where SkyRL is ------------------------------------------------------------------------------------


@pytest.fixture
def ray() -> Iterator[Path]:
    """Where Ray's files go; short, as sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def start(tmp_path: Path, ray: Path, *arguments: str) -> subprocess.Popen[str]:
    """`minisandbox train` in SkyRL's environment, with an experiment that only tells what it got."""
    command = [str(trainer_python()), "-m", "skyrl_minisandbox.cli.main", "train"]
    keys = ["mode=tests.training.telling.Telling", "data.train_data=[hub/name]", "trainer.eval_interval=-1"]
    keys += ["trainer.logger=console", "trainer.placement.colocate_all=false", "generator.max_turns=2"]
    keys += ["trainer.train_batch_size=4", "trainer.policy_mini_batch_size=4", f"images.cache={tmp_path}/cache"]
    return subprocess.Popen(
        [*command, *keys, *arguments],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_ADDRESS": "local",  # never another's
            "RAY_TMPDIR": str(ray),
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


@pytest.mark.night
def test_a_sweep_is_a_run_for_each_combination(tmp_path: Path, ray: Path) -> None:
    with start(tmp_path, ray, "-m", "seed=1,2", "training.retries=0", f"out={tmp_path}/sweep") as process:
        out = process.communicate(timeout=seconds(400))[0]
    assert process.returncode == 0, out
    told = [json_of(tmp_path / "sweep" / number / "told.json") for number in ("0", "1")]
    assert [one["seed"] for one in told] == [1, 2] and [one["retries"] for one in told] == [0, 0]
    assert [one["run_name"] for one in told] == ["test_run-0", "test_run-1"]
    assert [one["ckpt_path"] for one in told] == [f"{tmp_path}/sweep/{n}/checkpoints" for n in (0, 1)]
    assert told[0]["pid"] != told[1]["pid"] and out.rstrip().endswith(f"run directories: {tmp_path}/sweep")


@pytest.mark.night
def test_a_failed_job_of_a_sweep_is_told_at_the_end_and_the_others_run(tmp_path: Path, ray: Path) -> None:
    with start(tmp_path, ray, "-m", "trainer.run_name=fail,pass", f"out={tmp_path}/sweep") as process:
        out = process.communicate(timeout=seconds(400))[0]
    assert process.returncode == 1, out
    assert "job 0 of the sweep ended with exit code" in out
    assert (tmp_path / "sweep" / "1" / "told.json").exists(), out
    assert json_of(tmp_path / "sweep" / "1" / "told.json")["run_name"] == "pass-1"


@pytest.mark.night
@pytest.mark.parametrize("more", [[], ["-m", "seed=1,2"]], ids=["a run", "a sweep"])
def test_an_interrupted_training_ends_in_order(tmp_path: Path, ray: Path, more: list[str]) -> None:
    out = tmp_path / "sweep" if more else tmp_path
    with start(tmp_path, ray, *more, f"out={out}", "trainer.run_name=wait") as process:
        started = (out / "0" if more else out) / "told.json"
        end = time.monotonic() + seconds(200)
        while not started.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        assert started.exists(), process.communicate(timeout=60)[0]
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=seconds(200))[0]
    assert process.returncode == 130, said
    assert "minisandbox: interrupted" in said
    assert not Path(f"/proc/{json_of(started)['pid']}").exists()
    assert not (out / "1").exists()


def json_of(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found
