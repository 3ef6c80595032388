"""Logs as the runners write them -> verdicts by the names that datasets list."""

from __future__ import annotations

import time

import pytest

from skyrl_minisandbox.errors import PluginError
from skyrl_minisandbox.rewards.parsers import PARSERS, load_parser


class TestPytest:
    LOG = """\
============================= test session starts ==============================
tests/test_a.py ..F                                                      [100%]
PASSED tests/test_a.py::forged_by_a_print
=================================== FAILURES ===================================
E       assert 1 == 2
==================================== PASSES ====================================
_________________________________ test_blanks __________________________________
----------------------------- Captured stdout call -----------------------------
FAILED tests/test_a.py::test_printed - by a test that passed
=========================== short test summary info ============================
PASSED tests/test_a.py::test_plain
PASSED tests/test_a.py::test_blanks[case when foo - end]
SKIPPED [1] tests/test_a.py:9: not here
XFAIL tests/test_a.py::test_expected - known - bug
XPASS tests/test_a.py::test_surprise - known bug
FAILED tests/test_a.py::test_plain_failure - AssertionError: assert 1 == 2
FAILED tests/test_a.py::test_dash[a - b] - AssertionError: a - b
FAILED tests/test_a.py::test_bracket[[a] - b] - TypeError
ERROR tests/test_b.py - ImportError: no module named 'x'
ERROR tests/test_a.py::test_teardown - OSError
PASSED tests/test_a.py::test_teardown
============== 4 failed, 3 passed, 1 skipped, 2 errors in 0.12s ================
"""

    def test_the_summary_is_read_and_nothing_else(self) -> None:
        assert load_parser("pytest")(self.LOG, ["tests/test_a.py::test_dash[a - b]"]) == {
            "tests/test_a.py::test_plain": "PASSED",
            "tests/test_a.py::test_blanks[case when foo - end]": "PASSED",
            "tests/test_a.py::test_expected": "XFAIL",
            "tests/test_a.py::test_surprise": "XPASS",
            "tests/test_a.py::test_plain_failure": "FAILED",
            "tests/test_a.py::test_dash[a - b]": "FAILED",
            "tests/test_a.py::test_bracket[[a] - b]": "FAILED",
            "tests/test_b.py": "ERROR",
            "tests/test_a.py::test_teardown": "ERROR",
        }

    def test_a_known_name_decides_where_the_message_begins(self) -> None:
        log = "= short test summary info =\nFAILED t.py::x[a] - b] - boom - again\n"
        parse = load_parser("pytest")
        assert parse(log, ["t.py::x[a] - b]"]) == {"t.py::x[a] - b]": "FAILED"}
        assert parse(log, ["t.py::x[a]"]) == {"t.py::x[a]": "FAILED"}
        assert parse(log, []) == {"t.py::x[a]": "FAILED"}

    def test_a_name_that_a_dataset_cut_at_a_blank_is_found_and_must_pass_each_time(self) -> None:
        log = "= short test summary info =\nPASSED t.py::x[log(a b)]\nFAILED t.py::x[log(a c)] - no\n"
        assert load_parser("pytest")(log, ["t.py::x[log(a"]) == {"t.py::x[log(a": "FAILED"}

    def test_colours_are_no_part_of_a_name(self) -> None:
        log = (
            "\x1b[36m\x1b[1m=========== short test summary info ============\x1b[0m\r\n"
            "\x1b[32mPASSED\x1b[0m t.py::\x1b[1mtest_a\x1b[0m\r\n"
            "\x1b[31mFAILED\x1b[0m t.py::\x1b[1mtest_b\x1b[0m - assert False\r\n"
        )
        assert load_parser("pytest")(log, []) == {"t.py::test_a": "PASSED", "t.py::test_b": "FAILED"}

    def test_a_run_that_was_cut_short_keeps_what_its_progress_says(self) -> None:
        log = "t.py::test_a PASSED     [ 33%]\nt.py::test_b[x y] FAILED [ 66%]\nt.py::test_c "
        assert load_parser("pytest")(log, []) == {"t.py::test_a": "PASSED", "t.py::test_b[x y]": "FAILED"}

    def test_the_last_summary_counts(self) -> None:
        summary = "=== short test summary info ===\n"
        log = f"{summary}PASSED t.py::a\n1 passed\n{summary}FAILED t.py::a - no\n"
        assert load_parser("pytest")(log, []) == {"t.py::a": "FAILED"}

    @pytest.mark.parametrize("log", ["", "\0\xff", "=== short test summary info ===", "PASSED x"])
    def test_a_log_without_results_has_none(self, log: str) -> None:
        assert load_parser("pytest")(log, []) == {}


