"""The agent program around a model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks.task import PublicTask, Task


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a scaffold leaves.

    patch: unified diff against the image's workdir, or None: then we take our own diff of the frozen upper.
    ended_by: what ended it. error: one line, empty when nothing went wrong.
    trajectory: JSON-able record of the conversation, in the scaffold's own format.
    """

    patch: str | None
    ended_by: EndedBy = EndedBy.SUBMIT
    error: str = ""
    trajectory: Any = None


class Scaffold:
    """Base class. A scaffold is made once per rollout and run once.

    privileged: `run` gets the whole `Task` (gold patch, hidden tests) instead of its public part.
    history_only_grows: it never removes or rewrites a message; required by the inverted policy.
    needs_network: its sandbox must have one; refused where there is none.
    """

    privileged: ClassVar[bool] = False
    history_only_grows: ClassVar[bool] = True
    needs_network: ClassVar[bool] = False

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Work on the task until it submits, and return what it leaves.

        Whatever the agent does inside is no exception; an exception from here is a fault of the scaffold.
        `PolicyStopped` out of `policy.query` may pass through, or be answered by returning what there is so
        far with its `ended_by`; nothing may be asked of the policy after it.
        """
        raise NotImplementedError


def check_invertible(scaffold: Scaffold, name: str) -> None:
    """Raises `InputError` for a scaffold that cannot be turned inside out for a trainer. name: as it was configured."""
    if not scaffold.history_only_grows:
        raise InputError(
            f"scaffold `{name}` rewrites its history, which the trainer's token stream cannot follow",
            hint="switch its history processing off, or take another scaffold",
        )
    if scaffold.needs_network:
        raise InputError(
            f"scaffold `{name}` needs a network, and a rollout's sandbox has none",
            hint="take another scaffold",
        )


def whole(task: PublicTask | Task) -> Task:
    """The whole task, for privileged scaffolds. Raises `TypeError` where only the public part was given."""
    if not isinstance(task, Task):
        raise TypeError(f"a privileged scaffold was given the public part of task `{task.id}`")
    return task
