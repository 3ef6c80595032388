"""One cell of the fault table, run in a process with SkyRL's trainer (`tests.skyrl.process`): real generator, Env,
cluster and sandboxes; something breaks under the last of four rollouts while the others are under way.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from tests.machine import Process, become_subreaper, descendants
from tests.skyrl.engine import ScriptedEngine
from tests.small import SOLVE, small_task
from tests.training import saboteur
from tests.training.saboteur import NONSENSE, VICTIM, Break, BrokenStore, SabotagedEnv

ROWS = 4
LAST = "1_1"
"""The session of the victim: groups are 0 and 1, two rows each."""

DEADLINES = {"step": 60.0, "setup": 60.0, "grade": 60.0}
"""Seconds of `rollout.*`: enough on a machine that is busy with other tests."""

NOTICED = {"step": 8.0, "setup": 10.0, "grade": 8.0}
"""The same where something hangs, for it to be noticed in time for a test."""

TESTS = 4.0
"""Seconds that the tests of a task may take."""

ENGINE_TIME = 15.0
"""Seconds of `training.time` where the engine breaks: nothing else ends what it does not answer."""


STRIKING = 0.3
"""Seconds from an answer that breaks something to its breaking: what others are asked meanwhile overlaps it."""

PATIENCE = 60.0
"""Seconds that the others wait for the fault to strike, at most."""


def prepare() -> None:
    """Deadlines that are minutes become seconds in this process; orphans become its children."""
    import skyrl_gym
    from skyrl_gym.envs.registration import EnvSpec

    from skyrl_minisandbox import cluster, env, node, placement, turn
    from skyrl_minisandbox.training import generator

    become_subreaper()
    placement.MARGIN = cluster.MARGIN = 1.0
    cluster.NODE_START = 20.0
    placement.CANCELLATION = env.CANCELLATION = turn.CANCELLATION = 1.0
    turn.PROBE = 1.0
    node.ENDING = 2.0
    node.GIVING_UP = node.SIGN = 3.0
    generator.LET_GO = generator.CLOSING = 3.0
    cluster.NodeActor = saboteur.SabotagedActor  # type: ignore[misc]
    skyrl_gym.registry[env.ENV_ID] = EnvSpec(id=env.ENV_ID, entry_point="tests.training.saboteur:SabotagedEnv")


def run(place: str, fault: str, times: str, method: str, env: dict[str, Any], directory: str) -> dict[str, Any]:
    """What came of the cell.

    times: `once` or `always`. method: of the Env that breaks. env: our config. directory: empty, of this cell alone.
    """
    prepare()
    cell = _Cell(Break(place, fault, f"{directory}/struck" if times == "once" else ""), method, env, Path(directory))
    try:
        return asyncio.run(cell.run())
    finally:
        cell.end()


class _Cell:
    def __init__(self, breaks: Break, method: str, env: dict[str, Any], directory: Path) -> None:
        from skyrl_minisandbox.config import make_config

        self.breaks, self.method = breaks, method
        store = directory / "store"
        shutil.copytree(env["images"]["store"], store)
        ray = breaks.place == "actor"
        self.config = make_config(
            {
                "images": {"store": str(store), "cache": env["images"]["cache"]},
                "scaffold": "tests.training.saboteur.Saboteur",
                "cluster": {"kind": "ray" if ray else "local", "workers": 2, "slots": 8},
                "rollout": NOTICED if breaks.fault == "hangs" else DEADLINES,
                "grading": {"retries": 0},
                "training": {
                    "running": ROWS,
                    "grading": ROWS,
                    "time": ENGINE_TIME if (breaks.place, breaks.fault) == ("policy", "hangs") else 600.0,
                    "failed_group_policy": "mean",
                    "max_infra_error_fraction": 0.3,
                },
                "out": str(directory / "run"),
            }
        )
        self.store = BrokenStore(store, breaks.fault)
        self.struck = threading.Event()
        self.waiting = 0
        self.before = {process.pid for process in descendants(os.getpid())}
        SabotagedEnv.made = []
        SabotagedEnv.before_init = self._before_init
        SabotagedEnv.after_init = self._after_init
        SabotagedEnv.struck = self._strike
        saboteur.released.clear()

    async def run(self) -> dict[str, Any]:
        from skyrl.train.utils.trainer_utils import validate_generator_output

        from tests.skyrl.tokenizers import make_test_tokenizer

        tokenizer = make_test_tokenizer()
        live = ["cat answer.sh", SOLVE, "submit"]
        place = self.breaks.place
        broken = ["cat answer.sh", str(self.breaks) if place in ("actor", "worker", "launcher") else "true", *live[1:]]
        sessions = [f"{group}_{repetition}" for group in (0, 1) for repetition in (0, 1)]
        answers = {session: live if session != LAST else broken for session in sessions}
        engine = ScriptedEngine(tokenizer, answers, self._hook)
        generator = make_generator(self.config, engine, tokenizer, max_turns=8)
        batch = make_batch(sessions, [self._extras(session) for session in sessions])
        await asyncio.get_running_loop().run_in_executor(None, self._connect)  # Ray's start is none of its time
        started = time.monotonic()
        error, out = "", None
        try:
            out = await generator.generate(batch, disable_tqdm=True)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        found: dict[str, Any] = {"seconds": time.monotonic() - started, "error": error, "rows": []}
        if out is not None:
            validate_generator_output(ROWS, out)
            found["rows"] = [_row(out, number, engine, session) for number, session in enumerate(sessions)]
            found["metrics"] = {
                key: float(value) for key, value in out["rollout_metrics"].items() if key.startswith("minisandbox/")
            }
        found["open"] = await asyncio.get_running_loop().run_in_executor(None, self._open)
        found["not_closed"] = [made.rollout_id for made in SabotagedEnv.made if not made._closed]
        found["struck"] = self.struck.is_set() and (not self.breaks.flag or self._flagged())
        return found

    def _connect(self) -> None:
        from skyrl_minisandbox.env import shared_cluster

        shared_cluster(self.config)

    def _flagged(self) -> bool:
        """A fault that strikes once has left its mark; of a store its breaking is."""
        return self.breaks.place == "store" or os.path.exists(self.breaks.flag)

    def _open(self) -> int:
        """Rollouts that nodes still hold, a moment later: what was given up ends there when it can."""
        from skyrl_minisandbox.env import shared_cluster

        deadline = time.monotonic() + 15
        while True:
            nodes = shared_cluster(self.config).status()
            count = sum(status.open for status in nodes)
            if not count or time.monotonic() > deadline:
                return count
            time.sleep(0.05)

    def end(self) -> None:
        """Let go of what hangs, end the cluster; nothing may be left of it."""
        from skyrl_minisandbox.env import shutdown

        saboteur.released.set()
        self._join_threads()
        if self.breaks.place == "store" and self.struck.is_set():
            self.store.mend()
        shutdown()
        deadline = time.monotonic() + 10
        while left := [line for line in descendants(os.getpid()) if line.pid not in self.before and _ours(line)]:
            assert time.monotonic() < deadline, f"left behind: {[str(line) for line in left]}"
            time.sleep(0.05)

    def _join_threads(self) -> None:
        """What hung in an Env goes on, finds that it was given up, and leaves."""
        for thread in threading.enumerate():
            if thread.name.startswith("minisandbox-") and thread.daemon and not thread.name.endswith("launcher"):
                thread.join(20)

    def _extras(self, session: str) -> dict[str, Any]:
        if session != LAST:
            return {"task": small_task(f"live-{session}", timeout=TESTS).model_dump_json()}
        extras: dict[str, Any] = {"task": small_task(VICTIM, timeout=TESTS).model_dump_json(), "victim": True}
        if self.breaks.place == "env":
            extras["sabotage"] = {"method": self.method, "fault": self.breaks.fault, "flag": self.breaks.flag}
        return extras

    def _strike(self) -> None:
        self.struck.set()

    async def _hook(self, session: str, turn: int, text: str) -> Any:
        """The others wait in their second turn until the fault has struck; then the policy's own faults."""
        place, fault = self.breaks.place, self.breaks.fault
        if session != LAST and turn == 1:
            self.waiting += 1
            if place == "store" and self.waiting == ROWS - 1:  # all others are open
                self.store.break_()
                self.struck.set()
            await self._wait()
        if session == LAST and turn == 1 and place in ("actor", "worker", "launcher"):
            asyncio.get_running_loop().call_later(STRIKING, self.struck.set)
        if place != "policy":
            return None
        dead = fault == "dies" and self.struck.is_set()
        if dead or (session == LAST and turn == 1 and self.breaks.strikes("policy")):
            self.struck.set()
            return await _break_policy(fault)
        return None

    async def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.struck.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _before_init(self, made: SabotagedEnv) -> None:
        """The victim of a store opens when it is broken."""
        if self.breaks.place == "store" and made.extras.get("victim"):
            self.struck.wait(PATIENCE)

    def _after_init(self, made: SabotagedEnv) -> None:
        """A store that breaks once is mended when its victim's first try has failed."""
        if self.breaks.place == "store" and made.finished is not None and self.breaks.flag:
            self.store.mend()


