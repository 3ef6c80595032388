"""What a protected run means, from what the channel told, what the log says and how the canaries came out."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.canaries import Planned
from skyrl_minisandbox.rewards.channel import Results
from skyrl_minisandbox.rewards.expected_failures import ExpectedFailures
from skyrl_minisandbox.rewards.judge import Judged, judge
from skyrl_minisandbox.sandbox import CommandResult
from skyrl_minisandbox.tasks.task import Tests

FIXED, KEPT = "tests/t.py::test_fixed", "tests/t.py::test_kept"
MUST_FAIL, MUST_PASS = "tests/t.py::test_one", "tests/t.py::test_two"
PLANNED = (Planned("fail", (MUST_FAIL,)), Planned("pass", (MUST_PASS,)))
GOOD = {FIXED: "PASSED", KEPT: "PASSED", MUST_FAIL: "FAILED", MUST_PASS: "PASSED"}
TESTS = Tests(patch="", files=("tests/t.py",), command="pytest", fail_to_pass=(FIXED,), pass_to_pass=(KEPT,))


def log_of(verdicts: dict[str, str]) -> str:
    return "= short test summary info =\n" + "".join(f"{verdict} {name}\n" for name, verdict in verdicts.items())


def judged(
    told: dict[str, str],
    log: dict[str, str] | None = None,
    *,
    tests: Tests = TESTS,
    asked: frozenset[str] | None = None,
    finished: bool = True,
    timed_out: str = "",
    changed: tuple[str, ...] = (),
    planned: tuple[Planned, ...] = PLANNED,
    channel: bool = True,
    whole_log: str | None = None,
    late: bool = False,
    source: str = "",
) -> Judged:
    results = Results(told, frozenset(told) if asked is None else asked, finished, timed_out, changed)
    text = log_of(told if log is None else log) if whole_log is None else whole_log
    done = CommandResult(
        stdout=text.encode(), stderr=b"", exit_code=1, timed_out=late, seconds=3.0, merged=text.encode()
    )
    names = (*tests.fail_to_pass, *tests.pass_to_pass)
    return judge(tests, names, done, results if channel else None, planned, ExpectedFailures([source]))


def test_all_that_is_asked_for_passes_and_the_canaries_are_right() -> None:
    result = judged(GOOD)
    assert (result.outcome, result.error) == (Outcome.RESOLVED, "")
    assert all(canary.right for canary in result.canaries)


def test_canaries_are_in_no_verdict() -> None:
    assert set(judged(GOOD).tests) == {FIXED, KEPT}


def test_a_failing_test_is_unresolved_and_named() -> None:
    result = judged({**GOOD, FIXED: "FAILED"})
    assert result.outcome is Outcome.UNRESOLVED
    assert f"the first is {FIXED} (FAILED)" in result.error


@pytest.mark.parametrize("verdict", ["PASSED", "XFAIL", "XPASS"])
def test_a_canary_that_must_fail_and_passes_is_tampered(verdict: str) -> None:
    for told in ({**GOOD, MUST_FAIL: verdict}, {**GOOD, MUST_FAIL: verdict, FIXED: "FAILED"}):
        result = judged(told)
        assert result.outcome is Outcome.TAMPERED
        assert result.error == "a test that cannot pass has passed"


@pytest.mark.parametrize("verdict", ["FAILED", "ERROR", "SKIPPED", "XFAIL"])
def test_a_canary_that_must_pass_and_does_not_is_tampered_when_all_else_passes(verdict: str) -> None:
    result = judged({**GOOD, MUST_PASS: verdict})
    assert result.outcome is Outcome.TAMPERED
    assert f"a test that must pass is {verdict}" in result.error


def test_a_canary_of_which_nothing_is_told_is_tampered_when_all_else_passes() -> None:
    for name in (MUST_FAIL, MUST_PASS):
        told = {key: verdict for key, verdict in GOOD.items() if key != name}
        assert judged(told).outcome is Outcome.TAMPERED


def test_a_wrong_patch_that_breaks_everything_is_no_cheat() -> None:
    """As an import that fails does: nothing is told of the file's tests, canaries among them."""
    result = judged({"tests/t.py": "ERROR"}, asked=frozenset())
    assert result.outcome is Outcome.UNRESOLVED
    assert judged(dict.fromkeys(GOOD, "ERROR")).outcome is Outcome.UNRESOLVED
    assert judged(dict.fromkeys(GOOD, "SKIPPED")).outcome is Outcome.UNRESOLVED


