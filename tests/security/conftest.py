"""A yard for hostile code: a launcher of its own, a second sandbox as witness, and a look at what is left.

Every row also asks: the second sandbox still answers, this one closes, and nothing of it is left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from skyrl_minisandbox.sandbox import CommandResult, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests.security import traps
from tests.security.inside.common import VARIABLE
from tests.security.suite import USER, make_layer, make_spec
from tests.support import require, seconds

Result = TypeVar("Result")


def within(limit: float, attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives, or a failed test when there is no answer in time: that is what a hang is."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(attempt())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds(limit))
    except concurrent.futures.TimeoutError:
        if future.done():
            raise
        raise AssertionError(f"no answer within {seconds(limit):.0f} s") from None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


class Yard:
    """Makes sandboxes with one launcher, and says afterwards what of them is left."""

    def __init__(self, spec: SandboxSpec, launcher: LauncherClient, facts: dict[str, Any]) -> None:
        self.spec, self.launcher = spec, launcher
        token = facts["token"]
        self.facts = {**facts, "token": "", "halves": [token[:10], token[10:]]}
        self.witness = Sandbox(spec, launcher)
        self._before = self.settled()
        self._made: list[Sandbox] = []
        self._pids: set[int] = set()

    def open(self, **changes: Any) -> Sandbox:
        """A sandbox; `changes` are fields of its spec."""
        sandbox = Sandbox(dataclasses.replace(self.spec, **changes), self.launcher)
        self._made.append(sandbox)
        self._pids.add(sandbox.pid)
        return sandbox

    def rows(self, sandbox: Sandbox, *names: str, user: str | None = None, **more: Any) -> dict[str, tuple[str, str]]:
        """Run rows of inside/hostile.py: row -> (verdict, detail). `more` are further facts."""
        done = self.python(sandbox, "inside.hostile", *names, user=user, facts=more)
        found = {}
        for line in done.output.splitlines():
            name, verdict, detail = json.loads(line)
            found[name] = (verdict, detail)
        assert list(found) == list(names), done.output
        return found

    def python(
        self, sandbox: Sandbox, *argv: str, user: str | None = None, facts: dict[str, Any] | None = None,
        timeout: float = 60,
    ) -> CommandResult:
        """`python3 -m …` inside."""
        env = {"PYTHONPATH": "/opt/probes", VARIABLE: json.dumps({**self.facts, **(facts or {})})}
        return sandbox.run(["python3", "-B", "-m", *argv], user=user, env=env, cwd="/tmp", timeout=seconds(timeout))

    def check(self) -> None:
        """The witness answers, every sandbox closes, and nothing of them is left."""
        answer = within(30, lambda: self.witness.run("echo on", timeout=seconds(20)))
        assert answer.output == "on\n", answer
        for sandbox in self._made:
            with contextlib.suppress(Exception):
                self._pids.add(sandbox.pid)
            within(60, sandbox.close)
        self._made.clear()
        gc.collect()
        deadline = time.monotonic() + seconds(10)
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, left
        assert within(30, lambda: self._fresh()) == "on\n"

    def _fresh(self) -> str:
        with Sandbox(self.spec, self.launcher) as sandbox:
            return sandbox.run("echo on", timeout=seconds(20)).output

    def settled(self) -> dict[str, int]:
        """What is held once the launcher has made what it makes ahead: the same for a quarter of a second."""
        deadline = time.monotonic() + seconds(5)
        held, since = self._held(), time.monotonic()
        while time.monotonic() < min(since + 0.25, deadline):
            time.sleep(0.05)
            now = self._held()
            if now != held:
                held, since = now, time.monotonic()
        return held

    def _left(self) -> str:
        pids = [pid for pid in self._pids if alive(pid)]
        held = self._held()
        if pids:
            return f"these inits are alive: {pids}"
        return "" if held == self._before else f"held before {self._before}, now {held}"

    def _held(self) -> dict[str, int]:
        """Descriptors, mounts, children and cgroups of the launcher, as far as we may look; directories on disk."""
        found = {}
        proc = Path(f"/proc/{self.launcher.pid}")
        with contextlib.suppress(OSError):
            found["descriptors"] = len(os.listdir(proc / "fd"))
        with contextlib.suppress(OSError):
            # A layer that was used once stays mounted in the launcher.
            lines = (proc / "mountinfo").read_text().splitlines()
            found["mounts"] = sum(not line.split()[4].startswith("/l/") for line in lines)
        with contextlib.suppress(OSError):
            found["children"] = len((proc / f"task/{self.launcher.pid}/children").read_text().split())
        if os.geteuid() == 0:
            name = f"minisandbox-{self.launcher.pid}-"
            found["cgroups"] = sum(f"/{name}" in top for top, _, _ in os.walk("/sys/fs/cgroup"))
        if self.spec.scratch is not None and self.spec.scratch.is_dir():
            found["uppers"] = len(list(self.spec.scratch.iterdir()))
        return found


@pytest.fixture(scope="module")
def planted() -> Iterator[traps.Traps]:
    with traps.Traps() as made:
        yield made


@pytest.fixture(scope="module")
def probe_spec(tmp_path_factory: pytest.TempPathFactory) -> SandboxSpec:
    require("userns", "overlay")
    top = tmp_path_factory.mktemp("probes")
    return make_spec(make_layer(top / "layer"), top / "scratch")


@pytest.fixture(scope="module")
def probe_launcher(planted: traps.Traps) -> Iterator[LauncherClient]:
    """Started with a token in the environment of whoever starts it."""
    require("userns", "overlay")
    os.environ["MINISANDBOX_PROBE_TOKEN"] = planted.facts["token"]
    try:
        launcher = LauncherClient()
        yield launcher
        launcher.close()
    finally:
        del os.environ["MINISANDBOX_PROBE_TOKEN"]


@pytest.fixture(scope="module")
def whole_yard(probe_spec: SandboxSpec, probe_launcher: LauncherClient, planted: traps.Traps) -> Iterator[Yard]:
    made = Yard(probe_spec, probe_launcher, planted.facts)
    yield made
    made.witness.close()


@pytest.fixture
def yard(whole_yard: Yard) -> Iterator[Yard]:
    yield whole_yard
    whole_yard.check()


@pytest.fixture(params=["root-inside", "user-inside"])
def who(request: pytest.FixtureRequest, probe_launcher: LauncherClient) -> str | None:
    """As whom the hostile code runs: None for root, "1000" for a user without capabilities."""
    if request.param == "root-inside":
        return None
    if probe_launcher.facts["single_id"]:
        pytest.skip("a single id is mapped: there is no user inside")
    return USER
