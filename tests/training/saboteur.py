"""What breaks one thing at one place when a text asks for it: `break PLACE FAULT FLAG`.

Where the thing is: `Env` and policy in the trainer's process, the actor in its own, worker process and launcher from
within the worker (a scaffold is code of the user's that runs there), the store by whoever has its directory.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from skyrl_minisandbox.channel import Callee
from skyrl_minisandbox.env import MiniSandboxEnv
from skyrl_minisandbox.node import NodeActor, NodeSetup
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task
from tests.small import Loop

SLOW = 1.0
"""Seconds."""

FORGOTTEN = 120.0
"""Seconds after which what hangs lets go of its thread, so that a process of tests can end."""

VICTIM = "victim"
"""Id of the task whose rollout breaks things."""

NONSENSE = "this is not what was asked for"


@dataclasses.dataclass(frozen=True)
class Break:
    """flag: a path; its fault strikes once, by making it. "": it strikes each time."""

    place: str
    fault: str
    flag: str = ""

    def __str__(self) -> str:
        return f"break {self.place} {self.fault} {self.flag}".strip()

    @classmethod
    def parse(cls, text: str) -> Break | None:
        words = text.strip().split(" ")
        return cls(*words[1:4]) if words[0] == "break" else None

    def strikes(self, place: str) -> bool:
        """Whether it is this place's turn."""
        if self.place != place:
            return False
        if not self.flag:
            return True
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True


# -- Env ------------------------------------------------------------------------------------------

released = threading.Event()
"""Set when a cell is over: what hangs in a thread of this process may go on."""


class SabotagedEnv(MiniSandboxEnv):
    """`extras["sabotage"]`: method, fault, flag.

    before_init, after_init: called with each Env, in the thread of its `init`. struck: called when something breaks.
    """

    made: list[SabotagedEnv] = []
    before_init: Callable[[SabotagedEnv], None]
    after_init: Callable[[SabotagedEnv], None]
    struck: Callable[[], None]

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        sabotage = dict((extras or {}).get("sabotage") or {})
        self._sabotage = (sabotage.get("method"), Break("env", sabotage.get("fault", ""), sabotage.get("flag", "")))
        self.closes = 0
        self._strike("__init__")
        super().__init__(env_config, extras)
        SabotagedEnv.made.append(self)

    def init(self, prompt: Any) -> Any:
        SabotagedEnv.before_init(self)
        found = self._strike("init") or super().init(prompt)
        SabotagedEnv.after_init(self)
        return found

    def step(self, action: str) -> Any:
        return self._strike("step") or super().step(action)

    def close(self) -> None:
        self.closes += 1
        self._strike("close")
        super().close()

    def get_metrics(self) -> Any:
        return self._strike("get_metrics") or super().get_metrics()

    def _strike(self, method: str) -> Any:
        wanted, breaks = self._sabotage
        if method != wanted or not breaks.strikes("env"):
            return None
        SabotagedEnv.struck()
        if breaks.fault == "raises":
            raise RuntimeError("a fault of the Env")
        if breaks.fault == "hangs":
            released.wait(FORGOTTEN)
        if breaks.fault == "slow":
            time.sleep(SLOW)
        return NONSENSE if breaks.fault == "wrong-type" else None


# -- Node actor -----------------------------------------------------------------------------------


class SabotagedActor(NodeActor):
    def __init__(self, setup: NodeSetup) -> None:
        super().__init__(setup)
        node = self._node
        self._callee = Callee(node.open, node.grade, self.step, node.judge, node.close)

    def step(self, rollout_id: str, text: str) -> Future[Any]:
        breaks = Break.parse(text)
        if breaks is not None and breaks.strikes("actor"):
            if breaks.fault == "raises":
                raise RuntimeError("a fault of the actor")
            if breaks.fault == "hangs":
                return Future()
            if breaks.fault == "dies":
                os._exit(1)
            if breaks.fault == "slow":
                time.sleep(SLOW)
            if breaks.fault == "wrong-type":
                wrong: Future[Any] = Future()
                wrong.set_result(NONSENSE)
                return wrong
        return self._node.step(rollout_id, text)


