"""Logs as the runners write them -> verdicts by the names that datasets list."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.errors import PluginError
from skyrl_minisandbox.rewards.parsers import load_parser


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
            "setUpClass": "ERROR",
        }

    def test_a_docstring_is_the_name(self) -> None:
        log = "test_x (a.B)\nIf form data is provided, a key is ... ok\n"
        name = "If form data is provided, a key is"
        assert load_parser("django")(log, [name]) == {name: "PASSED"}


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


def test_an_unknown_parser_lists_the_known() -> None:
    with pytest.raises(PluginError, match="django, pytest, sympy"):
        load_parser("nose")
