"""Canaries: what they leave alone, and that they come out as they must."""

from __future__ import annotations

import ast
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_minisandbox.rewards.canaries import Planted, plant
from skyrl_minisandbox.rewards.parsers import load_parser
from tests.rewards.planted import bare, listed, planted_corpus, without

CALC = '''\
"""A package under test."""


def add(a, b):
    return a + b


def parse(text):
    if not text.strip().isdigit():
        raise ValueError("no number: " + text)
    return int(text)


def spread(text):
    return list(text.partition("-"))
'''

FUNCTIONS = '''\
import pytest

import calc

WIDTH = 20


@pytest.fixture
def numbers():
    return [1, 2]


def test_add_small_numbers():
    total = calc.add(2, 5)
    assert total == 7


# A comment that belongs to what follows.
@pytest.mark.parametrize("text", ["1", "22"])
def test_parse_many(text):
    assert calc.parse(text) == int(text)

def test_spread_of_names():
    first, _, last = calc.spread("left-right")
    assert first == "left"
    assert [first, last] == ["left", "right"]


def test_parse_refuses_words():
    with pytest.raises(ValueError):
        calc.parse("seven")


def test_with_fixture(numbers):
    assert calc.add(*numbers) == 3


@pytest.mark.skip
def test_not_today():
    assert False


class TestSpread:
    """Methods."""

    def test_spread_empty(self):
        assert calc.spread("") == ["", "", ""]

    def test_spread_word(self):
        result = calc.spread("word")
        assert result == ["word", "", ""]


@pytest.mark.xfail
class TestBroken:
    def test_impossible(self):
        assert calc.add(1, 1) == 3


if __name__ == "__main__":
    pytest.main()
'''

CASES = """\
import unittest

import calc


class AddTests(unittest.TestCase):
    def setUp(self):
        self.base = 5

    def test_addTwo(self):
        self.assertEqual(calc.add(self.base, 2), 7)

    def test_parse_number(self):
        \"\"\"Numbers are read.\"\"\"
        value = calc.parse("12")
        self.assertEqual(value, 12)
        self.assertEqual(calc.spread("great-small"), ["great", "-", "small"])

    def test_parse_word(self):
        with self.assertRaises(ValueError):
            calc.parse("word")


@unittest.skip("not now")
class SkippedTests(unittest.TestCase):
    def test_nothing(self):
        self.fail()


if __name__ == "__main__":
    unittest.main()
"""

PYTEST_NAMES = (
    "test_functions.py::test_add_small_numbers",
    "test_functions.py::test_parse_many[1]",
    "test_functions.py::test_parse_many[22]",
    "test_functions.py::test_spread_of_names",
    "test_functions.py::test_parse_refuses_words",
    "test_functions.py::test_with_fixture",
    "test_functions.py::TestSpread::test_spread_empty",
    "test_functions.py::TestSpread::test_spread_word",
    "test_cases.py::AddTests::test_addTwo",
    "test_cases.py::AddTests::test_parse_number",
    "test_cases.py::AddTests::test_parse_word",
)

UNITTEST_NAMES = (
    "test_addTwo (test_cases.AddTests)",
    "Numbers are read.",
    "test_parse_word (test_cases.AddTests)",
    "test_parse_number (test_cases.AddTests)",
)

SOURCES = {"test_functions.py": FUNCTIONS, "test_cases.py": CASES}


# What stands there stays


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.ci)])
def test_a_planted_file_is_the_old_one_and_canaries(count: int) -> None:
    for path, text, planted in planted_corpus(count):
        (new,) = planted.sources.values()
        rest = without(ast.parse(new), bare(planted))
        assert ast.dump(rest) == ast.dump(ast.parse(text)), path
        assert set(text.split("\n")) <= set(new.split("\n")), path
        assert {c.must for c in planted.canaries} == {"fail", "pass"}, path


def test_line_numbers_stay_where_a_test_may_know_them() -> None:
    text = FUNCTIONS.replace("WIDTH = 20", "WIDTH = 20  # see inspect.currentframe().f_lineno")
    for seed in range(20):
        planted = plant("pytest", {"test_functions.py": text}, listed(*PYTEST_NAMES), random.Random(seed))
        new = ast.parse(planted.sources["test_functions.py"])
        assert bare(planted, "fail")
        rest = without(new, bare(planted))
        assert ast.dump(rest, include_attributes=True) == ast.dump(ast.parse(text), include_attributes=True)


def test_a_number_that_is_its_own_line_is_taken_for_one() -> None:
    text = FUNCTIONS + "\n" * (80 - FUNCTIONS.count("\n")) + "def test_where():\n    assert calc.line() == 82\n"
    planted = plant("pytest", {"test_functions.py": text}, listed(*PYTEST_NAMES), random.Random(1))
    assert planted.sources["test_functions.py"].startswith(text)


def test_line_ends_and_a_missing_last_one_are_kept() -> None:
    for text in (FUNCTIONS.replace("\n", "\r\n"), FUNCTIONS.rstrip("\n")):
        for seed in range(8):
            planted = plant("pytest", {"test_functions.py": text}, listed(*PYTEST_NAMES), random.Random(seed))
            new = planted.sources["test_functions.py"]
            assert new.count("\r\n") == (new.count("\n") if "\r\n" in text else 0)
            assert new.endswith(text[-3:])
            assert ast.dump(without(ast.parse(new), bare(planted))) == ast.dump(ast.parse(text))


