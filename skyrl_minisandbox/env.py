"""MiniSandboxEnv, the skyrl_gym Env registered as `minisandbox`. Thin: everything heavy is on a node.

SkyRL makes it on its event loop and calls `init`, `step` and `close` in a bounded pool of threads, without
any time limit of its own; an exception from one of them fails the whole training step. So the constructor
only reads the config, nothing after it raises, and every wait has a deadline.

With SkyRL's own generator a failed row cannot be masked out of the loss: its reward slot must hold a number
and gets 0.0. That is said once and counted (`infra_error_mean`); `metadata["record"]` keeps `reward: None`.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import skyrl_gym
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from skyrl_minisandbox import cluster as _cluster
from skyrl_minisandbox import placement as _placement
from skyrl_minisandbox.cluster import connect
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, TaskError, one_line
from skyrl_minisandbox.placement import Cluster
from skyrl_minisandbox.policies.policy import Message
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord, Seconds
from skyrl_minisandbox.rewards.fault import event_of, outcome_of, reward_of
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.turn import CANCELLATION, Finished, RolloutRequest, Turn

logger = logging.getLogger(__name__)

ENV_ID = "minisandbox"

_SPECIAL = re.compile(
    r"(?:\s*(?:<\|[A-Za-z_]+\|>|<\uff5cend\u2581of\u2581sentence\uff5c>|</s>|<eos>|<end_of_turn>|\[EOS\]))+\s*\Z"
)
"""Special tokens at the end of a text: SkyRL's client decodes with them (facts of skyrl 0.3 to 0.4)."""


class Episode:
    """What our generator and its Env know of each other: handed in as `extras["episode"]`.

    env: filled by the Env when it is made.
    deadline: on the monotonic clock; a `step` after it ends the episode with `ended_by=time`. None: no such bound.
    grade_on_close: `close` grades what is still open, with `ended_by=length`, instead of giving it up.
    """

    def __init__(self, *, deadline: float | None = None, grade_on_close: bool = False) -> None:
        self.env: MiniSandboxEnv | None = None
        self.deadline = deadline
        self.grade_on_close = grade_on_close


