"""Which commands leave room for canaries: those that run whole files."""

from __future__ import annotations

import random

import pytest

from skyrl_minisandbox.rewards.canaries import plant
from skyrl_minisandbox.tasks import Tests

SOURCE = "def test_one():\n    assert 1 + 1 == 2\n\n\ndef test_two():\n    assert 2 + 2 == 4\n"


def planted(command: str) -> int:
    tests = Tests(patch="", files=("test_it.py",), command=command, runner="sympy", fail_to_pass=("test_one",),
                  pass_to_pass=("test_two",))  # fmt: skip
    return len(plant("sympy", {"test_it.py": SOURCE}, tests, random.Random(0)).canaries)


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
    assert planted(command) == 4


@pytest.mark.parametrize("command", ["pytest test_it.py::test_one", "pytest -k one test_it.py", "python -O t.py"])
def test_a_command_that_picks_tests_or_takes_the_asserts_away_gets_none(command: str) -> None:
    assert planted(command) == 0