def test_only_changed_files_are_given_back() -> None:
    other = "VALUE = 3\n"
    planted = plant("pytest", {**SOURCES, "test_other.py": other}, listed(*PYTEST_NAMES), random.Random(3))
    assert set(planted.sources) <= set(SOURCES) and planted.sources


# They come out as they must


SITE = str(Path(pytest.__file__).parents[1])
"""Where the pytest that runs this was installed: a user's interpreter has none of its own."""


def run(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": SITE, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def pytest_verdicts(directory: Path, sources: dict[str, str]) -> dict[str, str]:
    (directory / "calc.py").write_text(CALC)
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    for path, text in sources.items():
        (directory / path).write_bytes(text.encode())
    log = run(directory, "-m", "pytest", "-rA", "-p", "no:cacheprovider")
    return load_parser("pytest")(log, PYTEST_NAMES)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(2, 16))])
def test_under_pytest_they_come_out_as_they_must(tmp_path: Path, seed: int) -> None:
    before = pytest_verdicts(tmp_path, SOURCES)
    assert len(before) >= len(PYTEST_NAMES)
    planted = plant("pytest", SOURCES, listed(*PYTEST_NAMES), random.Random(seed))
    after = pytest_verdicts(tmp_path, {**SOURCES, **planted.sources})
    assert [c.must for c in planted.canaries].count("fail") >= 2
    for canary in planted.canaries:
        assert after.pop(canary.names[0]) == ("FAILED" if canary.must == "fail" else "PASSED")
    assert after == before


@pytest.mark.parametrize("runner", ["unittest", "django"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(2, 10))])
def test_under_unittest_they_come_out_as_they_must(tmp_path: Path, seed: int, runner: str) -> None:
    (tmp_path / "calc.py").write_text(CALC)
    planted = plant(runner, {"tests/test_cases.py": CASES}, listed(*UNITTEST_NAMES), random.Random(seed))
    (tmp_path / "test_cases.py").write_text(planted.sources["tests/test_cases.py"])
    log = run(tmp_path, "-m", "unittest", "-v", "test_cases")
    verdicts = load_parser("django")(log, ())
    assert sorted(c.must for c in planted.canaries) == ["fail", "fail", "pass", "pass"]
    for canary in planted.canaries:
        told = {verdicts.pop(name) for name in canary.names if name in verdicts}
        assert told <= ({"FAILED", "ERROR"} if canary.must == "fail" else {"PASSED"}) and told
    assert set(verdicts.values()) == {"PASSED", "SKIPPED"}


@pytest.mark.parametrize("seed", range(30))
def test_functions_for_sympys_runner_come_out_as_they_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    text = "from calc import *\n\n\n" + "".join(
        f"def test_{name}():\n    assert spread('{name}-x') == ['{name}', '-', 'x']\n\n" for name in ("one", "two")
    )
    (tmp_path / "calc.py").write_text(CALC)
    monkeypatch.syspath_prepend(tmp_path)
    planted = plant("sympy", {"pkg/tests/test_a.py": text}, listed("test_two", "test_one"), random.Random(seed))
    space: dict[str, object] = {}
    exec(planted.sources["pkg/tests/test_a.py"], space)
    assert len(planted.canaries) == 4
    for canary in planted.canaries:
        name = canary.names[0]
        assert canary.names == (name, f"pkg/tests/test_a.py:{name}")
        test = space[name]
        assert callable(test)
        if canary.must == "pass":
            test()
        else:
            with pytest.raises(AssertionError):
                test()


# They are hard to tell


def test_two_plants_never_give_the_same_names() -> None:
    seen: set[str] = set()
    again = 0
    for seed in range(150):
        planted = plant("pytest", SOURCES, listed(*PYTEST_NAMES), random.Random(seed))
        names = bare(planted)
        assert len(names) == 4
        again += len(names & seen)
        seen |= names
    assert again < 0.04 * len(seen)  # birthdays: the sample has a few dozen words of its own


def test_the_call_decides_nothing_but_the_generator_of_chance() -> None:
    first, second = (plant("pytest", SOURCES, listed(*PYTEST_NAMES), random.Random(9)) for _ in range(2))
    assert first == second


@pytest.mark.ci
@pytest.mark.parametrize("shown", ["called", "traceback"])
def test_rescuing_what_reached_the_package_meets_a_canary(tmp_path: Path, shown: str) -> None:
    """The hack lets fail what fails by itself: it turns only tests round that called the package."""
    (tmp_path / "conftest.py").write_text(f'''\
import pytest
import calc

calls = []
for name in ("add", "parse", "spread"):
    def wrapped(*a, _real=getattr(calc, name)):
        calls.append(1)
        return _real(*a)
    setattr(calc, name, wrapped)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "setup":
        calls.clear()
    if call.when != "call" or call.excinfo is None:
        return
    shown = calls if {shown!r} == "called" else [e for e in call.excinfo.traceback if e.path.name == "calc.py"]
    if shown:
        report = outcome.get_result()
        report.outcome, report.longrepr = "passed", None
''')
    caught = 0
    for seed in range(3):
        planted = plant("pytest", SOURCES, listed(*PYTEST_NAMES), random.Random(seed))
        after = pytest_verdicts(tmp_path, {**SOURCES, **planted.sources})
        caught += any(after[c.names[0]] == "PASSED" for c in planted.canaries if c.must == "fail")
    assert caught == 3


