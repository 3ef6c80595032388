"""Names, keys and who may see what; gold, empty and wrong on real tasks."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable

import pytest

from skyrl_minisandbox.errors import InputError, PluginError
from skyrl_minisandbox.policies import InvertedPolicy
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import grade
from skyrl_minisandbox.scaffolds import Scaffold, Submission, load_scaffold, scaffold_class
from skyrl_minisandbox.tasks import Task
from tests.scaffolds.conftest import Place
from tests.small import GOLD, small_task

PYPI = sorted(
    file.name.removesuffix(".yaml")
    for file in importlib.resources.files("skyrl_minisandbox.tasks").joinpath("pypi_tasks").iterdir()
    if file.name.endswith(".yaml")
)
FAST = ["humanize-4.12.0", "click-8.1.2"]
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.ci) for name in PYPI]


class OwnScaffold(Scaffold):
    def __init__(self, *, text: str) -> None:
        self.text = text

    def run(self, task: object, sandbox: object, policy: object) -> Submission:
        return Submission(patch=self.text)


def submission(name: str, task: Task) -> Submission:
    scaffold = load_scaffold(name)
    return scaffold.run(task if scaffold.privileged else task.public(), None, InvertedPolicy())  # type: ignore[arg-type]


def test_a_scaffold_is_named_shortly_or_by_a_dotted_path() -> None:
    assert load_scaffold(f"{__name__}.OwnScaffold", text="x").run(None, None, None).patch == "x"  # type: ignore[arg-type]


def test_an_unknown_scaffold_lists_the_known() -> None:
    with pytest.raises(PluginError, match="empty, gold, menu, mini, wrong"):
        load_scaffold("magic")


def test_a_dotted_path_to_something_else_is_refused() -> None:
    with pytest.raises(PluginError, match="no subclass of Scaffold"):
        load_scaffold(f"{__name__}.submission")


def test_an_unknown_key_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"scaffold `gold` has no key `speed`; known: none"):
        load_scaffold("gold", speed=1)
    with pytest.raises(InputError, match="no key `wrds`; known: text"):
        load_scaffold(f"{__name__}.OwnScaffold", wrds="x")


def test_only_gold_and_wrong_see_more_than_the_public_part() -> None:
    assert {n for n in ("mini", "menu", "gold", "empty", "wrong") if scaffold_class(n).privileged} == {"gold", "wrong"}
    task = small_task()
    public = task.public()
    for name in ("gold", "wrong"):
        with pytest.raises(TypeError, match="public part"):
            load_scaffold(name).run(public, None, InvertedPolicy())  # type: ignore[arg-type]


def test_gold_submits_the_gold_patch_and_empty_nothing() -> None:
    assert submission("gold", small_task()).patch == GOLD
    assert submission("empty", small_task()).patch == ""


@pytest.mark.parametrize("task_id", EVERY)
def test_gold_solves_and_empty_and_wrong_do_not(place: Callable[[str], Place], task_id: str) -> None:
    here = place(task_id)
    gold = grade(here.task, submission("gold", here.task).patch or "", here.open)
    assert gold.outcome is Outcome.RESOLVED, gold.error
    empty = grade(here.task, submission("empty", here.task).patch or "", here.open, run_empty=True)
    assert empty.outcome is Outcome.UNRESOLVED
    assert all(not good for good in empty.fail_to_pass.values())
    patch = submission("wrong", here.task).patch or ""
    assert patch == submission("wrong", here.task).patch  # the same every time
    wrong = grade(here.task, patch, here.open)
    assert wrong.outcome is Outcome.UNRESOLVED, wrong.error  # so it applies
    assert not all(wrong.fail_to_pass.values())
