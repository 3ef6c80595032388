"""A scaffold that runs what stands after a model's reasoning, and keeps the whole of what it was answered."""

from __future__ import annotations

from typing import Any

from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task
from tests.small import Loop


class Reasoning(Loop):
    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        return super().run(task, _Shortened(sandbox), policy)  # type: ignore[arg-type]


class _Shortened:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def run(self, command: str, **options: Any) -> Any:
        return self._sandbox.run(command.split("</think>")[-1].strip(), **options)
