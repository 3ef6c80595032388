"""Grading: a fresh sandbox of the task's image, the patch, the original tests, one verdict.

Who could have caused it decides what a failure is. Making the sandbox and applying our own test patch to
our own image cannot be spoilt by a patch: when they fail, that is an exception and the caller's
`infra_error`. From the moment when the patch is in, everything is its doing and becomes an outcome: a
killed init, a full disk, a time-out, an unreadable log.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.errors import SandboxError, SandboxGone, StoreError, TaskError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.parsers import load_parser
from skyrl_minisandbox.rewards.report import TestReport, passed
from skyrl_minisandbox.sandbox import CommandResult, Sandbox
from skyrl_minisandbox.tasks.task import Task

GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "safe.directory=*")
"""Nothing that a repository's configuration names is run."""

GIT_ENV = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C.UTF-8",
}

GIT_TIMEOUT = 120.0

# $@: files, relative to the workdir. Each becomes what HEAD has, or is removed where HEAD has none. A
# parent that is no directory (or a link to somewhere) is the patch's doing: it goes, and git makes the
# directory anew.
_RESTORE = r"""
set -u
status=0
for file in "$@"; do
  parent=.
  rest=$file
  while [[ $rest == */* ]]; do
    parent=$parent/${rest%%/*}
    rest=${rest#*/}
    if [[ -L $parent || ( -e $parent && ! -d $parent ) ]]; then rm -rf -- "$parent" || status=1; fi
  done
  if git -c core.hooksPath=/dev/null -c 'safe.directory=*' cat-file -e "HEAD:$file" 2>/dev/null; then
    git -c core.hooksPath=/dev/null -c 'safe.directory=*' checkout -q HEAD -- "$file" || status=1
  else
    rm -rf -- "./$file" || status=1
  fi
done
exit $status
"""


def grade(
    task: Task,
    patch: str,
    open_sandbox: Callable[[], Sandbox],
    *,
    grading: GradingConfig | None = None,
    run_empty: bool = False,
    timeout: float | None = None,
) -> TestReport:
    """Judge `patch` by the task's tests.

    open_sandbox: makes a fresh sandbox of the task's image; closed here.
    run_empty: run the tests even though the patch is empty (validation); otherwise that is `empty_patch`.
    timeout: seconds for the test command, the task's own when None.

    Raises `SandboxError` when no sandbox can be had, `TaskError` when the task's test patch does not fit
    its own image, `StoreError` when git cannot be run in it. Nothing that the patch does is an exception.
    """
    started = time.monotonic()
    empty = not patch.strip()
    if empty and not run_empty:
        return _report(task, Outcome.EMPTY_PATCH, started, error="the patch is empty")
    with open_sandbox() as sandbox:
        workdir = task.recipe.workdir
        # The first command runs nothing of the patch: a sandbox that is gone here is ours.
        if not empty:
            applied = apply_patch(sandbox, patch, workdir)
            if applied.exit_code in (126, 127):  # git did not even start, and nothing of the patch was in
                raise StoreError(f"the image of task `{task.id}` is damaged on this node: {_apply_error(applied)}")
            if applied.exit_code != 0:
                return _report(
                    task,
                    Outcome.PATCH_FAILED,
                    started,
                    log=applied.output,
                    error=_apply_error(applied),
                )
        try:
            problem = _bring_tests(task, sandbox)
            if problem is not None:
                if not empty and _tests_fit(task, open_sandbox):
                    return _report(
                        task,
                        Outcome.UNRESOLVED,
                        started,
                        log=problem.output,
                        error=f"the tests do not go in on top of this patch: {_apply_error(problem)}",
                    )
                raise TaskError(
                    f"the test patch of task `{task.id}` does not fit its image: {_apply_error(problem)}",
                    hint=f"minisandbox validate tasks.ids=[{task.id}]",
                )
            result = sandbox.run(
                task.tests.command, cwd=workdir, timeout=task.tests.timeout if timeout is None else timeout
            )
        except SandboxGone as error:
            return _report(
                task,
                Outcome.UNRESOLVED,
                started,
                command=task.tests.command,
                error=f"the sandbox died under the patch: {error}",
                sandbox_died=True,
            )
    return judge(task, result, started)


