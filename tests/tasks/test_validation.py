"""Loading only what passed validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker
from skyrl_minisandbox.tasks.load import task_ids
from skyrl_minisandbox.tasks.validation import Validation, read_validation
from tests.small import small_task

FAMILY = f"{__name__}.family"
IDS = ["good", "unsteady", "solved", "unknown"]


def family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    """Four small tasks; `python` stands for any option that makes another task of them."""

    def maker(task_id: str) -> TaskMaker:
        def make() -> Task:
            task = small_task(task_id)
            recipe = task.recipe.model_copy(update={"python": options.python})
            return task.model_copy(update={"recipe": recipe})

        return make

    return {task_id: maker(task_id) for task_id in IDS}


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """`good` and `unsteady` (one of its tests is flaky) passed, `solved` did not, `unknown` was not looked at."""
    good, unsteady, solved = (task.digest() for task in load_tasks(FAMILY)[:3])
    rows = [
        Validation(task_id="good", task_digest=good, valid=True),
        Validation(task_id="unsteady", task_digest=unsteady, valid=True, flaky=("check.sh::other",)),
        Validation(task_id="solved", task_digest=solved, failure="empty_passes", error="passes without a patch: a"),
    ]
    path = tmp_path / "validation.json"
    path.write_text(json.dumps([row.model_dump(mode="json") for row in rows]))
    return path


def test_only_tasks_that_passed_are_loaded_and_their_flaky_tests_decide_nothing(validation: Path) -> None:
    good, unsteady = load_tasks(FAMILY, validation=validation)
    assert good == small_task("good")
    assert (unsteady.tests.pass_to_pass, unsteady.tests.flaky) == ((), ("check.sh::other",))
    assert unsteady.tests.fail_to_pass == ("check.sh::answer",)
    assert task_ids(FAMILY, validation=validation) == ["good", "unsteady"]
    assert task_ids(FAMILY) == IDS


def test_the_directory_of_a_validation_stands_for_its_file_and_jsonl_is_read_too(validation: Path) -> None:
    lines = [json.dumps(row) for row in json.loads(validation.read_text())]
    # As a resumed validation appends: the last row of a task is the one that counts.
    again = Validation(task_id="good", task_digest="0" * 64, failure="flaky").model_dump_json()
    (validation.parent / "rows.jsonl").write_text("\n".join([*lines, again]) + "\n")
    assert read_validation(validation.parent) == read_validation(validation)
    assert task_ids(FAMILY, validation=validation.parent / "rows.jsonl") == ["unsteady"]


@pytest.mark.parametrize(
    ("task_id", "why"),
    [("solved", "empty_passes: passes without a patch: a"), ("unknown", "it was not validated")],
)
def test_a_task_that_is_asked_for_and_has_not_passed_is_named_with_the_reason(
    validation: Path, task_id: str, why: str
) -> None:
    with pytest.raises(InputError) as raised:
        load_tasks(FAMILY, ids=["good", task_id], validation=validation)
    assert raised.value.message == f"task `{task_id}` has not passed validation ({why})"


def test_a_task_that_was_changed_since_is_not_the_one_that_passed(validation: Path) -> None:
    with pytest.raises(InputError, match="task `good` is not the one that passed validation"):
        load_tasks(FAMILY, validation=validation, python="3.12")


def test_no_task_that_passed_is_an_error(validation: Path) -> None:
    validation.write_text("[]")
    with pytest.raises(InputError, match=r"no task of .* has passed validation"):
        load_tasks(FAMILY, validation=validation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is not a list of rows"),
        ('[{"task_id": "a"}]', "row 1 of validation.json has no field `task_digest`"),
        ('[{"task_id": "a", "task_digest": "", "vallid": 1}]', "has an unknown field `vallid`; near it: `valid`"),
        ('[{"task_id": "a", "task_digest": "", "failure": "bad"}]', "field `failure`"),
    ],
)
def test_a_file_that_is_no_validation_is_told_with_row_and_field(validation: Path, text: str, message: str) -> None:
    validation.write_text(text)
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as raised:
        load_tasks(FAMILY, validation=validation)
    assert "minisandbox validate" in raised.value.hint
