"""The toy set: each task is mended by one of its commands and by no other."""

from __future__ import annotations

import collections
import subprocess
import unittest
from pathlib import Path
from typing import Any

import pytest
import yaml

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.toy import TASK_FILE, ToyTask, menu, read_toy_tasks

ROWS = {row.id: row for row in read_toy_tasks(TASK_FILE)}


def verdicts(row: ToyTask, source: str) -> dict[str, bool]:
    """The row's own tests on a text of its module, in this process."""
    module: dict[str, Any] = {}
    exec(source, module)
    test: dict[str, Any] = {}
    exec(row.test_source().replace(f"from {row.name} import {row.name}\n", ""), test | module, test)
    functions = {name: value for name, value in vars(test["Test"]).items() if name.startswith("test_")}
    found = {}
    for name, function in functions.items():
        function.__globals__.update(module)
        result = unittest.TestResult()
        test["Test"](name).run(result)
        found[str(test["Test"](name))] = result.wasSuccessful()
    return found


@pytest.mark.parametrize("task_id", ROWS)
def test_one_command_mends_the_module_and_no_other(task_id: str, tmp_path: Path) -> None:
    row, [task] = ROWS[task_id], load_tasks("toy", ids=[task_id])
    asked = {*task.tests.fail_to_pass, *task.tests.pass_to_pass}
    before = verdicts(row, row.source)
    assert {name for name, good in before.items() if good} == set(task.tests.pass_to_pass)
    mends = []
    for letter, command in menu(task.problem_statement).items():
        module = tmp_path / f"{row.name}.py"
        module.write_text(row.source)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        text = module.read_text()
        assert text != row.source, command
        after = verdicts(row, text)
        assert set(after) == asked
        if all(after.values()):
            mends.append(letter)
            assert text == row.mended_source()
    assert mends == [row.right]


def test_every_letter_is_right_as_often_so_that_none_is_worth_more() -> None:
    counts = collections.Counter(row.right for row in ROWS.values())
    assert counts == dict.fromkeys("ABCD", len(ROWS) // 4)


def test_all_tasks_share_one_image_and_nothing_of_it_comes_from_elsewhere() -> None:
    tasks = load_tasks("toy")
    assert len({task.recipe.digest() for task in tasks}) == 1
    assert load_tasks("toy", ids=["toy-slug"])[0].recipe == tasks[0].recipe
    recipe = tasks[0].recipe
    assert (recipe.base, recipe.python, recipe.packages, recipe.repository) == ("host", None, (), None)


def test_a_python_that_is_asked_for_and_another_base_are_taken() -> None:
    assert load_tasks("toy", python="3.12")[0].recipe.python == "3.12"
    assert load_tasks("toy", base="debian")[0].recipe.system_packages == ("python3",)
    assert load_tasks("toy", base="debian", python="3.12")[0].recipe.system_packages == ()


def test_the_statement_names_neither_the_hidden_tests_nor_the_right_letter() -> None:
    by_id: dict[str, Task] = {task.id: task for task in load_tasks("toy")}
    for task_id, row in ROWS.items():
        public = by_id[task_id].public().model_dump_json()
        assert "unittest.TestCase" not in public and "self.assert" not in public
        assert len(menu(by_id[task_id].problem_statement)) == len(row.commands)


def test_a_menu_begins_with_a_and_has_no_gap() -> None:
    assert menu("Issue.\n\nA. one\n  B. two\nD. four\nB. again\n") == {"A": "one", "B": "two"}
    assert menu("It is broken. B. or not.") == {}


def own(tmp_path: Path, **changes: Any) -> Path:
    row = ROWS["toy-mean"].model_dump() | changes
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump([{name: value for name, value in row.items() if value is not None}]))
    return file


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    [task] = load_tasks("toy", path=own(tmp_path, id="toy-mine", source="def mine(values):\n    return 1 // 2\n",
                                        commands=["// => /", "1 => 0"]))  # fmt: skip
    assert task.id == "toy-mine" and menu(task.problem_statement)["B"] == "sed -i 's/1/0/' mine.py"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"right": "E"}, r"`right: E` is none of its 4 commands"),
        ({"commands": ["nowhere => x", "// => /"]}, r"`nowhere` stands 0 times in the source, not once"),
        ({"commands": ["values => x", "// => /"]}, r"`values` stands 3 times in the source, not once"),
        ({"commands": ["// -> /", "// => /"]}, r"field `commands.0`: `// -> /` is no `find => put`"),
        ({"issue": None}, r"task 1 of own.yaml has no field `issue`"),
        ({"mend": {}}, r"has an unknown field `mend`; near it: `mended`"),
    ],
)
def test_a_bad_row_names_the_field(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        load_tasks("toy", path=own(tmp_path, **changes))


def test_a_file_that_is_none_and_an_id_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task file none\.yaml cannot be read"):
        load_tasks("toy", path=tmp_path / "none.yaml")
    file = tmp_path / "twice.yaml"
    file.write_text("{}")
    with pytest.raises(TaskError, match="is not a list of tasks"):
        load_tasks("toy", path=file)
    file.write_text(yaml.safe_dump([ROWS["toy-mean"].model_dump(mode="json")] * 2))
    with pytest.raises(TaskError, match=r"task 2 of twice\.yaml, field `id`: an earlier task is `toy-mean`"):
        load_tasks("toy", path=file)
