"""From the name of a source to tasks, and what is said where that leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest

from skyrl_minisandbox.errors import InputError, PluginError
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.tasks import Task, Tests, load_tasks
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker

made: list[str] = []


def own_family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    def maker(name: str) -> TaskMaker:
        def make() -> Task:
            made.append(name)
            return Task(
                id=name,
                problem_statement="It is broken.",
                recipe=Recipe(base=options.base or "host", python=options.python),
                tests=Tests(patch="", files=(), command="true", fail_to_pass=("t",), pass_to_pass=()),
                gold_patch="",
            )

        return make

    return {name: maker(name) for name in ("one", "two", "three")}


OWN = f"{__name__}.own_family"


def test_a_dotted_path_is_a_source_of_ones_own() -> None:
    assert [task.id for task in load_tasks(OWN)] == ["one", "two", "three"]


def test_only_the_asked_tasks_are_made_in_the_asked_order() -> None:
    made.clear()
    assert [task.id for task in load_tasks(OWN, ids=["three", "one", "three"])] == ["three", "one"]
    assert sorted(made) == ["one", "three"]


def test_base_and_python_reach_the_recipe() -> None:
    [task] = load_tasks(OWN, ids=["one"], base="debian", python="3.12")
    assert (task.recipe.base, task.recipe.python) == ("debian", "3.12")


def test_an_unknown_id_lists_near_names() -> None:
    with pytest.raises(InputError, match=r"unknown task id `click-8\.1\.3`") as caught:
        load_tasks("pypi", ids=["click-8.1.3"])
    assert "click-8.1.2" in caught.value.hint


def test_an_unknown_id_without_near_names_shows_what_there_is() -> None:
    with pytest.raises(InputError, match=r"unknown task ids `xyz`, `zyx`") as caught:
        load_tasks(OWN, ids=["one", "xyz", "zyx"])
    assert "one, two, three" in caught.value.hint


def test_an_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match="unknown task source `pipy`; known: pypi, swebench, toy"):
        load_tasks("pipy")


def test_importing_the_room_imports_neither_pydantic_nor_yaml() -> None:
    code = "import skyrl_minisandbox.tasks, sys; print(sorted({'pydantic', 'yaml', 'requests'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_task_survives_its_json() -> None:
    [task] = load_tasks(OWN, ids=["one"])
    again = Task.model_validate_json(task.model_dump_json())
    assert again == task
    assert again.digest() == task.digest()
