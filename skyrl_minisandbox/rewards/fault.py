"""What a failure is worth: the table, in one place, for whoever decides on one.

Who could have caused it decides. What a command inside (the agent's, or a test that runs the patch's code) can bring
about is scored, or a policy learns to break its sandbox to escape a 0; what none can is `infra_error`, whose reward is
no number, or a rollout that never ran becomes a 0 that nobody earned. Both errors train the wrong thing, the first one
worse: it can be learnt.

Between the two is what is most likely ours and can be the agent's all the same. It gets a second try elsewhere, alone:

    a process of ours dies       the row is masked, and comes again with `before` set to the event. It then has a
                                 worker process of its own, so that a second death can be nobody else's doing: scored
    a grading breaks or hangs    the same patch is graded once more, by a worker process of its own, on another node
                                 where there is one: what happens twice is the patch's doing

Two probes tell such cases apart, both in rollout.py: whether the launcher lives, and whether a new sandbox of the same
image works. Where they say no, the machine is at fault whatever else was seen.

What the table misses: a fault of a scaffold that shows only after the first answer counts as the agent's, since answers
can provoke such faults; and without a memory cgroup (a plain user without delegation) an agent can use up the machine's
memory, which counts as ours.
"""

from __future__ import annotations

import dataclasses
import enum
import errno

from skyrl_minisandbox.errors import (
    CorruptLayer,
    DiskFull,
    InputError,
    MachineError,
    NodeLost,
    OutOfMemory,
    PolicyError,
    SandboxError,
    StoreError,
    WorkerLost,
)
from skyrl_minisandbox.record import Outcome


class Event(str, enum.Enum):
    """What went wrong. The value stands in `Finished.event` and in a retry's `extras["before"]`."""

    # A command inside can bring these about.
    LIMIT = "limit"
    SANDBOX_ENDED = "sandbox_ended"
    TIME_LIMIT = "time_limit"
    TESTS_TIMEOUT = "tests_timeout"
    SCAFFOLD_FAILED = "scaffold_failed"
    # A command inside can, and so can a machine in trouble: graded a second time, elsewhere.
    GRADING_DIED = "grading_died"
    GRADING_LATE = "grading_late"
    # None can, unless the same row does it again, elsewhere and alone.
    WORKER_LOST = "worker_lost"
    LAUNCHER_LOST = "launcher_lost"
    # None can.
    STORE_GONE = "store_gone"
    LAYER_CORRUPT = "layer_corrupt"
    NOT_SET_UP = "not_set_up"
    TASK_UNFIT = "task_unfit"
    NODE_LOST = "node_lost"
    DISK_FULL = "disk_full"
    OUT_OF_MEMORY = "out_of_memory"
    UNANSWERED = "unanswered"
    OURS = "ours"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    what: in words. inside: whether a command inside can bring it about.
    outcome: of the rollout where nothing can be graded; None: it is a command's result, and the rollout goes on.
    again: the outcome where the same row met a fault of this kind before, elsewhere; None: the same.
    """

    what: str
    inside: bool
    outcome: Outcome | None
    again: Outcome | None = None


TABLE: dict[Event, Rule] = {
    Event.LIMIT: Rule(
        "a limit on memory, processes, disk, inodes or output; a killed shell; everything inside killed", True, None
    ),
    Event.SANDBOX_ENDED: Rule("the agent's sandbox ended, on a healthy node", True, Outcome.AGENT_ERROR),
    Event.TIME_LIMIT: Rule("a command, a step, or all steps took too long", True, Outcome.AGENT_LIMIT),
    Event.TESTS_TIMEOUT: Rule("the tests took too long", True, Outcome.TESTS_TIMEOUT),
    Event.SCAFFOLD_FAILED: Rule("the scaffold failed after an answer", True, Outcome.AGENT_ERROR),
    Event.GRADING_DIED: Rule("the sandbox died under the tests, on a healthy node, twice", True, Outcome.UNRESOLVED),
    Event.GRADING_LATE: Rule("the grading did not end, on a healthy node, twice", True, Outcome.TESTS_TIMEOUT),
    Event.WORKER_LOST: Rule("a worker process died", False, Outcome.INFRA_ERROR, Outcome.AGENT_ERROR),
    Event.LAUNCHER_LOST: Rule("a worker's launcher died", False, Outcome.INFRA_ERROR, Outcome.AGENT_ERROR),
    Event.STORE_GONE: Rule("the store cannot give the image", False, Outcome.INFRA_ERROR),
    Event.LAYER_CORRUPT: Rule("a layer is corrupt at its source", False, Outcome.INFRA_ERROR),
    Event.NOT_SET_UP: Rule("no sandbox could be made", False, Outcome.INFRA_ERROR),
    Event.TASK_UNFIT: Rule("the task, its image or the configuration does not fit", False, Outcome.INFRA_ERROR),
    Event.NODE_LOST: Rule("a node is gone or does not answer", False, Outcome.INFRA_ERROR),
    Event.DISK_FULL: Rule("the machine's disk is full", False, Outcome.INFRA_ERROR),
    Event.OUT_OF_MEMORY: Rule("the machine's memory ran out", False, Outcome.INFRA_ERROR),
    Event.UNANSWERED: Rule("nobody answered the scaffold", False, Outcome.INFRA_ERROR),
    Event.OURS: Rule("anything else: a fault of our own code", False, Outcome.INFRA_ERROR),
}

# The first that fits; subclasses before their bases.
_EVENTS: tuple[tuple[type[BaseException], Event], ...] = (
    (WorkerLost, Event.WORKER_LOST),
    (OutOfMemory, Event.OUT_OF_MEMORY),
    (MemoryError, Event.OUT_OF_MEMORY),
    (NodeLost, Event.NODE_LOST),
    (CorruptLayer, Event.LAYER_CORRUPT),
    (StoreError, Event.STORE_GONE),
    (DiskFull, Event.DISK_FULL),
    (InputError, Event.TASK_UNFIT),
    (MachineError, Event.NOT_SET_UP),
    (SandboxError, Event.NOT_SET_UP),
    (PolicyError, Event.UNANSWERED),
)


def event_of(error: BaseException) -> Event:
    """The row of an exception, where nothing more is known of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Event.DISK_FULL
    return next((event for kind, event in _EVENTS if isinstance(error, kind)), Event.OURS)


def outcome_of(event: Event, before: str = "") -> Outcome:
    """What an event makes of a rollout of which nothing can be graded.

    before: the event that ended the same row's earlier try elsewhere, "" when this is the first.
    Raises `ValueError` for what is a command's result.
    """
    rule = TABLE[event]
    outcome = rule.again if rule.again is not None and needs_its_own_worker(before) else rule.outcome
    if outcome is None:
        raise ValueError(f"`{event}` is a command's result, and ends nothing")
    return outcome


def reward_of(outcome: Outcome) -> float | None:
    """The reward of what could not be graded: no number for ours, else 0."""
    return None if outcome is Outcome.INFRA_ERROR else 0.0


def needs_its_own_worker(before: str) -> bool:
    """Whether a row that comes again after this event must share no process, so that who is to blame can be told."""
    return any(before == event.value for event, rule in TABLE.items() if rule.again is not None)
