"""Whether the test command starts at all in the task's image: a run that tells of no test may be the image's fault.

A patch can make its own tests tell of nothing too, by the same exit status and the same words, so what the patched run
looks like decides nothing. The same command over the image with the hidden tests alone does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.rewards import restore
from skyrl_minisandbox.sandbox import CommandResult, Sandbox
from skyrl_minisandbox.tasks.task import Task

_SHELL = (126, 127)
"""What a shell's command ends with when the program cannot be run, or is not there (POSIX, 2.8.2)."""

_MODULES = {"pytest": "pytest", "django": "django", "sympy": "sympy"}
"""What `python -m` must find for a runner."""


def check(task: Task, done: CommandResult, open_sandbox: Callable[[], Sandbox]) -> None:
    """For a run that told of no test at all.

    open_sandbox: makes a fresh sandbox of the task's image.
    Raises `StoreError` when the image lacks what runs its tests, `SandboxError` when that cannot be asked.
    """
    if not _missing(task, done):
        return
    try:
        with restore.no_patch_in(task), open_sandbox() as sandbox:
            restore.bring_tests(task, sandbox)
            bare = sandbox.run(task.tests.command, cwd=task.recipe.workdir, timeout=task.tests.timeout)
    except restore.DoesNotGoIn as error:
        raise restore.damaged(task, error) from None
    words = _missing(task, bare)
    if words:
        raise StoreError(
            f"the image of task `{task.id}` lacks what runs its tests: {words}",
            hint=f"minisandbox validate tasks.ids=[{task.id}]",
        )


def _missing(task: Task, done: CommandResult) -> str:
    """The words by which a run says that its runner is not there; empty when it does not."""
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    module = _MODULES.get(task.tests.kind)
    if module is not None and re.search(rf"No module named '?{module}'?$", last):
        return last
    if done.exit_code in _SHELL and not done.timed_out:
        return last or f"the command ended with status {done.exit_code}"
    return ""