class MiniSandboxEnv(BaseTextEnv):  # type: ignore[misc]  # skyrl_gym has no type information
    """One rollout.

    env_config: an `EnvConfig`, or a DictConfig, dataclass or dict with its keys.
    extras: `task`, a Task as JSON text, dict or Task; or `task_id`, looked up in the config's tasks.
        `max_turns`: answers before the episode is ended and graded; SkyRL sets it. A retry of a row that was an
        `infra_error` has `node`, of its record: not on this node where there are others; and `before`, the
        `event` of its metadata: what our processes die of twice is scored (see rewards/fault.py).
        `episode`, an `Episode`, by our generator. `data_source` names the row's figures.

    Raises `InputError` here and nowhere later, for a config that cannot be.
    """

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = make_config(env_config)
        self.extras = dict(extras or {})
        self.episode: Episode | None = self.extras.pop("episode", None)
        if self.episode is not None:
            self.episode.env = self
        self.max_turns = int(self.extras.get("max_turns") or self.config.rollout.turns)
        self.task: Task | None = None
        self.rollout_id = ""
        self.finished: Finished | None = None
        self._cluster: Cluster | None = None
        self._closed = False

    # -- what SkyRL calls -------------------------------------------------------------------------

    def init(self, prompt: list[Message]) -> tuple[list[Message], dict[str, Any]]:
        """Open the rollout; the scaffold's first messages.

        Where the scaffold asks nothing (`gold`), or the rollout could not be opened, these are `prompt`,
        else the problem statement, and the first `step` ends the episode.
        """
        try:
            self.task = find_task(self.config, self.extras)
            self.rollout_id = f"{self.task.id}.{uuid.uuid4().hex[:12]}"
            self._cluster = shared_cluster(self.config)
            avoid = frozenset(filter(None, [self.extras.get("node")]))
            turn = self._cluster.open(self._request(self.task), avoid=avoid)
            if self._closed and turn.finished is None:  # given up meanwhile, by another thread
                self._cluster.close(self.rollout_id, grade=False)
                raise NodeError("the episode was closed while it was opened")
        except Exception as error:
            turn = self._failed(error)
        self.finished = turn.finished
        statement = self.task.problem_statement if self.task is not None else ""
        messages = turn.messages or list(prompt or []) or [{"role": "user", "content": statement}]
        return messages, self._metadata()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Hand the model's text over; the scaffold's next messages, or the end with its reward.

        `metadata` at the end: `record` (the line of results.jsonl), `patch`, `tests`, `log`, `report` (the whole
        TestReport as JSON, None when nothing was graded), `trajectory`, `event` (why nothing could be graded).
        """
        self.turns += 1
        deadline = self.episode.deadline if self.episode is not None else None
        if deadline is not None and time.monotonic() >= deadline and not self._closed:
            self._end(grade=True, ended_by=EndedBy.TIME)
        if self.finished is None:
            try:
                if self._cluster is None or self._closed:
                    raise MiniSandboxError("step was called on an episode that is not open")
                turn = self._cluster.step(self.rollout_id, strip_special_tokens(action))
            except Exception as error:
                turn = self._failed(error)
            self.finished = turn.finished
            if turn.finished is None:
                return BaseTextEnvStepOutput(
                    observations=turn.messages, reward=0.0, done=False, metadata=self._metadata()
                )
        return BaseTextEnvStepOutput(observations=[], reward=self._reward(), done=True, metadata=self._metadata())

    def close(self) -> None:
        """Give the episode up if it is not finished; or grade it, where its `Episode` says so. Idempotent."""
        grade = self.episode is not None and self.episode.grade_on_close and not self._closed
        self._closed = True  # first: an `init` under way looks at it once the rollout is open
        self._end(grade=grade)

    def get_metrics(self) -> dict[str, float]:
        """Figures of this episode. Their names end in how they go together; SkyRL sums any others."""
        if self.finished is None:
            return {}
        record = self.finished.record
        ours = record.outcome is Outcome.INFRA_ERROR
        metrics = {
            "infra_error_mean": float(ours),
            "turns_mean": float(record.turns),
            "history_divergence_mean": float(self.finished.history_divergence),
        }
        if not ours:  # a rollout that did not run says nothing about the model
            metrics["resolved_mean"] = float(record.outcome is Outcome.RESOLVED)
            metrics["tampered_mean"] = float(record.outcome is Outcome.TAMPERED)
            metrics["agent_error_mean"] = float(record.ended_by is EndedBy.ERROR)
            if source := self.extras.get("data_source"):
                metrics[f"{source}/resolved_mean"] = metrics["resolved_mean"]
        for stage, seconds in vars(record.seconds).items():
            metrics[f"{stage}_seconds_mean"] = seconds
            metrics[f"{stage}_seconds_max"] = seconds
        return metrics

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Means of `_mean`, greatest of `_max`, each over the episodes that have it."""
        together: dict[str, Any] = {}
        for name in sorted({name for episode in metrics for name in episode}):
            values = [episode[name] for episode in metrics if name in episode]
            together[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
        return together

    # -- for our own generator and command --------------------------------------------------------

    def finish(self, ended_by: EndedBy = EndedBy.LENGTH) -> Finished | None:
        """End now and grade: the context is full, say. None where nothing was open. Never raises."""
        if not self._closed:
            self._end(grade=True, ended_by=ended_by)
        return self.finished

    def longest(self, call: str, *, gradings: int = 1) -> float:
        """Seconds that `init`, `step` or `close` can take at the very most, every wait inside having its deadline.

        gradings: so many may come one after the other before this one has its turn.
        """
        bounds = self.config.rollout
        if call == "init":
            return bounds.setup + bounds.step + CANCELLATION + _cluster.NODE_START + 2 * _placement.MARGIN
        ending = (self._request(self.task).ending_seconds if self.task is not None else 0.0) + _placement.MARGIN
        step = bounds.step if call == "step" else 0.0
        return step + bounds.setup + (gradings + 1) * ending + _placement.MARGIN  # one of them once more, elsewhere

    # -- inside -----------------------------------------------------------------------------------

    def _request(self, task: Task) -> RolloutRequest:
        config = self.config
        return RolloutRequest(
            rollout_id=self.rollout_id,
            task=task,
            scaffold=config.scaffold,
            reward=config.reward,
            grading=config.grading,
            limits=config.sandbox.limits(),
            allow_degraded=tuple(config.sandbox.allow_degraded),
            on_disk=config.sandbox.upper == "disk",
            pool=config.sandbox.pool,
            bounds=config.rollout,
            max_turns=self.max_turns,
            before=str(self.extras.get("before") or ""),
        )

    def _end(self, *, grade: bool, ended_by: EndedBy = EndedBy.LENGTH) -> None:
        if self.finished is not None or self._cluster is None:
            return
        try:
            turn = self._cluster.close(self.rollout_id, grade=grade, ended_by=ended_by)
        except Exception as error:
            turn = self._failed(error)
        if turn is not None:
            self.finished = turn.finished

    def _failed(self, error: Exception) -> Turn:
        """A finished turn for what never ran properly: no number, unless the row does the same again."""
        if not isinstance(error, MiniSandboxError):
            logger.error("rollout %s: %r", self.rollout_id, error, exc_info=error)
        event = event_of(error)
        outcome = outcome_of(event, str(self.extras.get("before") or ""))
        record = RolloutRecord(
            rollout_id=self.rollout_id or f"unknown.{uuid.uuid4().hex[:12]}",
            task_id=self.task.id if self.task is not None else str(self.extras.get("task_id", "")),
            outcome=outcome,
            ended_by=EndedBy.ERROR,
            reward=reward_of(outcome),
            turns=self.turns,
            seconds=Seconds(),
            node=error.node if isinstance(error, NodeError) else "",
            error=one_line(error),
        )
        return Turn([], Finished(record, event=str(event)))

    def _reward(self) -> float:
        """The number for SkyRL's slot, which cannot be empty."""
        assert self.finished is not None
        record = self.finished.record
        if record.reward is not None:
            return record.reward
        if self.episode is None:
            _warn_unmasked(record)
        return 0.0

    def _metadata(self) -> dict[str, Any]:
        known: dict[str, Any] = {"rollout_id": self.rollout_id, "turns": self.turns}
        if self.finished is not None:
            known |= {name: value for name, value in vars(self.finished).items() if name != "record"}
            known["record"] = self.finished.record.to_json()
            known["infra_error"] = self.finished.record.outcome is Outcome.INFRA_ERROR
        return known


def strip_special_tokens(text: str) -> str:
    """The text without the special tokens at its end."""
    return _SPECIAL.sub("", text)


def register() -> None:
    """Make the Env known to skyrl_gym, in this process. Calling it again changes nothing."""
    if ENV_ID not in skyrl_gym.registry:
        skyrl_gym.register(id=ENV_ID, entry_point="skyrl_minisandbox.env:MiniSandboxEnv")


# -- shared by the envs of this process -----------------------------------------------------------

_lock = threading.Lock()  # guards the two below
_clusters: dict[str, Cluster] = {}
_unmasked = 0
_tasks_lock = threading.Lock()  # guards _tasks; a task may have to be made from downloads
_tasks: dict[tuple[str, str], Task] = {}


def shared_cluster(config: EnvConfig) -> Cluster:
    """The cluster of this process for this config, connected at the first call.

    Raises `MachineError` when Ray or a node does not start.
    """
    key = repr((config.cluster, config.images, config.out, config.training.grading))
    with _lock:
        if key not in _clusters:
            _clusters[key] = connect(config)
            atexit.register(shutdown)
        return _clusters[key]


def shutdown() -> None:
    """End every rollout of this process, its nodes, and Ray where it is ours. Idempotent."""
    with _lock:
        clusters = list(_clusters.values())
        _clusters.clear()
    for cluster in clusters:
        cluster.shutdown()


def unmasked() -> int:
    """How many failed rollouts got a 0.0 because their generator cannot mask them."""
    return _unmasked


def find_task(config: EnvConfig, extras: Mapping[str, Any]) -> Task:
    """The row's task. Raises `TaskError` that names what is wrong with it."""
    given = extras.get("task")
    if isinstance(given, Task):
        return given
    if given is not None:
        try:
            return Task.model_validate(json.loads(given) if isinstance(given, str | bytes) else given)
        except ValueError as error:
            raise TaskError(f"the row's `task` is no task: {error}", hint="minisandbox tasks export") from error
    task_id = extras.get("task_id")
    if not task_id:
        raise TaskError(
            f"a row needs `task` or `task_id`; it has: {', '.join(sorted(extras)) or 'nothing'}",
            hint="minisandbox tasks export writes such rows",
        )
    return _task_by_id(config, str(task_id))


def _task_by_id(config: EnvConfig, task_id: str) -> Task:
    from skyrl_minisandbox.images.sources import Sources
    from skyrl_minisandbox.tasks import load_tasks

    tasks = config.tasks
    key = (repr(tasks), task_id)
    with _tasks_lock:
        if key not in _tasks:
            found = load_tasks(
                tasks.name,
                ids=[task_id],
                path=tasks.path or None,
                repos=tasks.repos or None,
                sources=Sources(Path(config.images.cache) / "sources"),
                base=tasks.base,
                python=tasks.python or None,
                validation=tasks.validation or None,
            )
            _tasks[key] = found[0]
        return _tasks[key]


def _warn_unmasked(record: RolloutRecord) -> None:
    global _unmasked
    with _lock:
        _unmasked += 1
        first = _unmasked == 1
    if first:
        logger.warning(
            "rollout %s failed for a reason of ours (%s). This generator cannot mask it: its reward slot gets "
            "0.0. More of them are only counted, in `infra_error_mean`; our entry point masks them",
            record.rollout_id,
            record.error,
        )
