"""Real SWE-bench instances, built on `debian` from local clones, graded as the dataset says.

MINISANDBOX_ROWS=FILE has their rows, MINISANDBOX_REPOS=DIR the clones; neither can be part of this repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skyrl_minisandbox.images import Cache, Image, Store, build_image
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import TestReport, grade
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks import Task, load_tasks
from tests.support import find_python, needs, require

pytestmark = [
    pytest.mark.night,
    needs("root", "network", "mmdebstrap", "git"),
    pytest.mark.skipif(
        not (os.environ.get("MINISANDBOX_ROWS") and os.environ.get("MINISANDBOX_REPOS")),
        reason="MINISANDBOX_ROWS=FILE and MINISANDBOX_REPOS=DIR name no real instances",
    ),
]

# How many tests are in fail-to-pass and pass-to-pass: all of them pass with the gold patch, and none of the
# first without it.
INSTANCES = {"pallets__flask-5014": (1, 59), "pytest-dev__pytest-5809": (1, 3)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Cache]:
    folder = tmp_path_factory.mktemp("images")
    return Store(folder / "store"), Cache(folder / "cache")


@pytest.mark.parametrize("instance_id", INSTANCES)
def test_an_instance_builds_and_grades_as_recorded(instance_id: str, place: tuple[Store, Cache]) -> None:
    [task] = load_tasks(
        "swebench",
        path=os.environ["MINISANDBOX_ROWS"],
        repos=os.environ["MINISANDBOX_REPOS"],
        ids=[instance_id],
    )
    require(f"python{task.recipe.python}")
    store, cache = place
    python = find_python(task.recipe.python or "")
    image = build_image(task.recipe, store=store, cache=cache, pythons=[str(python)], name=task.id)
    gold = judge(task, task.gold_patch, image, place)
    empty = judge(task, "", image, place)
    assert (gold.outcome, empty.outcome) == (Outcome.RESOLVED, Outcome.UNRESOLVED)
    assert (len(gold.fail_to_pass), len(gold.pass_to_pass)) == INSTANCES[instance_id]
    assert not any(empty.fail_to_pass.values())
    assert all(empty.pass_to_pass.values())
    assert judge(task, task.gold_patch, image, place).tests == gold.tests


def judge(task: Task, patch: str, image: Image, place: tuple[Store, Cache]) -> TestReport:
    store, cache = place
    with cache.checkout(image, store) as checkout:
        spec = checkout.sandbox_spec()
        return grade(task, patch, lambda: Sandbox(spec), run_empty=True)


def test_a_missing_clone_is_an_error_that_names_what_was_expected(place: tuple[Store, Cache], tmp_path: Path) -> None:
    from skyrl_minisandbox.errors import InputError

    [task] = load_tasks(
        "swebench", path=os.environ["MINISANDBOX_ROWS"], repos=tmp_path, ids=["pytest-dev__pytest-7205"]
    )
    require(f"python{task.recipe.python}")
    store, cache = place
    python = find_python(task.recipe.python or "")
    with pytest.raises(InputError, match="pytest-dev__pytest") as caught:
        build_image(task.recipe, store=store, cache=cache, pythons=[str(python)], name=task.id)
    assert "tasks.repos" in caught.value.hint
