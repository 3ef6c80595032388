"""Where canaries go in files as real projects have them, and which commands leave room for them."""

from __future__ import annotations

import ast
import builtins
import random

import pytest

from skyrl_minisandbox.rewards.canaries import Planted, plant
from skyrl_minisandbox.tasks import Tests

SOURCE = "def test_one():\n    assert 1 + 1 == 2\n\n\ndef test_two():\n    assert 2 + 2 == 4\n"


def plant_into(source: str, seed: int, runner: str = "pytest", command: str = "pytest test_it.py") -> Planted:
    """One file, all of whose tests are listed."""
    names = []
    for node in ast.parse(source).body:
        methods = [one for one in getattr(node, "body", ()) if isinstance(one, ast.FunctionDef)]
        names += [f"test_it.py::{node.name}::{one.name}" for one in methods if isinstance(node, ast.ClassDef)]
        names += [f"test_it.py::{node.name}"] if isinstance(node, ast.FunctionDef) else []
    if runner == "sympy":
        names = [name.partition("::")[2] for name in names]
    tests = Tests(patch="", files=("test_it.py",), command=command, runner=runner, fail_to_pass=(names[0],),
                  pass_to_pass=tuple(names[1:]))  # fmt: skip
    return plant(runner, {"test_it.py": source}, tests, random.Random(seed))


@pytest.mark.parametrize(
    "command",
    [
        "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose test_it.py",
        "python -W ignore::UserWarning bin/test test_it.py",
        "python -Wignore::UserWarning bin/test test_it.py",
        "pytest -o filterwarnings=ignore::UserWarning test_it.py",
    ],
)
def test_a_warnings_filter_keeps_no_canary_out(command: str) -> None:
    assert len(plant_into(SOURCE, 0, "sympy", command).canaries) == 4


@pytest.mark.parametrize("command", ["pytest test_it.py::test_one", "pytest -k one test_it.py", "python -O t.py"])
def test_a_command_that_picks_tests_or_takes_the_asserts_away_gets_none(command: str) -> None:
    assert plant_into(SOURCE, 0, "sympy", command).canaries == ()


@pytest.mark.parametrize(
    "condition",
    [
        '@unittest.skipUnless(dependency, "is not there")\nclass TestIt(unittest.TestCase):',
        '@pytest.mark.skipif(not dependency, reason="is not there")\nclass TestIt:',
        'pytestmark = pytest.mark.skipif(not dependency, reason="is not there")\n\n\nclass TestIt:',
    ],
)
def test_a_condition_that_the_listed_tests_have_too_keeps_no_canary_out(condition: str) -> None:
    methods = "    def test_a(self):\n        assert dependency\n\n    def test_b(self):\n        assert dependency\n"
    source = f"import unittest\nimport pytest\n\ndependency = True\n\n\n{condition}\n{methods}"
    assert len(plant_into(source, 0).canaries) == 4


DESCRIBED = '''\
from django.test import TestCase


class UUIDTests(TestCase):
    def test_first(self):
        """
        #24377 - A [parent] should be ignored,
        as it is made anew.
        """
        self.assertEqual(1 + 1, 2)

    def test_second(self):
        """What two tests say of themselves."""

    def test_third(self):
        """What two tests say of themselves."""
'''


def test_a_class_of_django_whose_tests_are_listed_by_their_docstrings_gets_canaries() -> None:
    path = "tests/model_formsets/test_uuid.py"
    for listed, count in (("#24377 - A [parent] should be ignored,", 4), ("What two tests say of themselves.", 0)):
        tests = Tests(patch="", files=(path,), command="", runner="django", fail_to_pass=(listed,), pass_to_pass=())
        canaries = plant("django", {path: DESCRIBED}, tests, random.Random(1)).canaries
        assert len(canaries) == count
        assert all(one.names[0].endswith(" (model_formsets.test_uuid.UUIDTests)") for one in canaries)


SELF_AWARE = """\
import inspect

import pytest


def test_first():
    assert inspect.getsource(test_first).startswith("def")


class TestLast:
    def test_one(self):
        assert inspect.getsource(pytest)

    def test_two(self):
        assert inspect.getsource(inspect)
"""


def test_what_goes_to_the_end_of_a_file_goes_where_it_was_meant_to() -> None:
    for seed in range(40):
        planted = plant_into(SELF_AWARE, seed)
        module = ast.parse(planted.sources["test_it.py"])
        there = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        last = next(node for node in module.body if isinstance(node, ast.ClassDef))
        there |= {f"{last.name}::{node.name}" for node in last.body if isinstance(node, ast.FunctionDef)}
        assert {one.names[0].partition("::")[2] for one in planted.canaries} <= there
        assert planted.sources["test_it.py"].startswith(SELF_AWARE.rstrip())


LINTED = f'''\
"""Tests of a linter that it runs over themselves."""
import os

from linter import run


def test_this_file() -> None:
    assert run([os.path.abspath(__file__)]) == 0


def test_this_file_again() -> None:
    options = ["--jobs", "2", os.path.abspath(__file__)]
    assert run(options) == 0


# {"x" * 77}
'''


@pytest.mark.parametrize("seed", range(40))
def test_a_linter_that_reads_the_test_file_finds_nothing_in_canaries(seed: int) -> None:
    text = plant_into(LINTED, seed).sources["test_it.py"]
    assert max(map(len, text.split("\n"))) <= 79 and " % (" not in text
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    assert not [node.id for node in names if isinstance(node.ctx, ast.Store) and hasattr(builtins, node.id)]
