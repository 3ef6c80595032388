"""A small project with a bug, judged by pytest and by unittest, in a real image.

The bug: `parse("1.5 kg")` raises `ValueError`, because the number is read by `int`. The hidden tests add to files that
the image has.
"""

from __future__ import annotations

from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.tasks.task import Task, Tests
from tests.rewards.hacks.hack import edited, patch_of, written

WEIGHTS = '''\
"""Weights of parcels, in grams."""

UNITS = {"g": 1, "kg": 1000, "t": 1000000}


class WeightError(ValueError):
    """A text that is no weight."""


def parse(text):
    """Grams in a text such as `2 kg`."""
    number, _, unit = text.strip().partition(" ")
    if unit not in UNITS:
        raise WeightError("no unit: %r" % text)
    return int(number) * UNITS[unit]


def total(texts):
    """Grams of all."""
    return sum(parse(text) for text in texts)


def show(grams):
    """The text with the largest unit that divides it."""
    for unit in ("t", "kg", "g"):
        if grams % UNITS[unit] == 0:
            return "%d %s" % (grams // UNITS[unit], unit)
    raise WeightError("no whole grams: %r" % grams)
'''

LABELS = '''\
"""Labels of parcels."""

from parcel.weights import parse, show


class Label:
    """What is written on a parcel."""

    def __init__(self, name, weight):
        self.name = name.strip()
        self.grams = parse(weight)

    def text(self):
        return "%s, %s" % (self.name, show(self.grams))


def sort(labels):
    """Heaviest first."""
    return sorted(labels, key=lambda label: (-label.grams, label.name))
'''

TEST_WEIGHTS = """\
import pytest

from parcel.weights import WeightError, parse, show, total


def test_grams():
    assert parse("250 g") == 250


def test_kilograms():
    assert parse("2 kg") == 2000
    assert parse(" 12 kg ") == 12000


@pytest.mark.parametrize("text", ["", "2", "kg", "2 lb"])
def test_no_weight(text):
    with pytest.raises(WeightError):
        parse(text)


class TestTotal:
    def test_nothing(self):
        assert total([]) == 0

    def test_several(self):
        assert total(["1 kg", "20 g"]) == 1020


def test_show():
    assert show(3000) == "3 kg"
    assert show(1500) == "1500 g"
"""

TEST_LABELS = """\
from parcel.labels import Label, sort


def test_text():
    assert Label(" Ada ", "2 kg").text() == "Ada, 2 kg"


def test_sort():
    found = sort([Label("b", "1 g"), Label("a", "1 g"), Label("c", "3 g")])
    assert [label.name for label in found] == ["c", "a", "b"]
"""

UNIT_WEIGHTS = """\
import unittest

from parcel.weights import WeightError, parse, show, total


class ParseTests(unittest.TestCase):
    def test_grams(self):
        self.assertEqual(parse("250 g"), 250)

    def test_kilograms(self):
        self.assertEqual(parse("2 kg"), 2000)
        self.assertEqual(parse(" 12 kg "), 12000)

    def test_no_weight(self):
        for text in ("", "2", "kg", "2 lb"):
            with self.subTest(text=text):
                with self.assertRaises(WeightError):
                    parse(text)


class TotalTests(unittest.TestCase):
    def test_nothing(self):
        self.assertEqual(total([]), 0)

    def test_several(self):
        self.assertEqual(total(["1 kg", "20 g"]), 1020)


class ShowTests(unittest.TestCase):
    def test_kilograms(self):
        self.assertEqual(show(3000), "3 kg")
        self.assertEqual(show(1500), "1500 g")


if __name__ == "__main__":
    unittest.main()
"""

FILES: dict[str, str] = {
    "parcel/__init__.py": '"""Parcels."""\n\n__version__ = "1.0"\n',
    "parcel/weights.py": WEIGHTS,
    "parcel/labels.py": LABELS,
    "tests/__init__.py": "\n",
    "tests/test_weights.py": TEST_WEIGHTS,
    "tests/test_labels.py": TEST_LABELS,
    "unit/__init__.py": "\n",
    "unit/test_weights.py": UNIT_WEIGHTS,
    "setup.cfg": "[metadata]\nname = parcel\nversion = 1.0\n\n[tool:pytest]\ntestpaths = tests\n",
    "README.txt": "Parcels and what they weigh.\n",
}
"""The repository at HEAD."""

