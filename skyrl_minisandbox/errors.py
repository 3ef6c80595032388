"""Every exception of this package: one hierarchy, whose message and way out are fields.

The rule that decides what is an exception at all: what an *agent* can cause inside its sandbox is a
value (a `CommandResult`, an outcome), never an exception. An exception is the user's input, the
machine, or a fault of ours; `exit_code` says which, and is what the `minisandbox` command exits with.

Every class survives pickling, because exceptions cross Ray actors and worker processes.
"""

from __future__ import annotations

from typing import Any


class MiniSandboxError(Exception):
    """Base class.

    message: what failed, on which task, image or node.
    hint: what to do about it, where possible a command to type. Printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.hint))

    def __str__(self) -> str:
        return self.message

    def render(self) -> str:
        """The text that a person reads: message, then `hint:` on a line of its own."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


def _rebuild(cls: type[MiniSandboxError], message: str, hint: str) -> MiniSandboxError:
    return cls(message, hint=hint)


class InputError(MiniSandboxError):
    """What the user asked for cannot be: an unknown key, task, name, or a bad row."""

    exit_code = 2


class TaskError(InputError):
    """A dataset row that is not a task; the message names the row and the field."""


class PluginError(InputError):
    """A short name or dotted path that leads to nothing usable; the message lists what exists."""


class MachineError(MiniSandboxError):
    """The machine lacks something; the hint says what mends it."""

    exit_code = 3


class DiskFull(MachineError):
    """A disk of this machine has no room for what we write to it."""


class SandboxError(MiniSandboxError):
    """A sandbox could not be made or did not answer as it must. Ours, never the agent's."""


class SandboxGone(SandboxError):
    """The sandbox's init is no longer there. What was asked of it may or may not have happened."""


class BuildError(MiniSandboxError):
    """A build step failed; the message names the step and the kept log."""


class StoreError(MiniSandboxError):
    """The image store cannot give what it should: missing, unreadable, another format."""


class CorruptLayer(StoreError):
    """Bytes of a layer are not the bytes its digest names."""


class PolicyError(MiniSandboxError):
    """What answers the scaffold does not answer (an endpoint that is down, a script that ended)."""


class NodeError(MiniSandboxError):
    """A node, or a worker process of it, is gone or did not answer in time.

    node: its name, where whoever raised it knew; it does not cross processes.
    """

    node = ""


class NodeLost(NodeError):
    """A whole node is gone, with every rollout on it."""


class WorkerLost(NodeError):
    """A worker process ended by itself, with every rollout in it."""


class OutOfMemory(NodeError):
    """The machine had no memory left and killed a process of ours for it."""


def one_line(error: BaseException) -> str:
    """An error as the one line of a record, with its class where the text alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, MiniSandboxError):
        hint = f" (hint: {error.hint})" if error.hint else ""
        return text + hint
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class InfraErrorsError(MiniSandboxError):
    """Too many rollouts of a step failed for reasons of ours; the message counts the causes and the nodes."""
