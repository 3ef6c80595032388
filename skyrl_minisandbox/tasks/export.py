"""Tasks as the rows of a SkyRL dataset: which of them, which are for validation, and the parquet files.

A row is what SkyRL's `PromptDataset` reads. `prompt` and `env_class` are its own; all other columns reach the Env as
`extras`:

    prompt        the problem statement as one user message. The model never sees it: the scaffold's first messages,
                  made when the Env is opened, stand in its place. It is what `trainer.max_prompt_length` measures.
    env_class     `minisandbox`
    reward_spec   {method: rule, ground_truth: ""}, for tools that expect it; the reward is made by the task's tests
    data_source   of the figures (`eval/SOURCE/…`): the dataset family
    task_id       names the rollouts
    task          the whole Task as JSON text. It is for the Env and goes no further: a scaffold gets its public part
    repository    what the task is about; the split goes by it
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import InputError, MachineError, TaskError
from skyrl_minisandbox.images.recipe import GitCommit
from skyrl_minisandbox.tasks.task import Task

ENV_CLASS = "minisandbox"
"""The Env's id in skyrl_gym (`env.ENV_ID`)."""

SPLITS = ("repository", "task")


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which tasks to take; those that fail one are left out and counted by its words.

    match: a regular expression found somewhere in the id; "" for any.
    min_tests, max_tests: fail-to-pass and pass-to-pass tests together. max_characters: of the problem statement.
        None: no bound.

    Raises `InputError` for what is no regular expression.
    """

    match: str = ""
    min_tests: int | None = None
    max_tests: int | None = None
    max_characters: int | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise InputError(
                f"`match={self.match}` is no regular expression: {error}", hint="match='^(click|jinja2)-'"
            ) from None

    def against(self, task: Task) -> str:
        """Why the task is left out, in a few words; "" when it is taken."""
        count = len(task.tests.fail_to_pass) + len(task.tests.pass_to_pass)
        if not re.search(self.match, task.id):
            return "other ids"
        if self.min_tests is not None and count < self.min_tests:
            return f"below {self.min_tests} tests"
        if self.max_tests is not None and count > self.max_tests:
            return f"above {self.max_tests} tests"
        if self.max_characters is not None and len(task.problem_statement) > self.max_characters:
            return f"above {self.max_characters} characters"
        return ""


def repository(task: Task) -> str:
    """What a task is about: `owner/name`, a project of the package index, else `recipe-` and its recipe's digest."""
    source = task.recipe.repository
    if source is None:
        return f"recipe-{task.recipe.digest()[:12]}"
    return source.repo if isinstance(source, GitCommit) else source.package


def split(
    tasks: Sequence[Task], *, fraction: float, seed: int, by: str = "repository"
) -> tuple[list[Task], list[Task]]:
    """The tasks for training and those for validation, each in the order of `tasks`.

    fraction: of the tasks that go to validation; at least one does unless it is 0. by: `repository`: all tasks of a
        repository stay together, so that validation asks about code that was never trained on, and gets the number of
        tasks that whole repositories come nearest to from below; where the smallest is too large, that one. `task`:
        each for itself.
    seed: decides which. A task that is added or removed moves few others, as each has its own place in line.

    Raises `InputError` where nothing would be left to train on.
    """
    if fraction <= 0:
        return list(tasks), []
    if fraction >= 1:
        return [], list(tasks)
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(repository(task) if by == "repository" else task.id, []).append(task)
    if len(groups) < 2:
        known = f"all {len(tasks)} tasks are of one repository" if by == "repository" else "there is one task"
        hint = "split=task, or val_fraction=0" if by == "repository" and len(tasks) > 1 else "val_fraction=0"
        raise InputError(f"{known}, so they cannot be split", hint=hint)
    wanted = max(1, round(fraction * len(tasks)))
    line = sorted(groups, key=lambda name: _place(seed, name))
    chosen: set[str] = set()
    taken = 0
    for name in line:
        if taken + len(groups[name]) <= wanted and len(chosen) < len(groups) - 1:
            chosen.add(name)
            taken += len(groups[name])
    if not chosen:
        chosen.add(min(line, key=lambda name: len(groups[name])))
    held = {task.id for name in chosen for task in groups[name]}
    return [task for task in tasks if task.id not in held], [task for task in tasks if task.id in held]


def _place(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def row(task: Task, source: str) -> dict[str, Any]:
    """A task's row; the head of this module says what is in it. source: where the task names none.

    Raises `TaskError` when its problem statement holds its solution or its tests.
    """
    for word, patch in (("gold patch", task.gold_patch), ("hidden tests", task.tests.patch)):
        if patch.strip() and patch.strip() in task.problem_statement:
            raise TaskError(
                f"the problem statement of task `{task.id}` holds its {word}",
                hint=f"leave it out: match='^(?!{re.escape(task.id)}$)'",
            )
    return {
        "prompt": [{"role": "user", "content": task.problem_statement}],
        "env_class": ENV_CLASS,
        "reward_spec": {"method": "rule", "ground_truth": ""},
        "data_source": task.source or source,
        "task_id": task.id,
        "task": task.model_dump_json(),
        "repository": repository(task),
    }


def write(files: Iterable[tuple[Path, Sequence[dict[str, Any]]]]) -> None:
    """Write parquet files, all of them or none; the same rows make the same bytes under the same pyarrow.

    Raises `InputError` where one exists or pyarrow is missing, `MachineError` where one cannot be written.
    """
    files = list(files)
    arrow, parquet = _pyarrow()
    for path, _ in files:
        if path.exists():
            raise InputError(f"{path} exists, and is not overwritten", hint="another out=DIR, or remove it")
    text = arrow.string()
    schema = arrow.schema(
        [
            ("prompt", arrow.list_(arrow.struct([("role", text), ("content", text)]))),
            ("env_class", text),
            ("reward_spec", arrow.struct([("method", text), ("ground_truth", text)])),
            ("data_source", text),
            ("task_id", text),
            ("task", text),
            ("repository", text),
        ]
    )
    made: list[Path] = []  # removed again unless all goes well
    try:
        for path, rows in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.append(aside := _aside(path))
            # Small groups of rows: a task is up to a megabyte, and a reader holds a whole group.
            table = arrow.Table.from_pylist(list(rows), schema)
            parquet.write_table(table, aside, compression="zstd", row_group_size=64)
        for path, _ in files:
            _aside(path).rename(path)
            made.append(path)
        made.clear()
    except OSError as error:
        where = error.filename or files[0][0].parent
        raise MachineError(f"{where} cannot be written: {error.strerror or error}", hint="another out=DIR") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            "writing parquet needs pyarrow, which is not installed",
            hint="pip install 'skyrl-minisandbox[export]'; SkyRL brings it too",
        ) from None
    return pyarrow, parquet
