"""The menu: one letter, one command, one submission."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.policies import InvertedPolicy
from skyrl_minisandbox.policies.policy import Message
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import grade
from skyrl_minisandbox.rewards.patch import take_patch
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds import load_scaffold
from skyrl_minisandbox.scaffolds.menu import SYSTEM, choice
from skyrl_minisandbox.tasks import load_tasks
from skyrl_minisandbox.tasks.toy import TASK_FILE, read_toy_tasks
from tests.scaffolds.conftest import Place, Played, play
from tests.small import small_task
from tests.support import needs

LETTERS = list("ABCD")


class Answers:
    """A policy that gives these texts, one after the other."""

    def __init__(self, *texts: str) -> None:
        self._texts = iter(texts)

    def query(self, messages: list[Message]) -> str:
        return next(self._texts)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" C\n", "C"), ("B.", "B"), ("`D`", "D"), ("**A**", "A"), ("(C) because", "C"), ("A sed", "A"),
        ("Because", ""), ("b", ""), ("E", ""), ("The answer is B", ""), ("", ""), ("AB", ""),
    ],
)  # fmt: skip
def test_an_answer_chooses_by_the_letter_that_it_begins_with(text: str, letter: str) -> None:
    assert choice(text, LETTERS) == letter


@pytest.mark.parametrize(("text", "letter"), [("B", "B"), ("E", "A"), ("F.", "B"), ("Because", "B"), ("\n@", "D")])
def test_with_any_answer_every_character_chooses(text: str, letter: str) -> None:
    assert choice(text, LETTERS, any_answer=True) == letter
    assert {choice(chr(code), LETTERS, any_answer=True) for code in range(ord("a"), ord("z"))} == set(LETTERS)
    assert choice("  ", LETTERS, any_answer=True) == ""


def test_a_task_without_a_menu_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match="task `small-1` lists no commands") as caught:
        load_scaffold("menu").run(small_task().public(), None, InvertedPolicy())  # type: ignore[arg-type]
    assert "tasks=toy" in caught.value.hint


Game = Callable[..., tuple[Played, str]]


@pytest.fixture
def game(store_directory: Path, cache_directory: Path) -> Iterator[Game]:
    """`game(task_id, *answers, **options)`: what was played, and the patch that is taken of it."""
    tasks = {task.id: task for task in load_tasks("toy")}
    store, cache = Store(store_directory), Cache(cache_directory)
    image = build_image(tasks["toy-mean"].recipe, store=store, cache=cache)
    with cache.checkout(image, store) as checkout:
        place = Place(tasks["toy-mean"], checkout)

        def run(task_id: str, *answers: str, **options: object) -> tuple[Played, str]:
            sandbox = place.open()
            played = play(load_scaffold("menu", **options), tasks[task_id], sandbox, Answers(*answers))
            assert played.submission.patch is None
            return played, take_patch(sandbox, place.open, "/testbed").patch

        yield run
        for sandbox in place.made:
            sandbox.close()


@pytest.mark.ci
@needs("userns", "overlay", "git")
def test_the_chosen_command_is_what_is_submitted(game: Game) -> None:
    played, patch = game("toy-mean", "A")
    assert [message["role"] for message in played.conversation] == ["system", "user", "assistant"]
    assert played.conversation[0]["content"] == SYSTEM
    assert played.conversation[1]["content"].startswith("`mean([1, 2])` is 1 and should be 1.5.\n\nA. sed -i ")
    assert "+    return sum(values) / len(values)" in patch
    _, other = game("toy-mean", "B")
    assert "+    return sum(values) % len(values)" in other


@pytest.mark.ci
@needs("userns", "overlay", "git")
def test_an_answer_without_a_letter_is_asked_again_or_chooses_where_any_does(game: Game) -> None:
    played, patch = game("toy-mean", "I think", "it is", "A")
    assert [m["content"] for m in played.conversation[2:]] == [
        "I think", "Answer with one letter, A, B, C, D.", "it is", "Answer with one letter, A, B, C, D.", "A",
    ]  # fmt: skip
    assert "values) / len" in patch
    assert played.policy.history_divergence == 0
    assert "values) / len" in game("toy-mean", "I", any_answer=True)[1]  # I is eight letters after A
    assert game("toy-mean", "", any_answer=True)[1] == ""


@pytest.mark.ci
@needs("userns", "overlay", "git")
def test_the_right_letters_are_paid_and_only_they(store_directory: Path, cache_directory: Path, game: Game) -> None:
    store, cache = Store(store_directory), Cache(cache_directory)
    rows = read_toy_tasks(TASK_FILE)[::2]  # the others differ in nothing that a sandbox sees; test_toy.py has all
    tasks = {task.id: task for task in load_tasks("toy")}
    image = build_image(tasks["toy-mean"].recipe, store=store, cache=cache)
    with cache.checkout(image, store) as checkout:
        for number, row in enumerate(rows):
            right = LETTERS.index(row.right)
            wrong = LETTERS[(right + 1 + number % 3) % 4]
            paid = [(row.right, Outcome.RESOLVED)] + [(wrong, Outcome.UNRESOLVED)] * (number % 4 == 0)
            for letter, outcome in paid:
                _, patch = game(row.id, letter)
                report = grade(tasks[row.id], patch, lambda: Sandbox(checkout.sandbox_spec()))
                assert report.outcome is outcome, f"{row.id} {letter}: {report.error}"
