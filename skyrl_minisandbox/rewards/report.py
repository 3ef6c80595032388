"""What grading a patch gives: the outcome and everything it was decided from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_minisandbox.record import Outcome


@dataclasses.dataclass(frozen=True)
class Canary:
    """A test of random name and body that was hidden among the real ones for one run.

    must: "pass" or "fail". verdict: what it came out as, "" when nothing was told of it.
    """

    name: str
    must: str
    verdict: str = ""

    @property
    def right(self) -> bool:
        """Whether it came out as it must."""
        return self.verdict in (("PASSED",) if self.must == "pass" else ("FAILED", "ERROR"))


@dataclasses.dataclass(frozen=True)
class TestReport:
    """The grade of one patch.

    outcome: `resolved`, `unresolved`, `empty_patch`, `patch_failed`, `tests_timeout` or `tampered`; what
        could not be graded is an exception, not a report.
    tests: verdict by test name, of every test that the log reports (`PASSED`, `FAILED`, `ERROR`, `SKIPPED`,
        `XFAIL`, `XPASS`).
    fail_to_pass, pass_to_pass: whether each test that the task asks for passed; one that the log does not
        report has not.
    log: the output of the test command (of `git apply` for `patch_failed`), cut as the sandbox cuts output.
    seconds: wall time of the whole grading.
    command: the test command that was run, empty when none was.
    exit_code: its exit status, None when none was run or the sandbox died.
    error: one line of why it is not resolved, empty when it is.
    sandbox_died: the sandbox ended under the tests. The patch ran in it, so it is scored; a caller may repeat
        the grading once, elsewhere, before it believes it.
    grading: the mode, `protected` or `official`.
    canaries: those of the first run; none in `official` mode.
    retries: for each test that was run again, its verdict in every run, the first included.
    dropped: tests of the lists that validation found to be flaky: they decide nothing.
    compiled: whether the Python files that the patch changes compile; None where it changes none, or where nobody
        asked (`needs` of a reward).
    restored: files of the patch that steer the test runner and were put back as the image has them.
    notes: what a reader should know beside: a runner without a channel, a cross-check that could not be made.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    outcome: Outcome
    tests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fail_to_pass: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    pass_to_pass: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    log: str = ""
    seconds: float = 0.0
    command: str = ""
    exit_code: int | None = None
    error: str = ""
    sandbox_died: bool = False
    grading: str = "official"
    canaries: Sequence[Canary] = ()
    retries: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    dropped: Sequence[str] = ()
    compiled: bool | None = None
    restored: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def resolved(self) -> bool:
        """Whether the outcome is `resolved`."""
        return self.outcome is Outcome.RESOLVED

    @property
    def missing(self) -> list[str]:
        """Tests that the task asks for and the log does not report."""
        return [name for name in [*self.fail_to_pass, *self.pass_to_pass] if name not in self.tests]

    @property
    def failed(self) -> list[str]:
        """Tests that the task asks for and that did not pass, whether reported or not."""
        return [name for name, good in [*self.fail_to_pass.items(), *self.pass_to_pass.items()] if not good]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is the inverse."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["outcome"] = self.outcome.value
        for key in ("tests", "fail_to_pass", "pass_to_pass"):
            data[key] = dict(data[key])
        for key in ("dropped", "restored", "notes"):
            data[key] = list(data[key])
        data["retries"] = {name: list(verdicts) for name, verdicts in self.retries.items()}
        data["canaries"] = [dataclasses.asdict(canary) for canary in self.canaries]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TestReport:
        """Raises `ValueError` for an unknown outcome, `TypeError` for unknown fields."""
        given: dict[str, Any] = {**data, "outcome": Outcome(data["outcome"])}
        given["canaries"] = tuple(Canary(**canary) for canary in data.get("canaries", ()))
        given["retries"] = {name: tuple(verdicts) for name, verdicts in data.get("retries", {}).items()}
        for key in ("dropped", "restored", "notes"):
            given[key] = tuple(data.get(key, ()))
        return cls(**given)