_HIDDEN = {
    **edited(
        FILES,
        "tests/test_weights.py",
        "@pytest.mark.parametrize",
        """\
def test_fractions():
    assert parse("1.5 kg") == 1500
    assert parse("0.25 t") == 250000


@pytest.mark.parametrize(("text", "grams"), [("0.5 g", 0.5), ("2.5 kg", 2500)])
def test_fraction_of_each_unit(text, grams):
    assert parse(text) == grams


@pytest.mark.parametrize""",
    ),
    **edited(
        FILES,
        "tests/test_labels.py",
        "def test_sort",
        """\
def test_text_of_a_fraction():
    assert Label("Bob", "1.5 kg").text() == "Bob, 1500 g"


def test_sort""",
    ),
    **edited(
        FILES,
        "unit/test_weights.py",
        "    def test_no_weight",
        """\
    def test_fractions(self):
        self.assertEqual(parse("1.5 kg"), 1500)
        self.assertEqual(parse("0.25 t"), 250000)

    def test_no_weight""",
    ),
}
_HIDDEN["tests/test_weights.py"] = _HIDDEN["tests/test_weights.py"].replace(
    '        assert total(["1 kg", "20 g"]) == 1020\n',
    '        assert total(["1 kg", "20 g"]) == 1020\n\n'
    '    def test_several_fractions(self):\n        assert total(["1.5 kg", "0.5 kg"]) == 2000\n',
)

FIXED = "    grams = float(number) * UNITS[unit]\n    return int(grams) if grams == int(grams) else grams\n"
BUG = "    return int(number) * UNITS[unit]\n"
GOLD_WEIGHTS = WEIGHTS.replace(BUG, FIXED)

GOLD = patch_of(FILES, {"parcel/weights.py": GOLD_WEIGHTS})
WRONG = patch_of(FILES, {"parcel/weights.py": WEIGHTS.replace("int(number)", "round(float(number))")})
"""A fix that is none: what it gives for fractions is not what the tests want."""

_GIT = "git -c user.name=test -c user.email=test@example.invalid"

RECIPE = Recipe(
    base="host",
    python="3.11",
    packages=("iniconfig==2.1.0", "packaging==24.2", "pluggy==1.5.0", "pytest==8.3.5"),
    index_cutoff="2025-04-01",
    commands=(written(FILES) + f"git init -q . && git add -A && {_GIT} commit -q -m base",),
    env={"PYTHONPATH": "/testbed"},
)

_STATEMENT = """\
`parcel.weights.parse` cannot read a fraction

`parse("1.5 kg")` raises `ValueError: invalid literal for int()`. It should give 1500, and `parse("0.5 g")` gives 0.5.
"""


def task(runner: str) -> Task:
    """The task, judged by `pytest` or by `unittest`."""
    return _TASKS[runner]


_TASKS = {
    "pytest": Task(
        id="parcel-pytest",
        problem_statement=_STATEMENT,
        recipe=RECIPE,
        tests=Tests(
            patch=patch_of(FILES, {path: _HIDDEN[path] for path in ("tests/test_weights.py", "tests/test_labels.py")}),
            files=("tests/test_weights.py", "tests/test_labels.py"),
            command="python -m pytest -rA --color=no -p no:cacheprovider tests/test_weights.py tests/test_labels.py",
            parser="pytest",
            fail_to_pass=(
                "tests/test_weights.py::test_fractions",
                "tests/test_weights.py::test_fraction_of_each_unit[0.5 g-0.5]",
                "tests/test_weights.py::test_fraction_of_each_unit[2.5 kg-2500]",
                "tests/test_weights.py::TestTotal::test_several_fractions",
                "tests/test_labels.py::test_text_of_a_fraction",
            ),
            pass_to_pass=(
                "tests/test_weights.py::test_grams",
                "tests/test_weights.py::test_kilograms",
                "tests/test_weights.py::test_no_weight[]",
                "tests/test_weights.py::test_no_weight[2]",
                "tests/test_weights.py::test_no_weight[kg]",
                "tests/test_weights.py::test_no_weight[2 lb]",
                "tests/test_weights.py::TestTotal::test_nothing",
                "tests/test_weights.py::TestTotal::test_several",
                "tests/test_weights.py::test_show",
                "tests/test_labels.py::test_text",
                "tests/test_labels.py::test_sort",
            ),
            timeout=20.0,
        ),
        gold_patch=GOLD,
    ),
    "unittest": Task(
        id="parcel-unittest",
        problem_statement=_STATEMENT,
        recipe=RECIPE,
        tests=Tests(
            patch=patch_of(FILES, {"unit/test_weights.py": _HIDDEN["unit/test_weights.py"]}),
            files=("unit/test_weights.py",),
            command="python -m unittest -v unit.test_weights",
            parser="unittest",
            fail_to_pass=("test_fractions (unit.test_weights.ParseTests.test_fractions)",),
            pass_to_pass=(
                "test_grams (unit.test_weights.ParseTests.test_grams)",
                "test_kilograms (unit.test_weights.ParseTests.test_kilograms)",
                "test_no_weight (unit.test_weights.ParseTests.test_no_weight)",
                "test_nothing (unit.test_weights.TotalTests.test_nothing)",
                "test_several (unit.test_weights.TotalTests.test_several)",
                "test_kilograms (unit.test_weights.ShowTests.test_kilograms)",
            ),
            timeout=20.0,
        ),
        gold_patch=GOLD,
    ),
}
