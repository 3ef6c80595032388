"""From `generate()` of our generator to the first request of each rollout; run as a process where SkyRL imports.

stdin: JSON with `path` (SkyRL's directory, "" where it is installed), `env` (our config), `rows` (tasks as JSON text)
and `times`. stdout: JSON of a list per time, the seconds after which each row asked for its first tokens; the first
time, in which worker processes start, is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


class Engine:
    """Notes when each row asks first, and answers when all have asked: until then there is only the setting up."""

    weight_version = 0

    def __init__(self, tokenizer: Any, rows: int, answer: str) -> None:
        self._tokenizer, self._rows, self._answer = tokenizer, rows, answer
        self.asked: list[float] = []
        self._all = asyncio.Event()

    async def generate(self, engine_input: Any, model: str | None = None) -> dict[str, Any]:
        self.asked.append(time.perf_counter())
        if len(self.asked) >= self._rows:
            self._all.set()
        await self._all.wait()
        ids = self._tokenizer.encode(self._answer + self._tokenizer.eos_token)
        return {
            "responses": [self._answer + self._tokenizer.eos_token],
            "response_ids": [ids],
            "stop_reasons": ["stop"],
            "response_logprobs": [[-0.5] * len(ids)],
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
            "rollout_sample_support": None,
        }

    async def finish_session(self, session: str) -> None:
        pass


def measure(given: dict[str, Any]) -> list[list[float]]:
    from skyrl.train.config import GeneratorConfig, SamplingParams
    from skyrl.train.generators.base import BatchMetadata, TrajectoryID

    import skyrl_minisandbox
    from skyrl_minisandbox.config import make_config
    from skyrl_minisandbox.training.config import GymConfig
    from skyrl_minisandbox.training.generator import MiniSandboxGenerator
    from tests.skyrl.chatml import ChatML

    skyrl_minisandbox.register()
    rows = given["rows"]
    tokenizer = ChatML()
    options = GeneratorConfig(
        max_turns=50,
        batched=False,
        max_input_length=100_000,
        sampling_params=SamplingParams(max_generate_length=1000, logprobs=1),
    )
    generator = MiniSandboxGenerator(options, GymConfig(minisandbox=make_config(given["env"])), None, tokenizer)

    async def once() -> list[float]:
        engine = Engine(tokenizer, len(rows), given["answer"])
        generator.inference_engine_client = engine
        batch = {
            "prompts": [[{"role": "user", "content": "a row"}] for _ in rows],
            "env_classes": ["minisandbox"] * len(rows),
            "env_extras": [{"task": row} for row in rows],
            "sampling_params": None,
            "trajectory_ids": [TrajectoryID(str(number), 0) for number in range(len(rows))],
            "batch_metadata": BatchMetadata(global_step=0, training_phase="train"),
        }
        started = time.perf_counter()
        out = await generator.generate(batch, disable_tqdm=True)
        if len(out["response_ids"]) != len(rows) or out["rollout_metrics"]["minisandbox/masked_mean"]:
            raise RuntimeError(f"not every rollout ran: {out['rollout_metrics']}")
        return sorted(at - started for at in engine.asked)

    async def all_of_them() -> list[list[float]]:
        return [await once() for _ in range(given["times"] + 1)][1:]

    return asyncio.run(all_of_them())


def main() -> None:
    given = json.load(sys.stdin)
    if given["path"]:
        from tests.skyrl.episodes import find_skyrl

        find_skyrl(given["path"])
    from skyrl_minisandbox.env import shutdown

    try:
        found = measure(given)
    finally:
        shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
