"""What a driver and a node say to each other about one rollout: plain data that crosses processes and machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from skyrl_minisandbox.config import GradingConfig, RewardConfig, RolloutConfig, ScaffoldConfig
from skyrl_minisandbox.policies.policy import Message
from skyrl_minisandbox.record import RolloutRecord
from skyrl_minisandbox.sandbox.spec import Limits
from skyrl_minisandbox.tasks.task import Task

CANCELLATION = 10.0
"""Seconds that a scaffold's thread has to end once its sandbox is gone; after that its worker is given up."""

PROBE = 60.0
"""Seconds that the look whether a node is healthy may take."""


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """All that a node must know to run one rollout. Plain data: it crosses processes and machines.

    rollout_id: unique in the cluster for all time.
    max_turns: answers before the end; 0: no bound.
    on_disk: what its sandboxes write goes to disk. pool: sandboxes kept ready for its image; 0: none.
    before: the event (`rewards.fault`) that ended the same row's earlier try elsewhere; "" for a first try.
    """

    rollout_id: str
    task: Task
    scaffold: ScaffoldConfig
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    grading: GradingConfig = dataclasses.field(default_factory=GradingConfig)
    limits: Limits = dataclasses.field(default_factory=Limits)
    allow_degraded: tuple[str, ...] = ()
    bounds: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    max_turns: int = 0
    on_disk: bool = False
    pool: int = 0
    before: str = ""

    @property
    def grading_seconds(self) -> float:
        """The most that one grading may take: the tests, each retry of theirs, and all else."""
        runs = 1 + (self.grading.retries if self.grading.mode == "protected" else 0)
        return self.task.tests.timeout * runs + self.bounds.grade

    @property
    def stopping_seconds(self) -> float:
        """The most that a node takes to end a scaffold and to take its patch, and a probe after it."""
        return CANCELLATION + self.bounds.grade + PROBE

    @property
    def judging_seconds(self) -> float:
        """The most that a node takes for the grade, and a probe after it."""
        return self.grading_seconds + PROBE

    @property
    def ending_seconds(self) -> float:
        """The most that a node takes to end a rollout, once it is its turn to be graded."""
        return self.stopping_seconds + self.judging_seconds


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a rollout leaves.

    patch: what was graded; empty when nothing was.
    tests: test name -> verdict as the parser gives them. log: the tail of the tests' output.
    report: the whole TestReport as JSON, with that log; None when nothing was graded.
    trajectory: JSON-able; holds nothing of the hidden tests or the gold patch.
    history_divergence: messages that the scaffold took back although the trainer keeps them.
    event: why nothing could be graded, a value of `rewards.fault.Event`; "" where there is a grade.
    repeat: the grading broke on a node that is healthy. Its outcome stands only if the same patch does that again
        elsewhere; `Cluster` sees to it.
    """

    record: RolloutRecord
    patch: str = ""
    tests: dict[str, str] = dataclasses.field(default_factory=dict)
    log: str = ""
    report: dict[str, Any] | None = None
    trajectory: dict[str, Any] = dataclasses.field(default_factory=dict)
    history_divergence: int = 0
    event: str = ""
    repeat: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the policy is to answer next, or how the rollout finished, or that only its grade is missing.

    messages: what the scaffold added since its last query; empty at first when it has ended unasked.
    ungraded: its patch is taken and its sandbox gone; `judge` gives the grade. A node only says so to `Cluster`,
        which sees to it that not too many are graded at once.
    """

    messages: list[Message]
    finished: Finished | None = None
    ungraded: bool = False

    @property
    def done(self) -> bool:
        return self.finished is not None
