"""A batch through our generator on three raylets of this machine, one of which is killed while commands run on it.

    python -m tests.training.nodes STORE CACHE DIRECTORY      (with SkyRL's trainer)

As SkyRL runs a training: in one Ray task. stdout's last line: JSON of what came of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.machine import become_subreaper, living_processes

ROWS = 12
NODES = 3
UNDER_WAY = "sleep 6 && cat answer.sh"
NOTICE = 90.0
"""Seconds for things to come about on a busy machine."""


def main(store: str, cache: str, directory: Path) -> dict[str, Any]:
    become_subreaper()
    logging.getLogger("ray").setLevel(logging.ERROR)
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    machines = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    others = [machines.add_node(**small) for _ in range(NODES - 1)]
    ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
    head = ray.get_runtime_context().get_node_id()
    on_head = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(head, soft=False)
    task = ray.remote(train).options(num_cpus=1, max_retries=0, scheduling_strategy=on_head)
    running = task.remote(store, cache, str(directory))
    _wait(lambda: (directory / "under way").exists() or bool(ray.wait([running], timeout=0)[0]))
    machines.remove_node(others[0], allow_graceful=False)
    found: dict[str, Any] = ray.get(running, timeout=300)
    pids = [*found.pop("pids"), *json.loads((directory / "under way").read_text())]
    ray.shutdown()
    machines.shutdown()
    _wait(lambda: not set(pids) & set(living_processes()))
    found["alive"] = [str(line) for pid, line in living_processes().items() if pid in pids]
    return found


def train(store: str, cache: str, directory: str) -> dict[str, Any]:
    """The task."""
    from skyrl_minisandbox.config import make_config
    from skyrl_minisandbox.env import shutdown

    config = make_config(
        {
            "images": {"store": store, "cache": cache},
            "scaffold": "tests.small.Loop",
            "cluster": {"slots": 8, "workers": 1},
            "training": {"failed_group_policy": "mean"},
        }
    )
    try:
        return asyncio.run(_train(config, Path(directory)))
    finally:
        shutdown()


async def _train(config: Any, directory: Path) -> dict[str, Any]:
    from skyrl.train.utils.trainer_utils import validate_generator_output

    from skyrl_minisandbox.env import shared_cluster
    from tests.skyrl.engine import ScriptedEngine
    from tests.skyrl.tokenizers import make_test_tokenizer
    from tests.small import SOLVE, small_task
    from tests.training.faults import make_batch, make_generator

    sessions = [f"{number // 2}_{number % 2}" for number in range(ROWS)]
    answered: set[str] = set()
    found: dict[str, Any] = {}

    async def hook(session: str, turn: int, text: str) -> None:
        """Once every row's long command is about to start: where they are, and the sign to kill."""
        if turn != 1 or session in answered:
            return
        answered.add(session)
        if len(answered) == ROWS:
            status = await asyncio.get_running_loop().run_in_executor(None, shared_cluster(config).status)
            found["spread"] = sorted(each.open for each in status)
            pids = json.dumps([pid for each in status for pid in each.pids])
            asyncio.get_running_loop().call_later(2.0, _write, directory / "under way", pids)
            return
        while len(answered) < ROWS:  # the others wait, so that all are under way at once
            await asyncio.sleep(0.05)

    tokenizer = make_test_tokenizer()
    answers = ["true", UNDER_WAY, SOLVE, "submit"]
    engine = ScriptedEngine(tokenizer, {session: list(answers) for session in sessions}, hook)
    generator = make_generator(config, engine, tokenizer, max_turns=8)
    extras = [{"task": small_task(f"small-{session}").model_dump_json()} for session in sessions]
    started = time.monotonic()
    out = await generator.generate(make_batch(sessions, extras), disable_tqdm=True)
    validate_generator_output(ROWS, out)
    status = await asyncio.get_running_loop().run_in_executor(None, shared_cluster(config).status)
    return {
        **found,
        "seconds": time.monotonic() - started,
        "rewards": [sum(reward) for reward in out["rewards"]],
        "exact": [
            [token for token, one in zip(ids, mask, strict=True) if one]
            == [token for answer in engine.last(session) for token in answer.ids]
            for session, ids, mask in zip(sessions, out["response_ids"], out["loss_masks"], strict=True)
        ],
        "tries": [len(engine.tries[session]) for session in sessions],
        "metrics": {
            key: float(value) for key, value in out["rollout_metrics"].items() if key.startswith("minisandbox/")
        },
        "nodes": len(status),
        "open": sum(each.open for each in status),
        "pids": [pid for each in status for pid in each.pids],
    }


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(text)
    aside.rename(path)


def _wait(ready: Any) -> None:
    deadline = time.monotonic() + NOTICE
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
