"""Which tests a listed name means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_minisandbox.rewards.names import Names, is_test, listed, lookup
from skyrl_minisandbox.rewards.parsers import PASSING

TOLD = {
    "t.py::test_a": "PASSED",
    "t.py::test_ab": "FAILED",
    "t.py::Case::test_a": "FAILED",
    "t.py::test_x[a b]": "PASSED",
    "t.py::test_x[a c]": "XFAIL",
    "t.py::test_x[b]": "FAILED",
    "t.py::test_y[a b]": "PASSED",
    "t.py::test_y[a c]": "FAILED",
    "t.py::test_z[a b]": "SKIPPED",
    "t.py::test_z[a c]": "PASSED",
    "t.py::test_path[/usr/share/x]": "PASSED",
}


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("t.py::test_a", "PASSED"),
        ("t.py::test_ab", "FAILED"),
        ("t.py::test", None),
        ("test_a", None),
        ("T.py::test_a", None),
        ("t.py::test_\u0430", None),  # a Cyrillic letter that looks like an `a`
        ("t.py::test_x", None),
        ("t.py::test_x[a b]", "PASSED"),
        ("t.py::test_x[a d]", None),
        ("t.py::test_x[a", "PASSED"),
        ("t.py::test_y[a", None),
        ("t.py::test_z[a", "PASSED"),
        ("t.py::test_x[", None),
        ("t.py::test_missing[a", None),
        ("", None),
    ],
)
def test_a_name_is_whole_or_cut_inside_its_parameter(name: str, verdict: str | None) -> None:
    assert lookup(name, TOLD) == verdict


def test_what_swebench_made_of_a_name_leads_back_to_it() -> None:
    assert listed("t.py::test_x[log(photon flux)]", "swebench-pytest") == "t.py::test_x[log(photon"
    assert listed("t.py::test_path[/usr/share/x]", "swebench-pytest-options") == "t.py::test_path[/x]"
    assert listed("t.py::test_m[MouseButton.LEFT]", "swebench-matplotlib") == "t.py::test_m[1]"
    assert listed("t.py::test_x[a b]", "pytest") == "t.py::test_x[a b]"
    assert lookup("t.py::test_path[/x]", TOLD, "swebench-pytest-options") == "PASSED"
    assert lookup("t.py::test_path[/x]", TOLD, "swebench-pytest") is None
    # Cut at a blank behind a bracket that closes, so that nothing shows that it was cut.
    told = {"t.py::test_b[[a] b]": "FAILED"}
    assert lookup("t.py::test_b[[a]", told, "swebench-pytest") == "FAILED"
    assert Names(told, "swebench-pytest").tests("t.py::test_b[[a]") == ["t.py::test_b[[a] b]"]


def test_a_name_that_pytest_cannot_give_is_known() -> None:
    assert not is_test("[100%]", "pytest")
    assert is_test("tests/test_a.py::test_b", "pytest") and is_test("tests/test_a.py", "pytest")
    assert is_test("A docstring", "django") and is_test("test_integrate", "sympy")


@given(
    st.dictionaries(
        st.text("ab[] /", max_size=6), st.sampled_from(["PASSED", "FAILED", "XFAIL", "ERROR"]), max_size=12
    ),
    st.text("ab[] /", max_size=6),
)
def test_a_cut_name_is_what_swebench_5_takes_it_for(told: dict[str, str], name: str) -> None:
    begun = [test for test in told if test.startswith(name)]
    if name in told:
        expected: str | None = told[name]
    elif name.count("[") > name.count("]") and len({told[test] in PASSING for test in begun}) == 1:
        expected = told[begun[0]]
    else:
        expected = None
    found = lookup(name, told)
    assert (found in PASSING, found is None) == (expected in PASSING, expected is None)
