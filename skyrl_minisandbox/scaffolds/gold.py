"""Submits the reference solution: every sound task ends `resolved`."""

from __future__ import annotations

from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission, whole
from skyrl_minisandbox.tasks.task import PublicTask, Task


class GoldScaffold(Scaffold):
    """The gold patch, without a look at the sandbox or a question to the policy."""

    privileged = True

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Return the task's gold patch."""
        return Submission(patch=whole(task).gold_patch)
