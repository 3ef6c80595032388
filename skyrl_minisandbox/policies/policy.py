"""What answers a scaffold."""

from __future__ import annotations

from typing import Protocol

from skyrl_minisandbox.record import EndedBy

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`, as OpenAI and SkyRL have it."""


class PolicyStopped(BaseException):
    """Raised out of `query` to unwind a scaffold: the rollout ended from outside (turn limit, time, close).

    A BaseException, so that a scaffold's own `except Exception` does not swallow it.

    ended_by: what the submission of a scaffold that unwinds in order should say.
    """

    def __init__(self, ended_by: EndedBy = EndedBy.TURN_LIMIT) -> None:
        super().__init__(f"the rollout ended from outside: {ended_by}")
        self.ended_by = ended_by


class Policy(Protocol):
    """One conversation's answers."""

    def query(self, messages: list[Message]) -> str:
        """Return the assistant's text for the whole conversation so far.

        Raises `PolicyError` when no answer can be had, `PolicyStopped` when the rollout has ended.
        """
        ...
