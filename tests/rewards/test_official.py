"""The rules by which SWE-bench judges a log. That they are its own is held by test_oracles."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.rewards import official
from skyrl_minisandbox.tasks.task import Tests


def judged(
    log: str,
    fail_to_pass: tuple[str, ...] = ("a.py::x",),
    pass_to_pass: tuple[str, ...] = (),
    *,
    parser: str = "swebench-pytest",
    rules: str = "4.1",
    exit_code: int | None = 0,
) -> official.Verdict:
    tests = Tests(
        patch="",
        files=(),
        command="pytest -rA",
        parser=parser,
        fail_to_pass=fail_to_pass,
        pass_to_pass=pass_to_pass,
    )
    return official.verdict(tests, log, exit_code, rules)


def test_every_listed_test_must_pass() -> None:
    log = "PASSED a.py::x\nFAILED a.py::y - no\nXFAIL a.py::z\n"
    assert judged(log).resolved
    assert judged(log, pass_to_pass=("a.py::z",)).resolved
    verdict = judged(log, pass_to_pass=("a.py::y", "a.py::missing"))
    assert not verdict.resolved
    assert verdict.fail_to_pass == {"a.py::x": True}
    assert verdict.pass_to_pass == {"a.py::y": False, "a.py::missing": False}
    assert verdict.reason == "2 tests did not pass, the first is a.py::y"


@pytest.mark.parametrize(("rules", "resolved"), [("4.1", True), ("5.0", False)])
def test_a_skipped_fail_to_pass_test_counts_nowhere_or_as_a_failure(rules: str, resolved: bool) -> None:
    log = "test_a (x.Y) ... skipped 'no'\ntest_b (x.Y) ... ok\n"
    verdict = judged(log, ("test_a (x.Y)", "test_b (x.Y)"), parser="swebench-django", rules=rules)
    assert verdict.resolved is resolved
    assert verdict.fail_to_pass.get("test_a (x.Y)") is (None if resolved else False)
    verdict = judged(log, ("test_b (x.Y)",), ("test_a (x.Y)",), parser="swebench-django", rules=rules)
    assert verdict.resolved
    assert verdict.pass_to_pass == ({} if rules == "4.1" else {"test_a (x.Y)": True})


def test_ids_that_are_cut_are_found_by_prefix_in_5_and_by_the_same_cut_in_4() -> None:
    log = "PASSED a.py::x[log(photon flux)]\nPASSED a.py::x[log(photon count)]\n"
    for parser in ("swebench-pytest", "swebench-pytest-v2"):
        for rules in ("4.1", "5.0"):
            assert judged(log, ("a.py::x[log(photon",), parser=parser, rules=rules).resolved, (parser, rules)
    mixed = log + "FAILED a.py::x[log(photon none)]\n"
    assert not judged(mixed, ("a.py::x[log(photon",), parser="swebench-pytest-v2", rules="5.0").resolved
    assert not judged("PASSED a.py::x[ab]\n", ("a.py::x[a",), rules="4.1").resolved
    assert judged("PASSED a.py::x[ab]\n", ("a.py::x[a",), rules="5.0").resolved


def test_a_command_that_failed_without_a_failed_test_is_believed_by_4_only() -> None:
    log = "PASSED a.py::x\n"
    assert judged(log, exit_code=1).resolved
    verdict = judged(log, exit_code=1, rules="5.0")
    assert not verdict.resolved and verdict.tests == {}
    assert verdict.reason == "the command ended with status 1, but no test of the log failed"
    assert judged(log, exit_code=None, rules="5.0").resolved
    assert judged(log + "FAILED a.py::other\n", exit_code=1, rules="5.0").resolved


@pytest.mark.parametrize("rules", ["4.1", "5.0"])
def test_marks_that_the_tests_print_do_what_they_do_there(rules: str) -> None:
    passed = "PASSED a.py::x\n"
    assert not judged(passed + ">>>>> Tests Timed Out\n", rules=rules).resolved
    assert "Tests Timed Out" in judged(passed + ">>>>> Tests Timed Out\n", rules=rules).reason
    assert judged(passed + ">>>>> End Test Output\nFAILED a.py::x\n", rules=rules).resolved
    assert not judged("PASSED a.py::z\n>>>>> End Test Output\n" + passed, rules=rules).resolved
    # Nothing between the marks: then the whole log is read.
    assert judged(">>>>> Start Test Output\n" + passed, rules=rules).resolved


def test_a_forged_status_is_believed_by_5_as_it_is_there() -> None:
    assert judged(">>>>> Test Exit Code: 0\nPASSED a.py::x\n", exit_code=1, rules="5.0").resolved
    assert not judged("PASSED a.py::x\n", exit_code=1, rules="5.0").resolved
    endless = f">>>>> Test Exit Code: {'9' * 5000}\nPASSED a.py::x\n"
    assert not judged(endless, rules="5.0").resolved


def test_every_line_end_is_one() -> None:
    assert judged("progress 1%\rPASSED a.py::x\r\n").resolved


def test_a_log_without_results_says_so() -> None:
    verdict = judged("Segmentation fault\n", exit_code=139)
    assert verdict == official.Verdict(
        {}, {"a.py::x": False}, {}, False, "the log has no results, and the command ended with status 139"
    )


def test_a_task_that_lists_no_tests_is_never_resolved() -> None:
    for parser in ("pytest", "swebench-pytest"):
        assert judged("PASSED a.py::x\n", (), parser=parser).reason == "the task names no tests"


def test_a_log_at_which_the_grader_stops_is_not_resolved() -> None:
    verdict = judged("PASSED a.py::x\nFAILED\n", parser="swebench-seaborn")
    assert not verdict.resolved and "stops at this log" in verdict.reason
    assert judged("PASSED a.py::x\nFAILED\n", parser="swebench-seaborn", rules="5.0").resolved
    assert "stops at this log" in judged("test_a (x.Y) ... ok\nERROR:\n", parser="swebench-django").reason


@pytest.mark.parametrize("rules", ["4.1", "5.0"])
def test_our_own_parsers_have_one_rule(rules: str) -> None:
    log = "=== short test summary info ===\nPASSED a.py::x\nXPASS a.py::y\nXFAIL a.py::z\n"
    assert judged(log, parser="pytest", rules=rules, exit_code=1).resolved
    assert judged(log, ("a.py::z",), parser="pytest", rules=rules).resolved
    assert not judged(log, ("a.py::y",), parser="pytest", rules=rules).resolved
    skipped = judged("test_a (x.Y) ... skipped 'no'\n", ("test_a (x.Y)",), parser="unittest", rules=rules)
    assert skipped.fail_to_pass == {"test_a (x.Y)": False} and not skipped.resolved
