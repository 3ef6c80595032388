"""What is rolled out: sixteen tasks with an image each, and scaffolds that do as little as can be done."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import skyrl_gym

import skyrl_minisandbox
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task
from tests.small import GOLD, RECIPE, small_task

TASKS = 16
SUBMIT = "submit"


def make_tasks(store: Path, cache: Path, count: int = TASKS) -> list[Task]:
    """The tests' small task with an image of its own each; built and checked out here, so that all that follows is
    warm."""
    made = []
    images, local = Store(store), Cache(cache)
    for number in range(count):
        commands = (*RECIPE.commands, f"echo {number} > /srv/.git/number")  # a last layer that no other has
        recipe = RECIPE.model_copy(update={"commands": commands})
        image = build_image(recipe, store=images, cache=local, pythons=(), progress=None)
        local.checkout(image, images).release()
        made.append(small_task(f"bench-{number}").model_copy(update={"recipe": recipe}))
    return made


class Still(Scaffold):
    """Asks again whatever it is told, and does nothing: what remains is the way there and back.

    Each question is only a word, so that no history grows; it submits the solution.
    """

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        assert isinstance(task, PublicTask)
        messages = [{"role": "user", "content": task.problem_statement}]
        while True:
            text = policy.query(messages)
            messages += [{"role": "assistant", "content": text}]
            if text == SUBMIT:
                return Submission(patch=GOLD)
            messages += [{"role": "user", "content": self.observe(text, sandbox)}]

    def observe(self, text: str, sandbox: Sandbox) -> str:
        return "0"


class Shell(Still):
    """Runs each answer in the sandbox's shell and says how many seconds that took, as seen here."""

    _shell: Any = None

    def observe(self, text: str, sandbox: Sandbox) -> str:
        if self._shell is None:
            self._shell = sandbox.shell()
        started = time.perf_counter()
        result = self._shell.run(text)
        seconds = time.perf_counter() - started
        if result.exit_code != 0:
            raise RuntimeError(f"{text!r}: {result.output[:200]}")
        return repr(seconds)


@dataclasses.dataclass
class Episode:
    """One rollout as a trainer has it: an Env, made and driven as SkyRL does."""

    env: Any
    opened: float  # seconds of `init`

    @classmethod
    def open(cls, config: Any, task: Task) -> Episode:
        skyrl_minisandbox.register()
        env = skyrl_gym.make("minisandbox", env_config=config, extras={"task": task, "max_turns": 1_000_000})
        started = time.perf_counter()
        _, told = env.init([{"role": "user", "content": ""}])
        if "record" in told:
            raise RuntimeError(f"a rollout did not open: {told['record']['error']}")
        return cls(env, time.perf_counter() - started)

    def step(self, text: str) -> tuple[float, float]:
        """(seconds of `env.step`, of the command in it as its scaffold saw it)."""
        started = time.perf_counter()
        output = self.env.step(text)
        seconds = time.perf_counter() - started
        if output["done"]:
            raise RuntimeError(f"a rollout ended: {output['metadata']['record']['error']}")
        return seconds, float(output["observations"][0]["content"])

    def end(self) -> float:
        """Seconds of the last `step`, which takes the patch and grades it, and of `close`."""
        started = time.perf_counter()
        output = self.env.step(SUBMIT)
        self.env.close()
        seconds = time.perf_counter() - started
        record = output["metadata"]["record"]
        if record["reward"] != 1.0:
            raise RuntimeError(f"a rollout was to be solved, and is {record['outcome']}: {record['error']}")
        return seconds


def config_of(work: Path, **changes: Any) -> dict[str, Any]:
    """Our config over the store of `make_tasks`; every rollout runs and is set up at once."""
    return {
        "images": {"store": str(work / "store"), "cache": str(work / "cache")},
        "cluster": {"slots": 128},
        "training": {"running": 128, "starting": 128, "grading": 2 * len(os.sched_getaffinity(0))},
        **changes,
    }
