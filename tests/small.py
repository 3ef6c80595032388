"""The smallest real task: a shell script to mend on base `host`, built in a second and without a network.

For what is about rollouts, nodes and the Env rather than about tasks; nothing in it is a stand-in.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from pathlib import Path
from typing import Any

from skyrl_minisandbox.config import EnvConfig, ScaffoldConfig, make_config
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task, Tests
from skyrl_minisandbox.turn import RolloutRequest, Turn

_GIT = "git -c user.name=test -c user.email=test@example.invalid"

RECIPE = Recipe(
    base="host",
    workdir="/srv",  # in the base already; without a repository there is no /testbed
    commands=(
        "printf 'echo wrong\\n' > answer.sh && printf 'kept\\n' > other.txt && git init -q . "
        f"&& git add -A && {_GIT} commit -q -m base",
    ),
)

SOLVE = "echo 'echo right' > answer.sh"

GOLD = """\
diff --git a/answer.sh b/answer.sh
--- a/answer.sh
+++ b/answer.sh
@@ -1 +1 @@
-echo wrong
+echo right
"""

_CHECK = """\
diff --git a/check.sh b/check.sh
new file mode 100644
--- /dev/null
+++ b/check.sh
@@ -0,0 +1,3 @@
+echo "=== short test summary info ==="
+[ "$(sh answer.sh)" = right ] && echo "PASSED check.sh::answer" || echo "FAILED check.sh::answer"
+[ "$(cat other.txt)" = kept ] && echo "PASSED check.sh::other" || echo "FAILED check.sh::other"
"""


def small_task(task_id: str = "small-1", *, timeout: float = 30.0) -> Task:
    """Tasks of all ids share one image."""
    return Task(
        id=task_id,
        problem_statement="`sh answer.sh` prints `wrong`; it should print `right`.",
        recipe=RECIPE,
        tests=Tests(
            patch=_CHECK,
            files=("check.sh",),
            command="bash check.sh",
            runner="command",
            fail_to_pass=("check.sh::answer",),
            pass_to_pass=("check.sh::other",),
            timeout=timeout,
        ),
        gold_patch=GOLD,
    )


def build_small_image(store: Path, cache: Path) -> None:
    """Have the image of every small task."""
    from skyrl_minisandbox.images import Cache, Store, build_image

    build_image(RECIPE, store=Store(store), cache=Cache(cache), pythons=(), progress=None)


def cluster_config(store: Path, cache: Path, out: Path) -> EnvConfig:
    """For a cluster of nodes with two slots and one worker process each, over the small image, which is made."""
    build_small_image(store, cache)
    return make_config(
        {
            "images": {"store": str(store), "cache": str(cache)},
            "scaffold": "tests.small.Loop",
            "cluster": {"slots": 2, "workers": 1},
            "out": str(out),
        }
    )


def play(cluster: Any, *texts: str) -> Any:
    """How a rollout with these answers finished."""
    asked = request(small_task())
    turn = cluster.open(asked)
    for text in texts:
        turn = cluster.step(asked.rollout_id, text)
    return turn.finished


class Loop(Scaffold):
    """The plainest scaffold: each answer is a command, and `submit` ends it. `tests.small.Loop` in a config.

    command_timeout: seconds. fail: raise at this query (1 is the first). deaf: ignore the end for so long.
    """

    def __init__(self, *, command_timeout: float = 20.0, fail: int = 0, deaf: float = 0.0) -> None:
        self.command_timeout = command_timeout
        self.fail = fail
        self.deaf = deaf

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        messages = [
            {"role": "system", "content": "Answer with a shell command."},
            {"role": "user", "content": task.problem_statement},
        ]
        try:
            return self._loop(messages, sandbox, policy)
        finally:
            time.sleep(self.deaf)

    def _loop(self, messages: list[dict[str, str]], sandbox: Sandbox, policy: Policy) -> Submission:
        turn = 0
        while True:
            turn += 1
            if turn == self.fail:
                raise ValueError("a fault of the scaffold")
            text = policy.query(messages)
            messages.append({"role": "assistant", "content": text})
            if text.strip() == "submit":
                return Submission(patch=None, trajectory=messages)
            result = sandbox.run(text, timeout=self.command_timeout)
            messages.append({"role": "user", "content": f"exit code {result.exit_code}\n{result.output}"})


class AtOnce(Rollout):
    """A rollout as a `Cluster` drives it where no other is being graded: what it leaves is judged at once."""

    def step(self, text: str) -> Turn:
        turn = super().step(text)
        return self.judge() if turn.ungraded else turn

    def close(self, *, grade: bool, ended_by: EndedBy = EndedBy.LENGTH) -> Turn | None:
        turn = super().close(grade=grade, ended_by=ended_by)
        return self.judge() if turn is not None and turn.ungraded else turn


class Rewriting(Loop):
    history_only_grows = False


class Networked(Loop):
    needs_network = True


def request(task: Task, **changes: Any) -> Any:
    """A `RolloutRequest` for the loop."""
    scaffold = ScaffoldConfig(name="tests.small.Loop", options=changes.pop("options", {}))
    plain = RolloutRequest(rollout_id=f"{task.id}.{uuid.uuid4().hex[:8]}", task=task, scaffold=scaffold)
    return dataclasses.replace(plain, **changes)