class TestDjango:
    LOG = """\
Testing against Django installed in '/testbed/django' with up to 2 processes
test_plain (forms.tests.A) ... ok
test_fails (forms.tests.A) ... FAIL
test_error (forms.tests.A) ... ERROR
test_skip (forms.tests.A) ... skipped 'no database ... here'
test_known (forms.tests.A) ... expected failure
test_docstring (forms.tests.A)
A parent's key is kept ... really ... ok
test_prints (forms.tests.A) ... something printed
and more
ok
test_prints_and_fails (forms.tests.A) ... Internal Server Error: /x/
FAIL
test_subtests (forms.tests.A) ... ok
test_full (forms.tests.A.test_full) ... ok

======================================================================
FAIL: test_subtests (forms.tests.A) (value=3)
----------------------------------------------------------------------
AssertionError
======================================================================
ERROR: setUpClass (forms.tests.B)
----------------------------------------------------------------------
Ran 9 tests in 0.1s

FAILED (failures=3)
"""

    def test_every_form_of_a_verdict(self) -> None:
        known = ["A parent's key is kept ... really"]
        assert load_parser("django")(self.LOG, known) == {
            "test_plain (forms.tests.A)": "PASSED",
            "test_fails (forms.tests.A)": "FAILED",
            "test_error (forms.tests.A)": "ERROR",
            "test_skip (forms.tests.A)": "SKIPPED",
            "test_known (forms.tests.A)": "XFAIL",
            "A parent's key is kept ... really": "PASSED",
            "test_prints (forms.tests.A)": "PASSED",
            "test_prints_and_fails (forms.tests.A)": "FAILED",
            "test_subtests (forms.tests.A)": "FAILED",
            "test_full (forms.tests.A.test_full)": "PASSED",
            "setUpClass (forms.tests.B)": "ERROR",
        }

    def test_a_docstring_is_the_name(self) -> None:
        log = "test_x (a.B)\nIf form data is provided, a key is ... ok\n"
        name = "If form data is provided, a key is"
        assert load_parser("django")(log, [name]) == {name: "PASSED"}
        assert load_parser("unittest")(log, [name]) == {"test_x (a.B)": "PASSED"}

    def test_a_failed_test_with_a_docstring_fails_by_its_name(self) -> None:
        rule = "=" * 70
        log = f"test_x (a.B)\nA key is kept ... ok\n{rule}\nFAIL: test_x (a.B) (i=1)\nA key is kept\n{'-' * 70}\n"
        assert load_parser("django")(log, ["A key is kept"]) == {"A key is kept": "FAILED"}
        assert load_parser("unittest")(log, []) == {"test_x (a.B)": "FAILED"}

    def test_what_a_test_prints_is_no_test_and_no_verdict_of_another(self) -> None:
        log = (
            "test_a (x.Y.test_a) ... Loading ... done\nIf this is a test ... ok\nFAIL: not a heading\nok\n"
            "test_b (x.Y.test_b) ... FAIL\nok, said nobody\nok\n"
        )
        expected = {"test_a (x.Y.test_a)": "PASSED", "test_b (x.Y.test_b)": "FAILED"}
        assert load_parser("django")(log, []) == expected
        assert load_parser("unittest")(log, []) == expected

    def test_subtests_on_lines_of_their_own_fail_their_test(self) -> None:
        log = (
            "test_a (x.Y.test_a) ... \n  test_a (x.Y.test_a) (i=1) ... FAIL\n  test_a (x.Y.test_a) [why] (i=2) ... ok\n"
            "migrating...test_b (x.Y.test_b) ... ok\n"
        )
        expected = {"test_a (x.Y.test_a)": "FAILED", "test_b (x.Y.test_b)": "PASSED"}
        assert load_parser("unittest")(log, []) == expected


class TestSympy:
    LOG = """\
============================= test process starts ==============================
sympy/geometry/tests/test_point.py[5]
test_point ok
test_issue_11617 F
test_boom E
test_known f
test_slow s - too slow
test_last ok                                                             [FAIL]

________________________________________________________________________________
_________ sympy/geometry/tests/test_point.py:test_issue_11617 __________________
Traceback (most recent call last):
AssertionError
"""

    def test_bare_function_names_and_tracebacks(self) -> None:
        assert load_parser("sympy")(self.LOG, []) == {
            "test_point": "PASSED",
            "test_issue_11617": "FAILED",
            "test_boom": "ERROR",
            "test_known": "XFAIL",
            "test_slow": "SKIPPED",
            "test_last": "PASSED",
            "sympy/geometry/tests/test_point.py:test_issue_11617": "FAILED",
        }


MANY = 100_000
HOSTILE = (
    "_" * MANY,
    "_ .py:" * MANY,
    "____ x.py:" + ".py:" * MANY + " ____",
    "[" * MANY,
    "PASSED " + "[" * MANY,
    "PASSED x" + "[/]" * MANY,
    "PASSED t.py::x" + " - [" * MANY,
    "FAILED t.py::x" + " - [" * MANY,
    "= short test summary info =\n" + ("FAILED t.py::x" + " - [" * 1000 + "\n") * 100,
    "x PASSED " * MANY + "[ 1%]",
    "t.py::x" + " FAILED [" * MANY,
    " ... " * MANY,
    ("test_a (x.Y)" + " ... " * 50 + "\n") * 2000,
    "x" * MANY + " (a.B) ... ok",
    ("x" * 2000 + " (a.B) ... ok\n") * 500,
    "(" * MANY + ")",
    " (" * MANY + ")",
    "a ... Testing against Django installed in " * (MANY // 2),
    "a ... Testing against Django installed in \n" * (MANY // 2),
    "a ... Internal Server Error: /" * (MANY // 2),
    "a ... Internal Server Error: /\n" * (MANY // 2),
    "a\n...\nSystem check identified no issues (0 silenced)\n" * (MANY // 2),
    "\x1b]" * MANY,
    "\x1b[" * MANY + "x",
    "\n" * MANY * 5,
)


@pytest.mark.ci
@pytest.mark.parametrize("name", PARSERS)
def test_no_log_keeps_a_parser_busy(name: str) -> None:
    """A square of the length would take minutes; 1 s for each is a hundred times what they take."""
    parse = load_parser(name)
    for log in HOSTILE:
        started = time.process_time()
        parse(log, ["t.py::x", "t.py::y - [", "test_a (x.Y)"])
        assert time.process_time() - started < 1, log[:60]


def test_an_unknown_parser_lists_the_known() -> None:
    with pytest.raises(PluginError, match=r"django, pytest, swebench-django, .*, sympy, unittest"):
        load_parser("nose")
