"""An expected failure counts where the test files expect one, and nowhere else."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.rewards.expected_failures import ExpectedFailures

SOURCE = '''
import pytest, unittest

@pytest.mark.xfail(reason="later")
def test_marked(): assert 0

def test_inside():
    pytest.xfail("not here")

@pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.xfail), 2])
def test_some(a): assert a == 2

def test_plain(): assert 1

@XFAIL
def test_symbolic(): assert 0

class TestA(unittest.TestCase):
    @unittest.expectedFailure
    def test_method(self): self.fail()

    def test_other(self): pass

class TestB:
    pytestmark = pytest.mark.xfail

    def test_of_class(self): pass
'''

ALLOWED = [
    "tests/t.py::test_marked", "tests/t.py::test_inside", "tests/t.py::test_some[1]", "tests/t.py::TestA::test_method",
    "test_method (t.TestA)", "test_method (t.TestA.test_method)", "tests/t.py::TestB::test_of_class", "test_symbolic",
    "t.py:test_symbolic", "other.py::test_elsewhere", "What its docstring says.",
]  # fmt: skip
REFUSED = [
    "tests/t.py::test_plain", "tests/t.py::test_plain[a b]", "test_other (t.TestA)", "test_plain", "t.py:test_plain",
    "tests/t.py::TestA::test_other",
]  # fmt: skip


@pytest.mark.parametrize(("name", "allowed"), [(n, True) for n in ALLOWED] + [(n, False) for n in REFUSED])
def test_what_may_fail_as_expected(name: str, allowed: bool) -> None:
    assert ExpectedFailures([SOURCE]).allow(name) is allowed


def test_a_mark_of_the_module_covers_all_of_it() -> None:
    expected = ExpectedFailures(["import pytest\npytestmark = [pytest.mark.xfail]\ndef test_a(): pass\n"])
    assert expected.allow("t.py::test_a")


def test_a_file_that_cannot_be_read_tells_nothing() -> None:
    assert ExpectedFailures(["print 'two'\n", "\x00"]).allow("t.py::test_a")
