"""`minisandbox tasks export`: only tasks that passed, and what SkyRL's own dataset class makes of the files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cli import tasks as verb
from skyrl_minisandbox.cli.main import read
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.tasks import load_tasks
from skyrl_minisandbox.tasks.validation import Validation
from tests.cli.conftest import Command
from tests.support import REPOSITORY, needs


def export(*arguments: str) -> int:
    pytest.importorskip("pyarrow")
    return verb.run(read("tasks", ["export", "tasks=toy", *arguments]))


def rows(path: Path) -> list[dict[str, Any]]:
    return list(pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist())


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A file in which all toy tasks but two have passed, one of them without a flaky test."""
    found = []
    for task in load_tasks("toy"):
        bad = {"failure": "gold_fails"} if task.id in ("toy-mean", "toy-slug") else {"valid": True}
        flaky = ("test_plain (test_leap.Test)",) if task.id == "toy-leap" else ()
        found.append(Validation(task_id=task.id, task_digest=task.digest(), flaky=flaky, **bad))  # type: ignore[arg-type]
    file = tmp_path / "validation.json"
    file.write_text(json.dumps([row.model_dump(mode="json") for row in found]))
    return file


def test_only_tasks_that_passed_are_written_without_their_flaky_tests(
    validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(f"validation={validation}", f"out={out}", "split=task", "val_fraction=0.25") == 0
    train, held = rows(out / "train.parquet"), rows(out / "validation.parquet")
    assert (len(train), len(held)) == (10, 4)
    names = {row["task_id"] for row in train + held}
    assert len(names) == 14 and not names & {"toy-mean", "toy-slug"}
    [leap] = [json.loads(row["task"]) for row in train + held if row["task_id"] == "toy-leap"]
    assert leap["tests"]["flaky"] == ["test_plain (test_leap.Test)"]
    said = capsys.readouterr().out
    assert "left out: 2 that have not passed validation" in said
    assert f"\"data.train_data=['{out}/train.parquet']\" \"data.val_data=['{out}/validation.parquet']\"" in said


def test_a_set_that_was_never_judged_is_refused_unless_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing says that these tasks judge") as caught:
        export(f"out={tmp_path / 'out'}")
    assert "minisandbox validate" in caught.value.hint and "validation=none" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert export(f"out={tmp_path / 'out'}", "validation=none", "val_fraction=0") == 0
    assert len(rows(tmp_path / "out" / "train.parquet")) == 16
    assert not (tmp_path / "out" / "validation.parquet").exists()


@pytest.mark.ci
def test_a_seed_gives_the_same_bytes_and_another_other_tasks(validation: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        export(f"tasks.validation={validation}", f"out={tmp_path / name}", "split=task", f"seed={seed}")
    for file in ("train.parquet", "validation.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert rows(tmp_path / "a" / "validation.parquet") != rows(tmp_path / "c" / "validation.parquet")


def test_filters_are_counted_in_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    some = ["tasks.ids=[toy-mean,toy-clamp,toy-slug]", "match=^toy-[a-m]", "max_tests=2"]
    assert export("--json", f"out={out}", "validation=none", "val_fraction=1", *some) == 0
    assert json.loads(capsys.readouterr().out) == {
        "files": {"validation": f"{out}/validation.parquet"},
        "tasks": {"validation": ["toy-mean"]},
        "left_out": {"above 2 tests": 1, "other ids": 1},
        "split": "repository",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=O"], "all 16 tasks are of one repository, so they cannot be split"),
        ([], "where to?"),
        (["out=O", "val_fraction=2"], "`val_fraction=2` must be a number from 0 to 1"),
        (["out=O", "val_fraction=nan"], "`val_fraction=nan` must be a number from 0 to 1"),
        (["out=O", "split=size"], "`split=size` must be `repository` or `task`"),
        (["out=O", "max_tests=-1"], "`max_tests=-1` must be a whole number, 0 or above"),
        (["out=O", "match=("], r"`match=(` is no regular expression: "),
        (["out=O", "match=^x", "max_tests=1"], "no task is left: 16 other ids"),
        (["out=O", "validation=v", "tasks.validation=v"], "`validation` and `tasks.validation` are the same"),
        (["out=O", "task=toy-mean"], "minisandbox tasks export has no key `task`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if any("validation=" in one for one in arguments) else ["validation=none"]
    with pytest.raises(InputError) as caught:
        export(*given, *arguments)
    assert caught.value.message.startswith(message)
    assert not list(tmp_path.iterdir())


def test_keys_of_export_are_no_keys_of_list() -> None:
    with pytest.raises(InputError, match="minisandbox tasks list has no key `match`") as caught:
        verb.run(read("tasks", ["list", "tasks=toy", "match=x"]))
    assert caught.value.hint == "its own keys: none; `match` is of `tasks export`"


@pytest.mark.ci
@needs("userns", "overlay", "git")
def test_validate_and_export_one_after_the_other(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    chosen = ["tasks=toy", "tasks.ids=[toy-mean,toy-slug]", *places]
    judged = minisandbox("validate", "--gates-only", *chosen, f"out={tmp_path / 'judged'}")
    assert judged.code == 0, judged.err
    done = minisandbox("tasks", "export", *chosen, f"validation={tmp_path / 'judged'}", f"out={tmp_path / 'data'}",
                       "split=task")  # fmt: skip
    assert done.code == 0, done.err
    assert len(rows(tmp_path / "data" / "train.parquet")) == 1
    assert len(rows(tmp_path / "data" / "validation.parquet")) == 1


READ = """
import json, sys
from skyrl.train.dataset import PromptDataset
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.env import find_task
from tests.skyrl.chatml import ChatML

def read(*paths, most):
    data = PromptDataset(list(paths), ChatML(), most, num_workers=1)
    found = data.collate_fn([data[number] for number in range(len(data))])
    for row in found:
        json.dumps(row)  # as SkyRL dumps evaluated rows
        row["digest"] = find_task(EnvConfig(), row["env_extras"]).digest()
    return found

train, held = sys.argv[1:]
found = {"train": read(train, most=10_000), "both": read(train, held, most=10_000), "short": read(train, most=230)}
print(json.dumps(found))
"""


@needs("network")
@pytest.mark.parametrize(
    "version", [pytest.param("0.3.0", marks=pytest.mark.night), pytest.param("0.4.0", marks=pytest.mark.ci)]
)
def test_skyrl_s_own_dataset_reads_the_files(version: str, tmp_path: Path) -> None:
    from tests.skyrl.chatml import ChatML
    from tests.skyrl.environment import trainer_python

    export("validation=none", "split=task", f"out={tmp_path}")
    files = [str(tmp_path / f"{name}.parquet") for name in ("train", "validation")]
    done = subprocess.run(
        [str(trainer_python(version)), "-c", READ, *files],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tasks = {task.id: task for task in load_tasks("toy")}
    assert len(found["train"]) == 14
    assert [row["uid"] for row in found["both"]] == [str(number) for number in range(16)]
    for row in found["both"]:
        task = tasks[row["env_extras"]["task_id"]]
        assert row["env_class"] == "minisandbox"
        assert row["prompt"] == [{"role": "user", "content": task.problem_statement}]
        assert row["digest"] == task.digest()
        assert row["env_extras"]["data_source"] == "toy"
    # `trainer.max_prompt_length` is measured on the problem statement.
    fits = [
        row["env_extras"]["task_id"]
        for row in found["train"]
        if len(ChatML().apply_chat_template(row["prompt"], add_generation_prompt=True)) <= 230
    ]
    assert [row["env_extras"]["task_id"] for row in found["short"]] == fits
    assert 0 < len(fits) < 14
