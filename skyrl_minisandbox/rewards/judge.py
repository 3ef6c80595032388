"""What a protected run means: the channel's verdicts, the log as a cross-check, the canaries. Pure.

A test has passed when the channel says so. It is `tampered`, and paid nothing, when

    a canary that must fail has passed                       asserts have no teeth in this process
    a canary that must pass has not, or one is not told of,  the verdicts are not those of this run
        although everything that is asked for passes
    the log tells that a test passed which the channel does  somebody else wrote that log
        not tell to have passed
    a test is told of that was never collected               somebody else wrote that channel
    a part of the runner is not what it was at the start     somebody replaced it

An honest patch that is wrong may break its canaries too (nothing can be imported any more): while some test that is
asked for does not pass, only the first, third, fourth and fifth count.

A test that fails as expected has passed where its own text expects that, and nowhere else.

What the log tells beside that decides nothing: a line that another one cut in two is no failure. A test that the
channel says has passed and the log says has failed has not passed, whichever is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.canaries import Planned
from skyrl_minisandbox.rewards.channel import Results
from skyrl_minisandbox.rewards.expected_failures import ExpectedFailures
from skyrl_minisandbox.rewards.names import Names, is_test
from skyrl_minisandbox.rewards.parsers import PARSERS, PASSING, load_parser
from skyrl_minisandbox.rewards.report import Canary
from skyrl_minisandbox.sandbox import CommandResult
from skyrl_minisandbox.tasks.task import Tests


@dataclasses.dataclass(frozen=True)
class Judged:
    """One run of the tests.

    tests: verdict by name of every test told of, canaries left out. passed: for each test asked for.
    """

    outcome: Outcome
    error: str
    tests: Mapping[str, str]
    passed: Mapping[str, bool]
    canaries: tuple[Canary, ...] = ()
    notes: tuple[str, ...] = ()


def judge(
    tests: Tests,
    asked: Sequence[str],
    done: CommandResult,
    results: Results | None,
    planned: Sequence[Planned],
    expected_failures: ExpectedFailures,
) -> Judged:
    """asked: the names that this run is to tell of. results: None for a runner that has no channel."""
    hidden = {name for one in planned for name in one.names}
    log = load_parser(tests.parser)(done.output, asked)
    told = results.tests if results is not None else log
    canaries = tuple(_canary(one, told) for one in planned)
    plain = log if tests.kind == tests.parser else _plain_log(tests, done.output, asked)
    run = _Run(tests, told, log, plain, hidden, expected_failures)
    passed = {name: run.passed(name) for name in asked}
    notes = _notes(passed, run, results, planned)
    bad = [name for name, good in passed.items() if not good]
    tampered = _tampered(asked, run, results, canaries, everything=bool(passed) and not bad)
    if tampered:
        outcome, error = Outcome.TAMPERED, tampered
    elif done.timed_out:
        outcome, error = Outcome.TESTS_TIMEOUT, f"the tests did not end within {done.seconds:.0f} s"
    elif results is not None and results.timed_out:
        outcome = Outcome.TESTS_TIMEOUT
        error = f"{results.timed_out} did not end within {tests.test_timeout:g} s"
    elif passed and not bad:
        outcome, error = Outcome.RESOLVED, ""
    else:
        outcome, error = Outcome.UNRESOLVED, _why(done, run, bad, results)
    return Judged(outcome, error, run.verdicts, passed, canaries, notes)


class _Run:
    """What one run told, on the channel and in the log, canaries left out."""

    def __init__(
        self,
        tests: Tests,
        told: Mapping[str, str],
        log: Mapping[str, str],
        plain: Mapping[str, str],
        hidden: Collection[str],
        expected_failures: ExpectedFailures,
    ) -> None:
        self.verdicts = {name: verdict for name, verdict in told.items() if name not in hidden}
        self.log = {name: verdict for name, verdict in log.items() if name not in hidden}
        self.names = Names(self.verdicts, tests.parser)
        self._kind = tests.kind
        self._plain = plain
        self._expected_failures = expected_failures

    def verdict(self, name: str) -> str | None:
        """What the listed test `name` came out as."""
        return self.names.lookup(name) if is_test(name, self._kind) else self.log.get(name)

    def passed(self, name: str) -> bool:
        verdict = self.verdict(name)
        if verdict == "XFAIL" and not self._expected_failures.allow(name):
            return False
        return verdict in PASSING and self.log.get(name) not in ("FAILED", "ERROR")

    def forged(self, name: str) -> bool:
        """Whether the log has it passed and the runner knows better. A name that stands for several tests, of which
        the log has but the last, tells nothing."""
        return (
            self._plain.get(name) == "PASSED" and len(self.names.tests(name)) < 2 and self.verdict(name) not in PASSING
        )


def _plain_log(tests: Tests, log: str, asked: Sequence[str]) -> Mapping[str, str]:
    """The log as our own parser of the runner reads it: those of datasets take lines for verdicts that any test may
    print, which is no proof of a forged log."""
    return load_parser(tests.kind)(log, asked) if tests.kind in PARSERS else {}


def _why(done: CommandResult, run: _Run, bad: Sequence[str], results: Results | None) -> str:
    """One line of why tests that ran to their end are not all passed."""
    if not run.verdicts:
        cause = f"nothing is told of any test, and the command ended with status {done.exit_code}"
    elif bad:
        cause = f"{len(bad)} tests did not pass, the first is {bad[0]} ({run.verdict(bad[0]) or 'not told of'})"
    else:
        cause = "the task names no tests"
    if results is not None and run.verdicts and not results.finished:
        cause += "; the run was cut short"
    if done.oom_killed:
        cause += "; a process was killed for memory"
    if done.disk_full:
        cause += "; the disk of the sandbox was full"
    return cause


def _tampered(
    asked: Sequence[str],
    run: _Run,
    results: Results | None,
    canaries: Sequence[Canary],
    *,
    everything: bool,
) -> str:
    """What shows that the verdicts cannot be believed; empty when nothing does."""
    for canary in canaries:
        if canary.must == "fail" and canary.verdict in ("PASSED", "XFAIL", "XPASS"):
            return "a test that cannot pass has passed"
    if results is None:
        return ""
    if results.changed:
        return f"parts of the test runner were replaced: {', '.join(results.changed[:3])}"
    if results.asked is not None:
        told = results.tests.items()
        strange = sorted(name for name, verdict in told if verdict in PASSING and name not in results.asked)
        if strange:
            return f"there are results of tests that were not asked for: {', '.join(strange[:3])}"
    forged = [name for name in asked if run.forged(name)]
    if forged:
        verdict = run.verdict(forged[0]) or "not run"
        return f"the log tells that {forged[0]} passed, and the runner that it is {verdict}"
    if everything:
        for canary in canaries:
            if not canary.right:
                said = canary.verdict or "not told of"
                return f"everything passes, but a test that must {canary.must} is {said}"
    return ""


def _notes(
    passed: Mapping[str, bool], run: _Run, results: Results | None, planned: Sequence[Planned]
) -> tuple[str, ...]:  # fmt: skip
    notes = []
    if results is None:
        notes.append("this runner has no channel: verdicts are those of the log")
    if not planned:
        notes.append("no canary could be planted into the test files")
    against = [name for name, good in passed.items() if not good and run.verdict(name) == "PASSED"]
    if against:
        notes.append(f"the runner tells that {against[0]} passed, and the log that it is {run.log.get(against[0])}")
    unseen = [name for name, good in passed.items() if good and name not in run.log]
    if unseen:
        notes.append(f"{len(unseen)} tests that passed are not in the log, the first is {unseen[0]}")
    return tuple(notes)


def _canary(planned: Planned, told: Mapping[str, str]) -> Canary:
    verdict = next((told[name] for name in planned.names if name in told), "")
    return Canary(planned.names[0], planned.must, verdict)
