"""Which tasks become rows, which are held out, and what a row holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.env import ENV_ID, find_task
from skyrl_minisandbox.errors import InputError, MachineError, TaskError
from skyrl_minisandbox.images.recipe import GitCommit, Recipe, Sdist
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.export import ENV_CLASS, Filters, repository, row, split, write
from tests.small import small_task


def of(name: str, task_id: str) -> Task:
    """A task of the repository `o/NAME`."""
    commit = GitCommit(repo=f"o/{name}", commit="0" * 40, clone="/elsewhere")
    return small_task(task_id).model_copy(update={"recipe": Recipe(repository=commit)})


TASKS = [of(f"r{number % 10}", f"t{number}") for number in range(100)] + [of("large", f"l{n}") for n in range(100)]


def ids(tasks: list[Task]) -> list[str]:
    return [task.id for task in tasks]


@pytest.mark.parametrize("by", ["repository", "task"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5])
def test_every_task_is_in_one_part_and_the_order_is_kept(by: str, fraction: float) -> None:
    train, held = split(TASKS, fraction=fraction, seed=1, by=by)
    assert sorted(ids(train) + ids(held)) == sorted(ids(TASKS))
    for part in (train, held):
        assert ids(part) == [task.id for task in TASKS if task.id in set(ids(part))]
    if by == "task":
        assert len(held) == round(fraction * len(TASKS))


@pytest.mark.parametrize("seed", range(20))
def test_a_repository_is_on_one_side_and_validation_is_no_larger_than_asked(seed: int) -> None:
    train, held = split(TASKS, fraction=0.2, seed=seed)
    assert not {repository(task) for task in train} & {repository(task) for task in held}
    assert len(held) == 40  # four of ten tasks each; never the large one


def test_where_every_repository_is_too_large_the_smallest_is_held_out() -> None:
    _, held = split(TASKS, fraction=0.001, seed=0)
    assert len(held) == 10
    assert len({repository(task) for task in held}) == 1


def test_the_seed_alone_decides() -> None:
    first = [ids(split(TASKS, fraction=0.2, seed=seed, by="task")[1]) for seed in range(5)]
    assert first == [ids(split(TASKS, fraction=0.2, seed=seed, by="task")[1]) for seed in range(5)]
    assert len({tuple(one) for one in first}) == 5
    shuffled = list(reversed(TASKS))
    assert sorted(ids(split(shuffled, fraction=0.2, seed=0, by="task")[1])) == sorted(first[0])


def test_a_task_more_moves_few_others() -> None:
    before = set(ids(split(TASKS, fraction=0.2, seed=0, by="task")[1]))
    after = set(ids(split([*TASKS, of("new", "new")], fraction=0.2, seed=0, by="task")[1]))
    assert len(before ^ after) <= 2


def test_nothing_or_everything_may_be_held_out() -> None:
    assert split(TASKS, fraction=0, seed=0) == (TASKS, [])
    assert split(TASKS, fraction=1, seed=0) == ([], TASKS)


def test_one_repository_cannot_be_split_and_the_hint_says_by_what_it_can() -> None:
    with pytest.raises(InputError, match="all 2 tasks are of one repository") as caught:
        split([of("r", "a"), of("r", "b")], fraction=0.1, seed=0)
    assert caught.value.hint == "split=task, or val_fraction=0"
    assert len(split([of("r", "a"), of("r", "b")], fraction=0.1, seed=0, by="task")[1]) == 1
    with pytest.raises(InputError, match="there is one task") as caught:
        split([of("r", "a")], fraction=0.1, seed=0, by="task")
    assert caught.value.hint == "val_fraction=0"


def test_what_a_repository_is_called() -> None:
    sdist = Sdist(package="click", version="8.1.2", filename="click-8.1.2.tar.gz", sha256="0" * 64)
    assert repository(of("r", "a")) == "o/r"
    assert repository(small_task().model_copy(update={"recipe": Recipe(repository=sdist)})) == "click"
    assert repository(small_task("a")) == repository(small_task("b")) == "recipe-" + small_task().recipe.digest()[:12]


@pytest.mark.parametrize(
    ("filters", "why"),
    [
        (Filters(), ""), (Filters(match="^small"), ""), (Filters(match="1$"), ""), (Filters(match="^1"), "other ids"),
        (Filters(min_tests=2, max_tests=2), ""), (Filters(min_tests=3), "below 3 tests"),
        (Filters(max_tests=1), "above 1 tests"), (Filters(max_characters=1000), ""),
        (Filters(max_characters=5), "above 5 characters"),
    ],
)  # fmt: skip
def test_a_filter_says_what_it_leaves_out(filters: Filters, why: str) -> None:
    assert filters.against(small_task()) == why


def test_a_row_has_what_skyrl_reads_and_the_env_makes_the_same_task_of_it() -> None:
    [task] = load_tasks("toy", ids=["toy-slug"])
    made = row(task, "unused")
    assert made["prompt"] == [{"role": "user", "content": task.problem_statement}]
    assert (made["env_class"], made["data_source"], made["task_id"]) == (ENV_ID, "toy", "toy-slug")
    assert ENV_CLASS == ENV_ID
    assert json.loads(json.dumps(made)) == made  # SkyRL dumps the columns of evaluated rows as JSON
    assert find_task(EnvConfig(), {**made, "max_turns": 3}).digest() == task.digest()
    assert row(small_task(), "own")["data_source"] == "own"
    assert "/elsewhere" not in row(of("r", "a"), "own")["task"]  # a path of the building machine


@pytest.mark.parametrize("task", [*load_tasks("toy"), small_task()], ids=lambda task: task.id)
def test_the_prompt_holds_neither_the_solution_nor_the_tests(task: Task) -> None:
    [message] = row(task, "")["prompt"]
    for patch in (task.gold_patch, task.tests.patch):
        for line in patch.splitlines():
            if line.startswith("+") and len(line) > 20:
                assert line[1:].strip() not in message["content"]


@pytest.mark.parametrize(("field", "word"), [("gold_patch", "gold patch"), ("tests", "hidden tests")])
def test_a_statement_that_holds_its_solution_or_tests_is_refused(field: str, word: str) -> None:
    task = small_task()
    text = task.gold_patch if field == "gold_patch" else task.tests.patch
    spoilt = task.model_copy(update={"problem_statement": f"Apply this:\n\n{text}\nThanks."})
    with pytest.raises(TaskError, match=f"the problem statement of task `small-1` holds its {word}"):
        row(spoilt, "")


def read(path: Path) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return list(parquet.read_table(path).to_pylist())


def test_what_is_written_is_read_again_and_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [row(task, "") for task in TASKS]
    write([(tmp_path / "a" / "train.parquet", rows), (tmp_path / "a" / "validation.parquet", rows[:1])])
    write([(tmp_path / "b.parquet", rows)])
    assert read(tmp_path / "a" / "train.parquet") == rows
    assert read(tmp_path / "a" / "validation.parquet") == rows[:1]
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "a" / "train.parquet").read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.parquet", "validation.parquet"]


def test_a_file_that_is_there_is_not_overwritten_and_nothing_else_is_written(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "validation.parquet").write_text("precious")
    rows = [row(small_task(), "")]
    with pytest.raises(InputError, match=r"validation\.parquet exists, and is not overwritten"):
        write([(tmp_path / "train.parquet", rows), (tmp_path / "validation.parquet", rows)])
    assert [path.name for path in tmp_path.iterdir()] == ["validation.parquet"]


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "file").write_text("")
    rows = [row(small_task(), "")]
    with pytest.raises(MachineError, match="file cannot be written"):
        write([(tmp_path / "train.parquet", rows), (tmp_path / "file" / "validation.parquet", rows)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_pyarrow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow") as caught:
        write([(tmp_path / "x.parquet", [])])
    assert "pip install 'skyrl-minisandbox[export]'" in caught.value.hint
