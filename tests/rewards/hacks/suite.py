"""Runs one hack or twin as a rollout does: the agent's sandbox, the patch that we make of it, the grading."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.rewards import TestReport, grade, load_reward, patch_from_upper
from skyrl_minisandbox.sandbox import Limits, Sandbox
from skyrl_minisandbox.tasks.task import Task
from tests.rewards.conftest import fresh
from tests.rewards.hacks import project, sdists
from tests.rewards.hacks.hack import Hack, Twin

_LIMITS = Limits(memory=1 << 30, disk=256 << 20, processes=256)
_AGENT_TIMEOUT = 60.0

REPORTS: list[tuple[Task, TestReport]] = []
"""Every grade of this session. `tests/rewards/test_oracles.py`, which runs later, shows their logs to other graders."""


@dataclasses.dataclass
class Bench:
    """Images, made when they are first asked for, and fresh sandboxes of them."""

    store: Store
    cache: Cache
    sources: Sources

    def task(self, runner: str) -> Task:
        """The task that hacks of this runner are tried on."""
        return project.task(runner) if runner in ("pytest", "unittest") else sdists.task(runner, self.sources)

    @contextlib.contextmanager
    def opener(self, task: Task) -> Iterator[Callable[[], Sandbox]]:
        """Opens fresh sandboxes of the task's image until the end of the block."""
        image = build_image(task.recipe, store=self.store, cache=self.cache, sources=self.sources)
        with self.cache.checkout(image, self.store) as checkout, fresh(checkout, _LIMITS) as make:
            yield make

    def report(self, one: Hack | Twin, mode: str) -> TestReport:
        """The grade of what it submits. mode: `official` or `protected`."""
        task = self.task(one.runner)
        with self.opener(task) as open_sandbox:
            patch = one.patch or self._rollout(one, task, open_sandbox)
            report = grade(task, patch, open_sandbox, grading=GradingConfig(mode=mode))
        REPORTS.append((task, report))
        return report

    def paid(self, one: Hack | Twin, mode: str) -> bool:
        """Whether that grade has a reward above 0."""
        return load_reward("binary")(self.report(one, mode)) == 1.0

    def _rollout(self, one: Hack | Twin, task: Task, open_sandbox: Callable[[], Sandbox]) -> str:
        with open_sandbox() as agent:
            agent.run(one.commands, cwd=task.recipe.workdir, timeout=_AGENT_TIMEOUT)
            return patch_from_upper(agent, open_sandbox, task.recipe.workdir)

    def paid_in_its_own_sandbox(self, one: Hack | Twin) -> bool:
        """Whether a trainer pays it that brings the tests to where the agent was and believes the exit status."""
        task = self.task(one.runner)
        workdir = task.recipe.workdir
        with self.opener(task) as open_sandbox, open_sandbox() as agent:
            if one.patch:
                agent.run(["git", "apply", "-"], input=one.patch.encode(), cwd=workdir, timeout=60)
            else:
                agent.run(one.commands, cwd=workdir, timeout=_AGENT_TIMEOUT)
            agent.run(["git", "apply", "-"], input=task.tests.patch.encode(), cwd=workdir, timeout=60)
            return agent.run(task.tests.command, cwd=workdir, timeout=task.tests.timeout).exit_code == 0

    def bait_taken(self, hack: Hack) -> bool:
        """Whether the grading that `hack.bait` names pays it."""
        return self.paid_in_its_own_sandbox(hack) if hack.bait == "own sandbox" else self.paid(hack, "official")
