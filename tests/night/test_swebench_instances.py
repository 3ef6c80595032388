"""Real SWE-bench instances, built on `debian` from local clones, graded in both modes.

MINISANDBOX_ROWS=FILE has their rows, MINISANDBOX_REPOS=DIR the clones; neither can be part of this repository.
MINISANDBOX_IMAGES=DIR keeps the images for the next time: building all of them takes about an hour.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from skyrl_minisandbox.cli.gates import reachable_future
from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.images import Cache, Checkout, Store, build_image
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import TestReport, grade
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.wrong import wrong_patch
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

# How many tests are in fail-to-pass and in pass-to-pass. All of them pass with the gold patch; without it none of the
# first and all of the second, but for EMPTY.
INSTANCES = {
    "django__django-12155": (1, 6),
    "django__django-12419": (1, 0),
    "django__django-13023": (2, 9),
    "django__django-13212": (5, 2),
    "django__django-14376": (3, 6),
    "django__django-15572": (1, 10),
    "django__django-16136": (2, 7),
    "django__django-16901": (1, 6),
    "django__django-16950": (1, 3),
    "mwaskom__seaborn-3069": (2, 94),
    "pallets__flask-5014": (1, 59),
    "pydata__xarray-7393": (2, 71),
    "pylint-dev__pylint-6903": (1, 8),
    "pylint-dev__pylint-8898": (1, 18),
    "pytest-dev__pytest-10356": (1, 79),
    "pytest-dev__pytest-5631": (1, 15),
    "pytest-dev__pytest-5809": (1, 3),
    "pytest-dev__pytest-7205": (10, 16),
    "pytest-dev__pytest-7236": (1, 51),
    "sphinx-doc__sphinx-10449": (1, 30),
    "sphinx-doc__sphinx-10673": (1, 9),
    "sphinx-doc__sphinx-7440": (1, 12),
    "sympy__sympy-11618": (1, 4),
    "sympy__sympy-18189": (1, 41),
    "sympy__sympy-20916": (1, 1),
}
EMPTY = {"pylint-dev__pylint-8898": (0, 17)}

# The same in protected mode, where it says more. A test whose only failures are subtests prints no verdict before
# Python 3.11, so that the next test stands on its line and the log's parser misses it. That test does pass without
# the gold patch: it is in fail-to-pass because of the log alone.
EMPTY_BY_CHANNEL = {
    "django__django-13023": (1, 9),
    "django__django-14376": (1, 6),
    "django__django-16136": (1, 7),
}

# Tests that need more than a sandbox without a network has: httpbin, and an address that never answers. With both,
# gold is resolved; without, these tests fail whatever the patch does.
NEEDS_A_NETWORK = {"psf__requests-1921": 43, "psf__requests-2931": 2}

Place = tuple[Store, Cache]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    kept = os.environ.get("MINISANDBOX_IMAGES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    return Store(folder / "store"), Cache(folder / "cache")


def load(instance_id: str) -> Task:
    [task] = load_tasks(
        "swebench",
        path=os.environ["MINISANDBOX_ROWS"],
        repos=os.environ["MINISANDBOX_REPOS"],
        ids=[instance_id],
    )
    return task


def checkout(task: Task, place: Place) -> Checkout:
    """Its image, built if need be, ready for sandboxes."""
    require(f"python{task.recipe.python}")
    store, cache = place
    python = find_python(task.recipe.python or "")
    image = build_image(task.recipe, store=store, cache=cache, pythons=[str(python)], name=task.id)
    return cache.checkout(image, store)


def judge(task: Task, patch: str, made: Checkout) -> dict[str, TestReport]:
    """The reports of both modes."""
    spec = made.sandbox_spec()
    return {
        mode: grade(task, patch, lambda: Sandbox(spec), grading=GradingConfig(mode=mode), run_empty=True)
        for mode in ("official", "protected")
    }


def passed(report: TestReport) -> Mapping[str, bool]:
    return {**report.fail_to_pass, **report.pass_to_pass}


def counts(report: TestReport) -> tuple[int, int]:
    return sum(report.fail_to_pass.values()), sum(report.pass_to_pass.values())


def assert_agreement(reports: Mapping[str, TestReport]) -> None:
    official, protected = reports["official"], reports["protected"]
    assert protected.outcome == official.outcome, (official.error, protected.error)
    differ = {name for name, good in passed(official).items() if passed(protected)[name] != good}
    # What the log does not tell of at all, the channel may: see EMPTY_BY_CHANNEL.
    assert differ <= set(official.missing), protected.log
    assert all(passed(protected)[name] for name in differ)


@pytest.mark.parametrize("instance_id", INSTANCES)
def test_an_instance_builds_and_both_modes_grade_it_as_recorded(instance_id: str, place: Place) -> None:
    task = load(instance_id)
    with checkout(task, place) as made:
        with Sandbox(made.sandbox_spec()) as sandbox:
            assert reachable_future(sandbox, task.recipe.workdir) == []
        gold = judge(task, task.gold_patch, made)
        assert_agreement(gold)
        assert gold["protected"].outcome is Outcome.RESOLVED, gold["protected"].error
        assert counts(gold["official"]) == counts(gold["protected"]) == INSTANCES[instance_id]
        assert len(gold["protected"].canaries) >= 2 and all(canary.right for canary in gold["protected"].canaries)
        empty = judge(task, "", made)
        assert_agreement(empty)
        assert empty["protected"].outcome is Outcome.UNRESOLVED
        recorded = EMPTY.get(instance_id, (0, INSTANCES[instance_id][1]))
        assert counts(empty["official"]) == recorded
        assert counts(empty["protected"]) == EMPTY_BY_CHANNEL.get(instance_id, recorded)
        # It may break more or less than the issue does; the modes must say the same of it.
        asked = "\n".join([task.problem_statement, *task.tests.fail_to_pass, task.tests.patch])
        assert_agreement(judge(task, wrong_patch(task.gold_patch, asked), made))


@pytest.mark.parametrize("instance_id", NEEDS_A_NETWORK)
def test_an_instance_that_needs_a_network_is_told_by_the_tests_that_do(instance_id: str, place: Place) -> None:
    task = load(instance_id)
    with checkout(task, place) as made:
        gold = judge(task, task.gold_patch, made)
        assert_agreement(gold)
        assert gold["protected"].outcome is Outcome.UNRESOLVED
        assert len(gold["protected"].failed) == NEEDS_A_NETWORK[instance_id]
        assert "ConnectionError" in gold["protected"].log
        assert all(canary.right for canary in gold["protected"].canaries)
        assert_agreement(judge(task, "", made))


def test_every_row_is_accounted_for() -> None:
    lines = Path(os.environ["MINISANDBOX_ROWS"]).read_text("utf-8").splitlines()
    rows = [json.loads(line)["instance_id"] for line in lines if line.strip()]
    assert set(INSTANCES) | set(NEEDS_A_NETWORK) <= set(rows)


def test_a_missing_clone_is_an_error_that_names_what_was_expected(place: Place, tmp_path: Path) -> None:
    from skyrl_minisandbox.errors import InputError

    [task] = load_tasks(
        "swebench", path=os.environ["MINISANDBOX_ROWS"], repos=tmp_path, ids=["pytest-dev__pytest-7205"]
    )
    # Another commit, so that no image of an earlier night answers.
    repository = task.recipe.repository.model_copy(update={"commit": "0" * 40})  # type: ignore[union-attr]
    task = task.model_copy(update={"recipe": task.recipe.model_copy(update={"repository": repository})})
    with pytest.raises(InputError, match="pytest-dev__pytest") as caught, checkout(task, place):
        pass
    assert "tasks.repos" in caught.value.hint