def judge(task: Task, result: CommandResult, started: float) -> TestReport:
    """The report of a finished test command. started: monotonic time when grading began."""
    log = result.output
    names = [*task.tests.fail_to_pass, *task.tests.pass_to_pass]
    tests = load_parser(task.tests.parser)(log, names)
    good = passed(task.tests.fail_to_pass, tests) | passed(task.tests.pass_to_pass, tests)
    bad = [name for name, ok in good.items() if not ok]
    if result.timed_out:
        outcome, error = Outcome.TESTS_TIMEOUT, f"the tests did not end within {result.seconds:.0f} s"
    elif good and not bad:
        outcome, error = Outcome.RESOLVED, ""
    else:
        outcome, error = Outcome.UNRESOLVED, _why(result, tests, bad)
    return _report(
        task,
        outcome,
        started,
        tests=tests,
        log=log,
        command=task.tests.command,
        exit_code=result.exit_code,
        error=error,
    )


def apply_patch(sandbox: Sandbox, patch: str, workdir: str) -> CommandResult:
    """`git apply` in the worktree only, all hunks or none.

    git itself refuses paths outside the workdir and below `.git`.
    """
    text = patch if patch.endswith("\n") else patch + "\n"
    return sandbox.run(
        [*GIT, "apply", "--whitespace=nowarn", "-"],
        input=_as_bytes(text),
        cwd=workdir,
        env=GIT_ENV,
        timeout=GIT_TIMEOUT,
    )


def _as_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair: no file has it, so git refuses the patch
        return text.encode("utf-8", "replace")


def _bring_tests(task: Task, sandbox: Sandbox) -> CommandResult | None:
    """Restore the test files and apply the hidden tests; the result of the step that failed, or None."""
    workdir = task.recipe.workdir
    restored = sandbox.run(
        ["bash", "-c", _RESTORE, "restore", *task.tests.files], cwd=workdir, env=GIT_ENV, timeout=GIT_TIMEOUT
    )
    if restored.exit_code != 0:
        return restored
    if not task.tests.patch.strip():
        return None
    applied = apply_patch(sandbox, task.tests.patch, workdir)
    return applied if applied.exit_code != 0 else None


def _tests_fit(task: Task, open_sandbox: Callable[[], Sandbox]) -> bool:
    """Whether the tests go in without the patch: the one probe that tells whose fault it is."""
    try:
        with open_sandbox() as sandbox:
            return _bring_tests(task, sandbox) is None
    except SandboxGone as error:
        raise SandboxError(f"the sandbox of task `{task.id}` died before any patch was in: {error}") from error


def _apply_error(result: CommandResult) -> str:
    """Which file and hunk, in one line."""
    if result.timed_out:
        return f"git did not end within {GIT_TIMEOUT:.0f} s"
    if result.disk_full:
        return "the disk of the sandbox is full"
    if result.oom_killed:
        return "git was killed for memory"
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith(("error:", "fatal:"))]
    text = "; ".join((errors or lines)[:3]) or f"git ended with status {result.exit_code}"
    return text[:500]


def _why(result: CommandResult, tests: dict[str, str], bad: list[str]) -> str:
    if not tests:
        cause = f"the log has no results, and the command ended with status {result.exit_code}"
    else:
        cause = f"{len(bad)} tests did not pass, the first is {bad[0]}" if bad else "the task names no tests"
    if result.oom_killed:
        cause += "; a process was killed for memory"
    if result.disk_full:
        cause += "; the disk of the sandbox was full"
    return cause


def _report(
    task: Task,
    outcome: Outcome,
    started: float,
    *,
    tests: dict[str, str] | None = None,
    log: str = "",
    command: str = "",
    exit_code: int | None = None,
    error: str = "",
    sandbox_died: bool = False,
) -> TestReport:
    tests = tests or {}
    return TestReport(
        outcome=outcome,
        tests=tests,
        fail_to_pass=passed(task.tests.fail_to_pass, tests),
        pass_to_pass=passed(task.tests.pass_to_pass, tests),
        log=log,
        seconds=time.monotonic() - started,
        command=command,
        exit_code=exit_code,
        error=error,
        sandbox_died=sandbox_died,
    )
