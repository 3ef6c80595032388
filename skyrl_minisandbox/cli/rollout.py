"""`minisandbox rollout`: the driver. It calls the Env in exactly the order of SkyRL's generator.

    make(env_class, env_config, extras) → init(prompt) → step(text) … → get_metrics() → close()

The policy answers here, between two steps, as the trainer's model does in training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import Progress, print_table, seconds, stage
from skyrl_minisandbox.cli.run_directory import RunDirectory, check_unused
from skyrl_minisandbox.cli.settings import Settings, load_settings, run_directory
from skyrl_minisandbox.cli.workbench import Workbench, in_threads
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import MiniSandboxError, PolicyError
from skyrl_minisandbox.images import Cache
from skyrl_minisandbox.policies import Policy, load_policy
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord, Seconds
from skyrl_minisandbox.rewards import load_reward
from skyrl_minisandbox.scaffolds import load_scaffold
from skyrl_minisandbox.tasks import Task


def run(request: Request) -> int:
    """Build what is missing, run every task once, print the table; 1 when some rollout was an `infra_error`.

    An unresolved task is a result like any other and no error.
    """
    settings = load_settings(request.overrides)
    out = run_directory(settings.env.out)
    check_unused(out)
    scaffold = load_scaffold(settings.env.scaffold.name, **settings.env.scaffold.options)
    load_reward(settings.env.reward.name, **settings.env.reward.options)
    bench = Workbench(settings)
    tasks = bench.tasks()
    if not scaffold.privileged and settings.env.scaffold.name != "empty":
        for task in tasks:
            make_policy(settings, task)
    check_machine(settings.env)
    bench.images(tasks)
    directory = RunDirectory(out, settings.tree)
    try:
        env = dataclasses.replace(settings.env, out=str(out))
        records = drive(settings, env, tasks, directory)
    finally:
        directory.close()
        if sys.exc_info()[0] is not None:
            with contextlib.suppress(MiniSandboxError):  # the first error is the one to tell
                Cache(settings.env.images.cache)  # sweeps what a worker left that was ended while it unpacked
            if out.exists():
                print(f"what had ended by then: {out}", file=sys.stderr)
    print_records(records)
    print(f"run directory: {out}")
    return 1 if any(record.outcome is Outcome.INFRA_ERROR for record in records) else 0


def check_machine(env: EnvConfig) -> None:
    """Raises `MachineError` when this machine is to run rollouts and can make no sandbox.

    With a Ray that is joined the nodes run them, and this may be a head node that cannot.
    """
    if env.cluster.kind == "ray" and (env.cluster.address or os.environ.get("RAY_ADDRESS")):
        return
    from skyrl_minisandbox.sandbox.client import shared

    shared()


def make_policy(settings: Settings, task: Task) -> Policy:
    """The policy of one conversation."""
    options = {key: value for key, value in settings.policy.items() if key != "name"}
    if settings.policy["name"] == "openai":
        options["seed"] = settings.seed
    return load_policy(settings.policy["name"], task_id=task.id, **options)


def drive(settings: Settings, env: EnvConfig, tasks: Sequence[Task], directory: RunDirectory) -> list[RolloutRecord]:
    """Run the rollouts, as many at once as there are slots; their records in the order of the tasks.

    Raises `PolicyError` when the policy never gave a single text; whatever is raised, nothing stays open.
    """
    import skyrl_minisandbox
    from skyrl_minisandbox.env import shared_cluster, shutdown

    skyrl_minisandbox.register()
    records: dict[str, RolloutRecord] = {}
    lock = threading.Lock()  # guards `records`
    driver = Driver(settings, env, directory)
    try:
        where = "Ray" if env.cluster.kind == "ray" else "the workers"
        with stage(f"starting {where}"):
            cluster = shared_cluster(env)
        with Progress("rollouts", len(tasks)) as progress:

            def one(task: Task) -> None:
                record = driver.rollout(task, functools.partial(progress.say, task.id))
                if driver.stopping:
                    return  # ended by us: nothing to tell
                with lock:
                    records[task.id] = record
                reward = "no reward" if record.reward is None else f"reward {record.reward:g}"
                progress.done(task.id, f"{record.outcome}, {reward}" + (f": {record.error}" if record.error else ""))

            jobs = [functools.partial(one, task) for task in tasks]
            in_threads(jobs, settings.parallel or cluster.slots, on_error=driver.stop)
    finally:
        driver.stopping = True
        shutdown()
    return [records[task.id] for task in tasks]


class Driver:
    """What the rollouts of one command share."""

    def __init__(self, settings: Settings, env: EnvConfig, directory: RunDirectory) -> None:
        self.settings = settings
        self.env = env
        self.directory = directory
        self.stopping = False
        self.answered = False  # the policy has given a text at least once

    def stop(self) -> None:
        """End what runs: those who wait for it get an error at once, and write nothing."""
        from skyrl_minisandbox.env import shutdown

        self.stopping = True
        shutdown()

    def rollout(self, task: Task, say: Callable[[str], None]) -> RolloutRecord:
        """One episode, from make to close; its line is written before this returns."""
        import skyrl_gym

        say("opening")
        extras = {"task": task.model_dump_json(), "max_turns": self.env.rollout.turns}
        env = skyrl_gym.make("minisandbox", env_config=self.env, extras=extras)
        try:
            prompt = [{"role": "user", "content": task.problem_statement}]
            messages, metadata = env.init(prompt)
            # A scaffold that asks nothing leaves us the prompt itself; then any text ends the episode.
            asked = bool(messages) and messages[0] is not prompt[0]
            policy = make_policy(self.settings, task) if asked else None
            conversation = list(messages)
            done = False
            while not done:
                say(f"turn {env.turns + 1}" if asked else "grading")
                text = self._answer(policy, conversation)
                output = env.step(text)
                conversation += [{"role": "assistant", "content": text}, *output["observations"]]
                metadata, done = output["metadata"], output["done"]
            metrics = env.get_metrics()
            record = RolloutRecord.from_json(metadata["record"])
        except PolicyError as error:
            if not self.answered:
                raise
            record, metrics, metadata = _unanswered(task, env, error), {}, {}
        finally:
            env.close()
        if not self.stopping:
            self.directory.add(record, self._model(), metadata, metrics)
        return record

    def _answer(self, policy: Policy | None, conversation: list[dict[str, str]]) -> str:
        if policy is None:
            return ""
        text = policy.query(conversation)
        self.answered = True
        return text

    def _model(self) -> str:
        """`model_name_or_path` of the predictions: who made the patch."""
        scaffold, policy = self.env.scaffold.name, self.settings.policy
        if scaffold in ("gold", "empty", "wrong"):
            return scaffold
        return f"{scaffold}/{policy.get('model') or policy['name']}"


def _unanswered(task: Task, env: Any, error: PolicyError) -> RolloutRecord:
    """The policy gave up in the middle: no fault of what was rolled out, so no number."""
    return RolloutRecord(
        rollout_id=env.rollout_id,
        task_id=task.id,
        outcome=Outcome.INFRA_ERROR,
        ended_by=EndedBy.ERROR,
        reward=None,
        turns=env.turns,
        seconds=Seconds(),
        node="",
        error=error.message,
    )


def print_records(records: Sequence[RolloutRecord]) -> None:
    """The table of a run and the mean over what has a reward."""
    rows = [
        [
            record.task_id,
            str(record.outcome),
            "-" if record.reward is None else f"{record.reward:g}",
            str(record.turns),
            seconds(record.seconds.checkout),
            seconds(record.seconds.create),
            seconds(record.seconds.agent),
            seconds(record.seconds.grade),
        ]
        for record in records
    ]
    headers = ["task", "outcome", "reward", "turns", "checkout s", "create s", "agent s", "grade s"]
    print_table(headers, rows, right=range(2, 8))
    numbers = [record.reward for record in records if record.reward is not None]
    mean = f"{sum(numbers) / len(numbers):.3f}" if numbers else "-"
    print(f"\nmean reward {mean} over {len(numbers)} of {len(records)} rollouts")
    for record in records:
        if record.outcome is Outcome.INFRA_ERROR:
            print(f"{record.task_id}: {record.error}")
