"""What `minisandbox validate` found out about a task, and loading only the tasks that passed.

A file of it is made on one machine and read on another, so a row names the task by its digest: a task whose
recipe, tests or patches were changed since is not the one that passed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.tasks.rows import parse_row
from skyrl_minisandbox.tasks.task import Task

GATES = ("empty_fails", "gold_passes", "repeats", "no_future")
"""What a task must pass before anything is trained on it."""

Failure = Literal[
    "", "build_failed", "timeout", "empty_passes", "gold_fails", "flaky", "future_reachable", "not_judged"
]

_HINT = "minisandbox validate tasks=… out=DIR writes DIR/validation.json"


class Validation(BaseModel):
    """One task's row.

    task_digest, image_digest: what was judged; no image where it could not be built. grading: how, as
        `GradingConfig` has it.
    valid: every gate was passed. failure: the class of what is wrong, "" when valid; `not_judged` is a fault
        of ours, and says nothing about the task.
    empty_fails, gold_passes, repeats, no_future: the gates; None where one could not be tried.
    flaky: tests of the lists that came out now so, now so: dropped from them, and the gates hold without them.
    already_pass: fail-to-pass tests that pass without the patch, though others do not.
    reported: the reports below were asked for. They are no gates.
    wrong_fails: a patch that only looks like the solution is not resolved; None: there is none.
    modes_agree: both grading modes give gold, empty and wrong the same verdicts; differences: where not.
    order: `shuffled` or `reversed`, "" where the runner has no such order. order_matters: tests that come out
        otherwise then.
    needs_network: gold fails without and passes with one; None where that tells nothing. Grading has none.
    runs: how often the tests were run. seconds: of one grading of gold. total_seconds: of all.
    error: one sentence of why it is not valid. log: the lines of the log that show it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_id: str
    task_digest: str
    image_digest: str = ""
    grading: dict[str, Any] = {}
    valid: bool = False
    failure: Failure = ""
    empty_fails: bool | None = None
    gold_passes: bool | None = None
    repeats: bool | None = None
    no_future: bool | None = None
    flaky: tuple[str, ...] = ()
    already_pass: tuple[str, ...] = ()
    reported: bool = False
    wrong_fails: bool | None = None
    modes_agree: bool | None = None
    differences: tuple[str, ...] = ()
    order: str = ""
    order_matters: tuple[str, ...] = ()
    needs_network: bool | None = None
    runs: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    error: str = ""
    log: tuple[str, ...] = ()

    def gates(self) -> list[bool | None]:
        """The gates in the order of `GATES`."""
        return [getattr(self, gate) for gate in GATES]


def read_validation(path: Path) -> dict[str, Validation]:
    """The rows of a `validation.json` or `.jsonl` by task id; of several for one task the last.

    path: the file, or the directory that has it. Raises `InputError` that names the row and the field.
    """
    file = path / "validation.json" if path.is_dir() else path
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tasks.validation={path} cannot be read: {error}", hint=_HINT) from error
    try:
        data = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise InputError(f"tasks.validation={path} is not JSON: {error}", hint=_HINT) from None
    if not isinstance(data, list):
        raise InputError(f"tasks.validation={path} is not a list of rows", hint=_HINT)
    rows = [
        parse_row(Validation, row, f"row {number} of {file.name}", hint=_HINT) for number, row in enumerate(data, 1)
    ]
    return {row.task_id: row for row in rows}


def passed_ids(rows: dict[str, Validation], ids: Sequence[str], *, asked: bool, source: str) -> list[str]:
    """Of `ids` those that passed. asked: the user named them, so that one which did not is an `InputError`."""
    passed = [task_id for task_id in ids if task_id in rows and rows[task_id].valid]
    left = [task_id for task_id in ids if task_id not in passed]
    if left and asked:
        row = rows.get(left[0])
        why = f"{row.failure}: {row.error}" if row is not None else "it was not validated"
        others = f"; {len(left) - 1} others of tasks.ids neither" if len(left) > 1 else ""
        raise InputError(
            f"task `{left[0]}` has not passed validation ({why}){others}",
            hint="leave it out of tasks.ids, or set tasks.validation= to take it all the same",
        )
    if not passed:
        raise InputError(f"no task of `{source}` has passed validation", hint=_HINT)
    return passed


def without_flaky(task: Task, row: Validation) -> Task:
    """The task as it passed: flaky tests are in `Tests.flaky` and in no list.

    Raises `InputError` when it is not the task that was judged.
    """
    if task.digest() != row.task_digest:
        raise InputError(
            f"task `{task.id}` is not the one that passed validation: its recipe, tests or patches are others",
            hint="with tasks.validation go the tasks.base, tasks.python and tasks.path of that validation; "
            "or validate again",
        )
    return drop(task, row.flaky)


def drop(task: Task, flaky: Sequence[str]) -> Task:
    """The task without these tests in its lists."""
    if not flaky:
        return task
    tests = task.tests
    left = {
        "fail_to_pass": tuple(name for name in tests.fail_to_pass if name not in flaky),
        "pass_to_pass": tuple(name for name in tests.pass_to_pass if name not in flaky),
        "flaky": tuple(dict.fromkeys([*tests.flaky, *flaky])),
    }
    return task.model_copy(update={"tests": tests.model_copy(update=left)})
