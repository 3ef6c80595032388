"""What answers a scaffold."""

from __future__ import annotations

from typing import Protocol

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`, as OpenAI and SkyRL have it."""


class PolicyStopped(BaseException):
    """Raised out of `query` to unwind a scaffold: the rollout ended from outside (turn limit, time, close).

    A BaseException, so that a scaffold's own `except Exception` does not swallow it.
    """


class Policy(Protocol):
    """One conversation's answers."""

    def query(self, messages: list[Message]) -> str:
        """Return the assistant's text for the whole conversation so far.

        Raises `PolicyError` when no answer can be had, `PolicyStopped` when the rollout has ended.
        """
        ...