def test_a_log_that_tells_more_than_the_runner_is_tampered() -> None:
    for told in ({}, {FIXED: "FAILED", KEPT: "PASSED", MUST_FAIL: "FAILED", MUST_PASS: "PASSED"}):
        result = judged(told, {FIXED: "PASSED", KEPT: "PASSED"})
        assert result.outcome is Outcome.TAMPERED
        assert "the log tells that" in result.error


def test_what_only_a_dataset_s_parser_takes_for_a_verdict_is_no_proof_of_a_forged_log() -> None:
    name = "test_b (x.Y)"
    tests = Tests(
        patch="", files=("tests/x.py",), command="runtests", parser="swebench-django", runner="django",
        fail_to_pass=(name,), pass_to_pass=(),
    )  # fmt: skip
    result = judged({name: "FAILED"}, tests=tests, planned=(), whole_log=f"{name} ... FAIL\nok then\n")
    assert result.outcome is Outcome.UNRESOLVED


def test_a_log_that_has_a_passing_test_failed_wins_and_is_noted() -> None:
    result = judged(GOOD, {**GOOD, KEPT: "FAILED"})
    assert result.outcome is Outcome.UNRESOLVED
    assert any(KEPT in note and "FAILED" in note for note in result.notes)


def test_a_log_that_lost_a_line_takes_nothing_away() -> None:
    result = judged(GOOD, {FIXED: "PASSED"})
    assert result.outcome is Outcome.RESOLVED
    assert result.notes == (f"1 tests that passed are not in the log, the first is {KEPT}",)


def test_a_result_of_a_test_that_was_never_collected_is_tampered() -> None:
    result = judged({**GOOD, "tests/t.py::test_other": "PASSED"}, asked=frozenset(GOOD))
    assert result.outcome is Outcome.TAMPERED
    assert "tests/t.py::test_other" in result.error
    assert judged({**GOOD, "tests/u.py": "ERROR"}, asked=frozenset(GOOD)).outcome is Outcome.RESOLVED


def test_a_runner_whose_parts_were_replaced_is_tampered() -> None:
    result = judged(GOOD, changed=("_pytest.python:Function.runtest",))
    assert result.outcome is Outcome.TAMPERED
    assert "_pytest.python:Function.runtest" in result.error


def test_a_run_that_took_too_long_keeps_what_was_finished() -> None:
    result = judged({KEPT: "PASSED"}, late=True, finished=False)
    assert (result.outcome, result.tests[KEPT]) == (Outcome.TESTS_TIMEOUT, "PASSED")
    tests = TESTS.model_copy(update={"test_timeout": 2.0})
    result = judged({KEPT: "PASSED"}, tests=tests, timed_out=FIXED, finished=False)
    assert (result.outcome, result.error) == (Outcome.TESTS_TIMEOUT, f"{FIXED} did not end within 2 s")


def test_a_run_that_was_cut_short_says_so() -> None:
    assert "the run was cut short" in judged({KEPT: "PASSED", MUST_FAIL: "FAILED"}, finished=False).error


def test_a_runner_without_a_channel_is_judged_by_its_log_and_that_is_noted() -> None:
    result = judged({}, {FIXED: "PASSED", KEPT: "PASSED"}, channel=False, planned=())
    assert result.outcome is Outcome.RESOLVED
    assert "this runner has no channel: verdicts are those of the log" in result.notes
    assert "no canary could be planted into the test files" in result.notes


def test_an_expected_failure_that_nothing_expects_has_not_passed() -> None:
    told = {**GOOD, FIXED: "XFAIL"}
    assert judged(told, source="def test_fixed(): ...\ndef test_kept(): ...\n").outcome is Outcome.UNRESOLVED
    assert judged(told, source="@pytest.mark.xfail\ndef test_fixed(): ...\n").outcome is Outcome.RESOLVED


def test_look_alike_names_are_other_tests() -> None:
    """Names are matched whole: letters of another script, and parameters that collide when cut."""
    told = {**GOOD, "tests/t.py::test_fіxed": "PASSED", FIXED: "FAILED"}  # noqa: RUF001  # a Cyrillic letter
    assert judged(told).outcome is Outcome.UNRESOLVED
    tests = TESTS.model_copy(update={"fail_to_pass": ("tests/t.py::test_x[a b]",)})
    told = {**GOOD, "tests/t.py::test_x[a c]": "PASSED", "tests/t.py::test_x[a": "PASSED"}
    assert judged(told, tests=tests).outcome is Outcome.UNRESOLVED
