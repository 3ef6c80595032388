"""Peers: a bare Ray actor, and what containers take for the same rollout."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from benches.contender import Absent
from skyrl_minisandbox.tasks.task import Task

SWE_REX = "SWE-ReX"
EARLIER = {
    # Measured for this project on a 2-core VM with kernel 6.18: a command in a session, the start of one.
    f"{SWE_REX} (measured earlier)": (0.121, 0.40),
    # SWE-MiniSandbox: a command in its session as measured here; its publication's mean preparation of an environment.
    "reference (published, measured earlier)": (0.140, 23.62),
}
"""name -> seconds of an action, of a rollout."""

PREPARATION = {"reference (published)": 23.62, "its Docker (published)": 88.86}
"""Seconds: mean preparation of an environment, SWE-MiniSandbox's 3B experiment."""


class Bare:
    """The least that can answer: an actor's method that does nothing."""

    def nothing(self) -> None:
        return None


class BareShells:
    """Shells in sandboxes in the actor's own process, and nothing between them and the call."""

    def __init__(self, store: str, cache: str, task: Task) -> None:
        from skyrl_minisandbox.images import Cache, Store

        self._checkout = Cache(Path(cache)).checkout(Store(Path(store)).find(task.recipe.digest()), Store(Path(store)))
        self._shells: list[tuple[Any, Any]] = []

    def open(self, count: int) -> None:
        from skyrl_minisandbox.sandbox import Sandbox

        for _ in range(count):
            sandbox = Sandbox(self._checkout.sandbox_spec())
            self._shells.append((sandbox, sandbox.shell()))

    def run(self, number: int, command: str) -> int:
        code: int = self._shells[number][1].run(command).exit_code
        return code

    def close(self) -> None:
        from skyrl_minisandbox.sandbox import shutdown_launcher

        shutdown_launcher()


def swe_rex(actions: int) -> tuple[float, float]:
    """Seconds of `true` in a session of the installed SWE-ReX, and of the start of one. Raises `Absent`."""
    if importlib.util.find_spec("swerex") is None:
        raise Absent("not installed; figures measured earlier stand in its place")
    import asyncio

    from swerex.runtime.abstract import BashAction, CloseBashSessionRequest, CreateBashSessionRequest
    from swerex.runtime.local import LocalRuntime

    async def measured() -> tuple[float, float]:
        runtime = LocalRuntime()
        started = time.perf_counter()
        await runtime.create_session(CreateBashSessionRequest())
        begun = time.perf_counter()
        for _ in range(actions):
            await runtime.run_in_session(BashAction(command="true", check="silent"))
        done = time.perf_counter()
        await runtime.close_session(CloseBashSessionRequest())
        await runtime.close()
        return (done - begun) / actions, begun - started

    return asyncio.run(measured())
