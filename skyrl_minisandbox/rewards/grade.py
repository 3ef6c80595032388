"""Grading: a fresh sandbox of the task's image, the patch, the original tests, one verdict.

`official` runs the dataset's own procedure and reads its log. `protected` puts back whatever steers the runner, hides
canaries among the tests, and takes the results from a channel of its own; `judge.py` says what they mean.

Who could have caused it decides what a failure is. Making the sandbox and applying our own test patch to
our own image cannot be spoilt by a patch: when they fail, that is an exception and the caller's
`infra_error`. From the moment when the patch is in, everything is its doing and becomes an outcome: a
killed init, a full disk, a time-out, an unreadable log.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.errors import SandboxGone, StoreError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import channel, official, restore, runner
from skyrl_minisandbox.rewards.apply import apply_patch
from skyrl_minisandbox.rewards.canaries import Planned, plant
from skyrl_minisandbox.rewards.compiles import compiles
from skyrl_minisandbox.rewards.expected_failures import ExpectedFailures
from skyrl_minisandbox.rewards.judge import Judged, judge
from skyrl_minisandbox.rewards.report import TestReport
from skyrl_minisandbox.sandbox import CommandResult, Sandbox
from skyrl_minisandbox.tasks.diff import changed_files
from skyrl_minisandbox.tasks.task import Task

Opener = Callable[[], Sandbox]

LONGEST_LOG = 32 << 20
"""Bytes of each stream of the test command: of a longer log the middle is cut, and the verdicts in it are lost."""


def grade(
    task: Task,
    patch: str,
    open_sandbox: Opener,
    *,
    grading: GradingConfig | None = None,
    run_empty: bool = False,
    timeout: float | None = None,
    needs: Collection[str] = (),
) -> TestReport:
    """Judge `patch` by the task's tests.

    open_sandbox: makes a fresh sandbox of the task's image; closed here.
    grading: how; the default of the configuration (`protected`) when None.
    run_empty: run the tests even though the patch is empty (validation); otherwise that is `empty_patch`.
    timeout: seconds for the test command, the task's own when None.
    needs: fields of the report to fill although no test does (`Reward.needs`): `compiled`.

    Raises `SandboxError` when no sandbox can be had, `TaskError` when the task's test patch does not fit
    its own image, `StoreError` when git or the test runner cannot be run in it. Nothing that the patch does is an
    exception.
    """
    how, limit = grading or GradingConfig(), task.tests.timeout if timeout is None else timeout
    return _Grading(task, patch, open_sandbox, how, limit, needs).grade(run_empty)


class _Stopped(Exception):
    """There is a verdict before any test has run, or without one; `report` is it."""

    def __init__(self, outcome: Outcome, error: str, log: str = "") -> None:
        super().__init__(error)
        self.outcome, self.error, self.log = outcome, error, log


class _Grading:
    """One patch on its way to a report."""

    def __init__(
        self, task: Task, patch: str, open_sandbox: Opener, grading: GradingConfig, timeout: float,
        needs: Collection[str],
    ) -> None:  # fmt: skip
        self._task, self._patch, self._open, self._how, self._timeout = task, patch, open_sandbox, grading, timeout
        self._started = time.monotonic()
        self._asked = (*task.tests.fail_to_pass, *task.tests.pass_to_pass)
        self._restored: tuple[str, ...] = ()
        self._look_at_code = "compiled" in needs and bool(patch.strip())
        self._compiled: bool | None = None

    def grade(self, run_empty: bool) -> TestReport:
        if not self._patch.strip() and not run_empty:
            return self._report(Outcome.EMPTY_PATCH, "the patch is empty")
        try:
            return self._official() if self._how.mode == "official" else self._protected()
        except _Stopped as stopped:
            return self._report(stopped.outcome, stopped.error, log=stopped.log)
        except _Died as died:
            return self._report(
                Outcome.UNRESOLVED, f"the sandbox died under the patch: {died}", command=self._task.tests.command,
                sandbox_died=True,
            )  # fmt: skip

    def _official(self) -> TestReport:
        with self._open() as sandbox:
            self._bring_in(sandbox)
            done = self._run(sandbox)
        tests = self._task.tests
        verdict = official.verdict(tests, done.output, done.exit_code, self._how.rules)
        passed = {**verdict.fail_to_pass, **verdict.pass_to_pass}
        if not verdict.tests:
            runner.check(self._task, done, self._open)
        if done.timed_out:
            outcome, error = Outcome.TESTS_TIMEOUT, f"the tests did not end within {done.seconds:.0f} s"
        elif verdict.resolved:
            outcome, error = Outcome.RESOLVED, ""
        else:
            outcome, error = Outcome.UNRESOLVED, verdict.reason
        return self._graded(Judged(outcome, error, verdict.tests, passed), done)

    def _protected(self) -> TestReport:
        judged, done = self._protected_run(())
        retries: dict[str, list[str]] = {}
        for _ in range(self._how.retries):
            again = self._worth_another(judged)
            if not again:
                break
            second, _ = self._protected_run(again)
            for name in again:
                retries.setdefault(name, [_word(judged, name)]).append(_word(second, name))
            judged = _together(judged, second, again)
        return self._graded(judged, done, retries)

    def _worth_another(self, judged: Judged) -> tuple[str, ...]:
        """The pass-to-pass tests that alone stand between this run and a reward."""
        if judged.outcome is not Outcome.UNRESOLVED:
            return ()
        bad = tuple(name for name, good in judged.passed.items() if not good)
        wanted = set(self._task.tests.fail_to_pass)
        return () if wanted & set(bad) or len(bad) > _MOST_AGAIN else bad

    def _protected_run(self, only: Sequence[str]) -> tuple[Judged, CommandResult]:
        """The tests once, in a sandbox of their own. only: these names, empty for all."""
        tests = self._task.tests
        with self._open() as sandbox:
            self._bring_in(sandbox)
            try:
                planned, sources = self._plant(sandbox)
                names = (*only, *(name for one in planned for name in one.names)) if only else ()
                reports = channel.place(
                    sandbox, tests.kind, python=self._task.recipe.python, workdir=self._task.recipe.workdir,
                    only=names, test_timeout=tests.test_timeout,
                )  # fmt: skip
            except SandboxGone as error:
                raise _Died(error) from None
            except OSError as error:  # a full disk, a directory where a file goes: the patch's doing
                raise _Stopped(Outcome.UNRESOLVED, f"the tests cannot be made ready with this patch: {error}") from None
            done = self._run(sandbox)
            try:
                results = reports.read(sandbox) if reports is not None else None
            except SandboxGone as error:
                raise _Died(error) from None
        expected = ExpectedFailures(sources.values())
        judged = judge(tests, tuple(only) or self._asked, done, results, planned, expected)
        if not judged.tests:
            runner.check(self._task, done, self._open)
        return judged, done

    def _bring_in(self, sandbox: Sandbox) -> None:
        """The patch, then the original tests on top."""
        task = self._task
        empty = not self._patch.strip()
        # The first command runs nothing of the patch: a sandbox that is gone here is ours.
        if not empty:
            applied = apply_patch(sandbox, self._patch, task.recipe.workdir, self._how.patch)
            if not applied.started:
                raise StoreError(f"the image of task `{task.id}` is damaged on this node: {applied.error}")
            if not applied.ok:
                raise _Stopped(Outcome.PATCH_FAILED, applied.error, applied.log)
        try:
            if self._look_at_code:  # as the patch has it, before anything is put back; once
                self._look_at_code = False
                self._compiled = compiles(sandbox, self._patch, task.recipe.workdir)
            if self._how.mode == "official":
                restore.restore_tests(task, sandbox)
            else:
                self._restored = restore.restore(task, sandbox, self._open, changed_files(task.gold_patch))
            restore.bring_tests(task, sandbox)
        except restore.DoesNotGoIn as error:
            if not empty and restore.tests_fit(task, self._open):
                raise _Stopped(
                    Outcome.UNRESOLVED, f"the tests do not go in on top of this patch: {error}", str(error)
                ) from None
            raise restore.damaged(task, error) from None
        except SandboxGone as error:
            raise _Died(error) from None

    def _plant(self, sandbox: Sandbox) -> tuple[tuple[Planned, ...], Mapping[str, str]]:
        """Canaries among the tests that are about to run; and the test files by path, as they were before."""
        tests, workdir = self._task.tests, self._task.recipe.workdir.rstrip("/")
        sources: dict[str, str] = {}
        for path in tests.files:
            if path.endswith(".py"):
                try:
                    sources[path] = sandbox.read_file(f"{workdir}/{path}").decode("utf-8")
                except (FileNotFoundError, UnicodeDecodeError):
                    continue  # the hidden tests remove it; or it is of another encoding, and no place for a canary
        planted = plant(tests.kind, sources, tests, random.SystemRandom())
        for path, source in planted.sources.items():
            sandbox.write_file(f"{workdir}/{path}", source.encode("utf-8"))
        return tuple(planted.canaries), sources

    def _run(self, sandbox: Sandbox) -> CommandResult:
        try:
            return sandbox.run(
                self._task.tests.command, cwd=self._task.recipe.workdir, timeout=self._timeout, output=LONGEST_LOG
            )
        except SandboxGone as error:
            raise _Died(error) from None

    def _graded(
        self, judged: Judged, done: CommandResult, retries: Mapping[str, Sequence[str]] | None = None
    ) -> TestReport:
        return self._report(
            judged.outcome, judged.error, judged=judged, log=done.output, command=self._task.tests.command,
            exit_code=done.exit_code, retries=retries,
        )  # fmt: skip

    def _report(
        self,
        outcome: Outcome,
        error: str,
        *,
        judged: Judged | None = None,
        log: str = "",
        command: str = "",
        exit_code: int | None = None,
        retries: Mapping[str, Sequence[str]] | None = None,
        sandbox_died: bool = False,
    ) -> TestReport:
        tests = self._task.tests
        passed = judged.passed if judged is not None else {}
        return TestReport(
            outcome=outcome,
            tests=judged.tests if judged is not None else {},
            fail_to_pass={name: passed.get(name, False) for name in tests.fail_to_pass},
            pass_to_pass={name: passed.get(name, False) for name in tests.pass_to_pass},
            log=log,
            seconds=time.monotonic() - self._started,
            command=command,
            exit_code=exit_code,
            error=error,
            sandbox_died=sandbox_died,
            grading=self._how.mode,
            canaries=judged.canaries if judged is not None else (),
            retries={name: tuple(verdicts) for name, verdicts in (retries or {}).items()},
            dropped=tests.flaky,
            compiled=self._compiled,
            restored=self._restored,
            notes=judged.notes if judged is not None else (),
        )


_MOST_AGAIN = 50
"""Failing pass-to-pass tests that may be noise. More of them are the patch's doing, and running them costs time."""


class _Died(Exception):
    """The sandbox ended while the patch was in it."""


def _word(judged: Judged, name: str) -> str:
    return judged.tests.get(name) or ("PASSED" if judged.passed[name] else "")


def _together(first: Judged, second: Judged, again: Sequence[str]) -> Judged:
    """What two runs say, the second of which ran only `again`."""
    if second.outcome is Outcome.TAMPERED:
        return dataclasses.replace(first, outcome=second.outcome, error=second.error)
    passed = {**first.passed, **{name: second.passed[name] for name in again}}
    tests = {**first.tests, **{name: second.tests[name] for name in again if name in second.tests}}
    bad = [name for name, good in passed.items() if not good]
    if not bad:
        return dataclasses.replace(first, outcome=Outcome.RESOLVED, error="", tests=tests, passed=passed)
    return dataclasses.replace(first, tests=tests, passed=passed)
