"""What is shown of a log."""

from __future__ import annotations

from skyrl_minisandbox.cli.log_lines import WIDTH, relevant_lines

PYTEST = """\
collected 40 items

tests/test_a.py .F..
""" + "".join(f"PASSED tests/test_a.py::test_{n}\n" for n in range(300)) + """\
=================================== FAILURES ===================================
__________________________________ test_parse __________________________________

    def test_parse():
>       assert parse("1") == 1
E       AssertionError: assert None == 1

tests/test_a.py:7: AssertionError
=========================== short test summary info ============================
FAILED tests/test_a.py::test_parse[one-two] - AssertionError: assert None == 1
========================= 1 failed, 39 passed in 0.12s =========================
"""


def test_the_lines_of_a_failed_test_are_found_among_many() -> None:
    shown = relevant_lines(PYTEST, ["tests/test_a.py::test_parse[one-two]"])
    assert "E       AssertionError: assert None == 1" in shown
    assert "FAILED tests/test_a.py::test_parse[one-two] - AssertionError: assert None == 1" in shown
    assert shown[-1].startswith("====") and "1 failed, 39 passed" in shown[-1]
    assert not any("PASSED" in line for line in shown)
    assert len(shown) <= 20


def test_a_name_is_not_found_in_a_longer_one() -> None:
    log = "test_parse_all ok\ntest_parse failed\n" + "quiet\n" * 3
    shown = relevant_lines(log, ["test_parse (app.tests.Case)"])
    assert shown == ["test_parse failed", "quiet", "quiet", "quiet"]


def test_a_log_that_tells_nothing_is_shown_by_its_end() -> None:
    assert relevant_lines("one\ntwo\n\nthree\nfour\n") == ["two", "three", "four"]
    assert relevant_lines("") == []


def test_django_s_names_and_colours_are_no_hindrance() -> None:
    log = "\x1b[31mFAIL\x1b[0m: test_x (m.tests.C)\nAssertionError: 1 != 2\nRan 3 tests in 0.1s\n" + "." * 1000
    shown = relevant_lines(log, ["test_x (m.tests.C)"])
    assert shown == ["FAIL: test_x (m.tests.C)", "AssertionError: 1 != 2", "Ran 3 tests in 0.1s"]
    assert max(map(len, relevant_lines("." * 1000))) == WIDTH
