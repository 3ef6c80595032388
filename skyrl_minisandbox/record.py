"""Plain data of a finished rollout. Written as one line of a run directory's `results.jsonl`."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Outcome(str, enum.Enum):
    """What became of a rollout. The set is closed: nothing else is ever written.

    Where a grade exists the outcome is the grade's; `agent_limit` and `agent_error` are only for
    what could not be graded. `infra_error` is ours and never becomes a number.
    """

    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    EMPTY_PATCH = "empty_patch"
    PATCH_FAILED = "patch_failed"
    TESTS_TIMEOUT = "tests_timeout"
    TAMPERED = "tampered"
    AGENT_LIMIT = "agent_limit"
    AGENT_ERROR = "agent_error"
    INFRA_ERROR = "infra_error"

    def __str__(self) -> str:
        return self.value


class EndedBy(str, enum.Enum):
    """What ended the scaffold, beside the outcome."""

    SUBMIT = "submit"
    TURN_LIMIT = "turn_limit"
    LENGTH = "length"
    TIME = "time"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass
class Seconds:
    """Wall seconds of a rollout's stages, on the monotonic clock."""

    checkout: float = 0.0
    create: float = 0.0
    agent: float = 0.0
    grade: float = 0.0


@dataclasses.dataclass
class RolloutRecord:
    """One finished rollout.

    reward: None exactly when the outcome is `infra_error`.
    turns: how many texts the policy gave.
    node: the name of the node that ran it.
    error: one line, empty when nothing went wrong.
    """

    rollout_id: str
    task_id: str
    outcome: Outcome
    ended_by: EndedBy
    reward: float | None
    turns: int
    seconds: Seconds
    node: str
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object of `results.jsonl`: plain strings, numbers and dicts."""
        data = dataclasses.asdict(self)
        data["outcome"] = self.outcome.value
        data["ended_by"] = self.ended_by.value
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RolloutRecord:
        """The inverse of `to_json`. Raises `ValueError` for an unknown outcome or ending."""
        return cls(
            rollout_id=data["rollout_id"],
            task_id=data["task_id"],
            outcome=Outcome(data["outcome"]),
            ended_by=EndedBy(data["ended_by"]),
            reward=data["reward"],
            turns=data["turns"],
            seconds=Seconds(**data["seconds"]),
            node=data["node"],
            error=data.get("error", ""),
        )