# -- worker process and launcher ------------------------------------------------------------------


class Saboteur(Loop):
    """The loop; what is to break where it runs breaks before the command, which is then `true`."""

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        return super().run(task, sandbox, _Listening(policy))


class _Listening(Policy):
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def query(self, messages: Any) -> str:
        text = self._policy.query(messages)
        breaks = Break.parse(text)
        if breaks is None:
            return text
        if breaks.strikes("worker"):
            _break_worker(breaks.fault)
        elif breaks.strikes("launcher"):
            _break_launcher(breaks.fault)
        return "true"


def _break_worker(fault: str) -> None:
    from skyrl_minisandbox.rollout import Rollout

    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "slow":
        time.sleep(SLOW)
    if fault in ("raises", "wrong-type"):
        real = Rollout.step

        def step(rollout: Any, text: str) -> Any:
            if rollout.request.task.id != VICTIM:
                return real(rollout, text)
            Rollout.step = real  # type: ignore[method-assign]
            if fault == "raises":
                raise RuntimeError("a fault of the worker")
            return NONSENSE

        Rollout.step = step  # type: ignore[assignment,method-assign]
        Rollout.begin = lambda *_: False  # type: ignore[assignment,method-assign]  # in favour of the former


def _break_launcher(fault: str) -> None:
    from skyrl_minisandbox.sandbox import client as _client
    from skyrl_minisandbox.sandbox.client import LauncherClient, explain, shared

    launcher = shared()
    _client.ANSWER_TIMEOUT = 8.0  # for this process; what hangs is given up in time for a test
    if fault == "dies":
        os.kill(launcher.pid, signal.SIGKILL)
    if fault in ("hangs", "slow"):
        os.kill(launcher.pid, signal.SIGSTOP)
    if fault == "slow":
        threading.Timer(SLOW, os.kill, (launcher.pid, signal.SIGCONT)).start()
    if fault in ("raises", "wrong-type"):
        real = LauncherClient.ask

        def ask(client: Any, verb: str, *arguments: Any, **request: Any) -> Any:
            if f"-{VICTIM}." not in threading.current_thread().name:  # `step-ROLLOUT`: who is graded
                return real(client, verb, *arguments, **request)
            LauncherClient.ask = real  # type: ignore[method-assign]
            if fault == "raises":
                raise explain("the launcher cannot make a sandbox", errno.EAGAIN, "")
            return {"nonsense": NONSENSE}, []

        LauncherClient.ask = ask  # type: ignore[assignment,method-assign]


# -- store ----------------------------------------------------------------------------------------


class BrokenStore:
    """A store's directory that is broken and mended."""

    def __init__(self, directory: Path, fault: str) -> None:
        self._directory, self._fault = directory, fault
        self._index = directory / "index.json"
        self._aside = directory.with_name(f"{directory.name}.aside")
        self._mended = False

    def break_(self) -> None:
        if self._fault == "dies":
            self._directory.rename(self._aside)
            return
        self._index.rename(self._aside)
        if self._fault == "raises":
            self._index.mkdir()
        if self._fault == "wrong-type":
            self._index.write_text('["this", "is not", "an index"]')
        if self._fault in ("hangs", "slow"):
            os.mkfifo(self._index)
        if self._fault == "slow":
            threading.Thread(target=self._answer_late, daemon=True).start()

    def mend(self) -> None:
        """Idempotent."""
        if self._mended:
            return
        self._mended = True
        if self._fault == "dies":
            self._aside.rename(self._directory)
            return
        if self._fault == "raises":
            self._index.rmdir()
        else:
            self._release_readers()
            self._index.unlink()
        self._aside.rename(self._index)

    def _answer_late(self) -> None:
        """What is read arrives, after a while, as often as it is read."""
        while not self._mended:
            time.sleep(SLOW)
            try:
                writer = os.open(self._index, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads
                continue
            with open(writer, "wb") as file, self._aside.open("rb") as content:
                shutil.copyfileobj(content, file)

    def _release_readers(self) -> None:
        if self._index.is_fifo():
            os.close(os.open(self._index, os.O_RDWR | os.O_NONBLOCK))