async def _break_policy(fault: str) -> Any:
    if fault == "raises":
        raise RuntimeError("a fault of the engine")
    if fault == "dies":
        raise ConnectionError("the engine is gone")
    if fault == "hangs":
        await asyncio.Event().wait()
    if fault == "slow":
        await asyncio.sleep(saboteur.SLOW)
    return {"responses": NONSENSE, "response_ids": [None], "stop_reasons": ["stop"]} if fault == "wrong-type" else None


def make_generator(config: Any, engine: Any, tokenizer: Any, *, max_turns: int, **more: Any) -> Any:
    """Our generator. more: fields of SkyRL's GeneratorConfig."""
    from skyrl.train.config import GeneratorConfig, SamplingParams

    from skyrl_minisandbox.training.config import GymConfig
    from skyrl_minisandbox.training.generator import MiniSandboxGenerator

    fields = {"max_input_length": 100_000, **more}
    sampling = SamplingParams(max_generate_length=1000, logprobs=1)
    return MiniSandboxGenerator(
        GeneratorConfig(max_turns=max_turns, batched=False, sampling_params=sampling, **fields),
        GymConfig(max_env_workers=8, minisandbox=config),
        engine,
        tokenizer,
    )


def make_batch(sessions: list[str], extras: list[dict[str, Any]], phase: Any = "train") -> dict[str, Any]:
    from skyrl.train.generators.base import BatchMetadata, TrajectoryID

    split = [session.split("_") for session in sessions]
    return {
        "prompts": [[{"role": "user", "content": "the row's prompt"}] for _ in sessions],
        "env_classes": ["minisandbox"] * len(sessions),
        "env_extras": extras,
        "sampling_params": None,
        "trajectory_ids": [TrajectoryID(group, int(repetition)) for group, repetition in split],
        "batch_metadata": BatchMetadata(global_step=1, training_phase=phase),
    }


def _row(out: dict[str, Any], number: int, engine: ScriptedEngine, session: str) -> dict[str, Any]:
    ids, mask = out["response_ids"][number], out["loss_masks"][number]
    trained = [token for token, one in zip(ids, mask, strict=True) if one]
    sent = [token for answer in engine.last(session) for token in answer.ids] if session in engine.tries else []
    return {
        "session": session,
        "reward": sum(out["rewards"][number]),
        "masked": not any(mask),
        "exact": trained == sent,
        "tokens": len(ids),
        "stop_reason": out["stop_reasons"][number],
        "tries": len(engine.tries.get(session, [])),
    }


def _ours(line: Process) -> bool:
    """Whether a process is not Python's own, one for the life of the interpreter that first needs it."""
    return "multiprocessing.resource_tracker" not in line.command
