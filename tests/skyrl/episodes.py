"""Rollouts through SkyRL's own generator; run as a process, because it stubs torch.

stdin: JSON with `path` (SkyRL's directory), `env` (our config), `max_turns` and `rows` of `task` and `answers`.
stdout: JSON of what the generator put out, token lists decoded where a reader wants text.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types
import typing
from typing import Any


def stub_torch() -> None:
    """What importing the generator touches: types for annotations, a dtype, a decorator."""
    torch = types.ModuleType("torch")
    for name in ("Tensor", "device", "dtype", "Size"):
        setattr(torch, name, type(name, (), {}))

    class no_grad:
        def __call__(self, function: Any) -> Any:
            return function

    torch.int32 = "int32"  # type: ignore[attr-defined]
    torch.no_grad = no_grad  # type: ignore[attr-defined]
    sys.modules["torch"] = torch


def find_skyrl(path: str) -> None:
    """Have SkyRL's generator importable in this process, from a directory of `environment.skyrl_directory`."""
    sys.path.append(path)
    stub_torch()
    if sys.version_info < (3, 12):  # pydantic takes only typing_extensions' there
        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc,assignment]


class Engine:
    """An inference engine that answers each session from its row, end token included as a real one does."""

    weight_version = 0

    def __init__(self, tokenizer: Any, answers: dict[str, list[str]]) -> None:
        self._tokenizer = tokenizer
        self._answers = answers
        self.turns = dict.fromkeys(answers, 0)
        self.finished: list[str] = []

    async def generate(self, engine_input: Any, model: str | None = None) -> dict[str, Any]:
        texts = []
        for session in engine_input["session_ids"]:
            texts.append(self._answers[session][self.turns[session]] + self._tokenizer.eos_token)
            self.turns[session] += 1
        ids = [self._tokenizer.encode(text) for text in texts]
        return {
            "responses": texts,
            "response_ids": ids,
            "stop_reasons": ["stop"] * len(texts),
            "response_logprobs": [[-0.5] * len(tokens) for tokens in ids],
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
            "rollout_sample_support": None,
        }

    async def finish_session(self, session: str) -> None:
        self.finished.append(session)


def run(given: dict[str, Any]) -> dict[str, Any]:
    from skyrl.train.config import GeneratorConfig, SamplingParams
    from skyrl.train.generators.base import BatchMetadata, TrajectoryID
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator

    import skyrl_minisandbox
    from skyrl_minisandbox.config import make_config
    from skyrl_minisandbox.env import shutdown
    from skyrl_minisandbox.training.config import GymConfig
    from tests.skyrl.chatml import ChatML

    skyrl_minisandbox.register()
    rows = given["rows"]
    tokenizer = ChatML()
    names = [TrajectoryID(str(number), 0) for number in range(len(rows))]
    engine = Engine(tokenizer, {name.to_string(): row["answers"] for name, row in zip(names, rows, strict=True)})
    generator = SkyRLGymGenerator(
        GeneratorConfig(
            max_turns=given["max_turns"],
            batched=False,
            max_input_length=given.get("max_input_length", 100_000),
            sampling_params=SamplingParams(max_generate_length=1000, logprobs=1),
        ),
        GymConfig(max_env_workers=8, minisandbox=make_config(given["env"])),
        engine,
        tokenizer,
    )
    batch = {
        "prompts": [[{"role": "user", "content": "the row's prompt"}] for _ in rows],
        "env_classes": ["minisandbox"] * len(rows),
        "env_extras": [{"task": row["task"]} for row in rows],
        "sampling_params": None,
        "trajectory_ids": names,
        "batch_metadata": BatchMetadata(global_step=0, training_phase="train"),
    }
    try:
        out = asyncio.run(generator.generate(batch))
    finally:
        shutdown()
    return {
        "prompts": [tokenizer.decode(ids) for ids in out["prompt_token_ids"]],
        "response_ids": out["response_ids"],
        "rewards": out["rewards"],
        "loss_masks": out["loss_masks"],
        "stop_reasons": out["stop_reasons"],
        "logprobs": out["rollout_logprobs"],
        "metrics": {key: float(value) for key, value in out["rollout_metrics"].items()},
        "finished": sorted(engine.finished),
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    find_skyrl(request["path"])
    print(json.dumps(run(request)))
