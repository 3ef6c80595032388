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
from skyrl_minisandbox.tasks.task import PublicTask, Task, Tests

TASKS = 16
SUBMIT = "submit"
_GIT = "git -c user.name=bench -c user.email=bench@example.invalid"
_PATCH = """\
diff --git a/answer.sh b/answer.sh
--- a/answer.sh
+++ b/answer.sh
@@ -1 +1 @@
-echo {0}
+echo right
"""
_CHECK = """\
diff --git a/check.sh b/check.sh
new file mode 100644
--- /dev/null
+++ b/check.sh
@@ -0,0 +1,2 @@
+echo "=== short test summary info ==="
+[ "$(sh answer.sh)" = right ] && echo "PASSED check.sh::answer" || echo "FAILED check.sh::answer"
"""


def make_tasks(store: Path, cache: Path, count: int = TASKS) -> list[Task]:
    """Tasks whose images differ in their last layer; built and checked out here, so that all that follows is warm."""
    from skyrl_minisandbox.images.recipe import Recipe

    made = []
    images, local = Store(store), Cache(cache)
    for number in range(count):
        recipe = Recipe(
            base="host",
            workdir="/srv",
            commands=(
                f"echo 'echo {number}' > answer.sh && git init -q . && git add -A && {_GIT} commit -q -m base",
            ),
        )
        image = build_image(recipe, store=images, cache=local, pythons=(), progress=None)
        local.checkout(image, images).release()
        tests = Tests(
            patch=_CHECK,
            files=("check.sh",),
            command="bash check.sh",
            runner="command",
            fail_to_pass=("check.sh::answer",),
            pass_to_pass=(),
            timeout=30.0,
        )
        made.append(
            Task(
                id=f"bench-{number}",
                problem_statement=f"`sh answer.sh` prints `{number}`; it should print `right`.",
                recipe=recipe,
                tests=tests,
                gold_patch=_PATCH.format(number),
            )
        )
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
                return Submission(patch=_PATCH.format(task.id.removeprefix("bench-")))
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
