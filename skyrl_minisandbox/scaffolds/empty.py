"""Submits nothing: no task may end `resolved`."""

from __future__ import annotations

from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task


class EmptyScaffold(Scaffold):
    """The empty patch, without a look at the sandbox or a question to the policy."""

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Return the empty patch."""
        return Submission(patch="")