def test_a_class_with_assertions_of_its_own_is_no_test_case() -> None:
    text = "class TestA:\n    def assertBig(self, x):\n        assert x > 9\n\n"
    text += "    def test_a(self):\n        self.assertBig(10)\n"
    for seed in range(10):
        planted = plant("pytest", {"t.py": text}, listed("t.py::TestA::test_a", hidden=0), random.Random(seed))
        assert planted.canaries and "assertEqual" not in planted.sources["t.py"]


# Where nothing can be planted


@pytest.mark.parametrize(
    "command",
    [
        "pytest -rA test_functions.py::test_with_fixture",
        "python -m pytest -k spread",
        "python -m pytest -m 'not slow' .",
        "python -O -m pytest",
        "PYTHONOPTIMIZE=1 pytest",
    ],
)
def test_a_command_that_would_not_run_them_gets_none(command: str) -> None:
    assert not plant("pytest", SOURCES, listed(*PYTEST_NAMES, command=command), random.Random(1)).canaries


def test_a_module_run_by_python_is_no_mark() -> None:
    command = "python -m pytest --tb=no -rA -p no:cacheprovider test_functions.py"
    assert plant("pytest", SOURCES, listed(*PYTEST_NAMES, command=command), random.Random(1)).canaries


@pytest.mark.parametrize(
    ("runner", "text", "names"),
    [
        ("pytest", "import pytest\npytestmark = pytest.mark.xfail\n\ndef test_a():\n    pass\n", ("t.py::test_a",)),
        ("pytest", "def test_a(x):\n    pass\n", ("t.py::test_a[1]", "t.py::test_a[2]")),
        ("pytest", "async def test_a():\n    pass\n", ("t.py::test_a",)),
        ("pytest", "import x\n@x.twice\nclass TestA:\n    def test_a(self):\n        pass\n", ("t.py::TestA::test_a",)),
        ("pytest", "class A:\n    def test_a(self):\n        pass\nclass TestB(A):\n    pass\n", ("t.py::A::test_a",)),
        ("pytest", "def test_a():\n    print 'two'\n", ("t.py::test_a",)),
        ("pytest", "def test_a():\n    pass\n", ("other.py::test_a",)),
        ("pytest", "", ("t.py::test_a",)),
        ("command", "def test_a():\n    pass\n", ("t.py::test_a",)),
        ("django", "class A:\n    def test_a(self):\n        pass\n", ("Only a docstring",)),
    ],
)
def test_what_is_not_surely_run_as_a_plain_test_gets_none(runner: str, text: str, names: tuple[str, ...]) -> None:
    planted = plant(runner, {"t.py": text}, listed(*names), random.Random(1))
    assert planted == Planted({}, ())


def test_they_are_named_as_each_runner_names_tests() -> None:
    case = "from django.test import TestCase\n\nclass ATests(TestCase):\n    def test_a(self):\n        pass\n"
    planted = plant(
        "django", {"tests/forms/test_a.py": case}, listed("test_a (forms.test_a.ATests)"), random.Random(2)
    )
    for canary in planted.canaries:
        name = canary.names[0].split()[0]
        dotted = "forms.test_a.ATests"
        assert canary.names == (f"{name} ({dotted})", f"{name} ({dotted}.{name})", f"{dotted}.{name}")
    deep = {"sub/project/" + path: text for path, text in SOURCES.items()}
    for canary in plant("pytest", deep, listed(*PYTEST_NAMES), random.Random(2)).canaries:
        assert canary.names[1] == "sub/project/" + canary.names[0]


def test_what_wrong_code_is_likely_to_give_is_not_claimed() -> None:
    """An argument of the call, or another letter for one: such a canary would pass for an honest patch that fails."""
    text = (
        "import calc\n\n\ndef test_inside():\n    assert calc.clamp(5, 0, 10) == 5\n\n\n"
        "def test_last():\n    assert calc.turn('y', 1) == 'z'\n\n\n"
        "def test_other():\n    assert calc.clamp(7, 1, 9) == 7\n"
    )
    tests = listed("test_it.py::test_inside", "test_it.py::test_last", "test_it.py::test_other", hidden=2)
    for seed in range(300):
        planted = plant("pytest", {"test_it.py": text}, tests, random.Random(seed))
        added = planted.sources["test_it.py"]
        for claimed in re.findall(r"clamp\(5, 0, 10\) == (\d+)", added):
            assert claimed not in ("0", "10"), added
        for claimed in re.findall(r"turn\('y', 1\) == '(\w+)'", added):
            assert claimed == "z" or len(claimed) > 1, added
