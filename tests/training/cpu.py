"""The parts of the CPU training that can be looked at without one; run where SkyRL's trainer is."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import torch
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training.config import make_train_config
from skyrl_minisandbox.training.cpu import LocalDispatch, refuse
from skyrl_minisandbox.training.cpu_engine import CpuEngine
from skyrl_minisandbox.training.cpu_model import make_model, make_tokenizer

CPU = [
    "trainer.placement.colocate_all=false",
    "trainer.algorithm.use_kl_loss=false",
    "generator.inference_engine.enable_ray_prometheus_stats=false",
]


def refusal(*, keys: list[str]) -> str:
    try:
        refuse(make_train_config([*CPU, *keys]))
    except InputError as error:
        return error.render()
    return ""


def round_trip(*, text: str) -> str:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    return tokenizer.decode(ids)


def answers(*, order: list[int], together: bool, loads: int = 1, temperature: float = 1.0) -> list[Any]:
    """What the engine answers to one prompt per number, asked in this order; in the order of the numbers."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=1)
    engine = CpuEngine(model, tokenizer, seed=3)
    for _ in range(loads):
        engine.load(model.state_dict())

    async def ask(number: int) -> Any:
        out = await engine.generate(
            {
                "prompt_token_ids": [tokenizer.encode(f"prompt {number} " * (1 + number))],
                "session_ids": [f"{number}_0"],
                "sampling_params": {"max_tokens": 6, "temperature": temperature, "logprobs": 1},
            }
        )
        return number, out["response_ids"][0], out["response_logprobs"][0]

    async def ask_all() -> list[Any]:
        if together:
            return list(await asyncio.gather(*(ask(number) for number in order)))
        return [await ask(number) for number in order]

    return sorted(asyncio.run(ask_all()))


def refused_sampling(*, params: dict[str, Any]) -> str:
    tokenizer = make_tokenizer()
    engine = CpuEngine(make_model(tokenizer, seed=0), tokenizer)
    try:
        asyncio.run(engine.generate({"prompt_token_ids": [[2]], "sampling_params": params}))
    except InputError as error:
        return error.render()
    return ""


def gradients(*, parts: int, padding: int = 0) -> list[float]:
    """Norms of a mini-batch's gradients, and its log-probabilities, when so many samples are computed at once.

    padding: tokens on the left of every row that are not its own.
    """
    random.seed(0)
    samples, prompt, response = 12, 20, 5
    width = padding + prompt + response
    sequences = torch.zeros(samples, width, dtype=torch.long)
    mask = torch.zeros(samples, width, dtype=torch.long)
    for row in range(samples):
        own = random.randint(prompt // 2, prompt) + response
        sequences[row, -own:] = torch.tensor([random.randrange(2, 258) for _ in range(own)])
        mask[row, -own:] = 1
    cfg = make_train_config(
        [*CPU, f"trainer.micro_train_batch_size_per_gpu={parts}", f"trainer.micro_forward_batch_size_per_gpu={parts}"]
    )
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=1)
    dispatch = LocalDispatch(cfg, model, CpuEngine(make_model(tokenizer, seed=1), tokenizer), steps=None)
    batch = TrainingInputBatch(
        {
            "sequences": sequences,
            "attention_mask": mask,
            "loss_mask": torch.ones(samples, response),
            "advantages": torch.tensor([[random.gauss(0, 1)] * response for _ in range(samples)]) / samples,
            "action_log_probs": torch.zeros(samples, response),
        }
    )
    batch.metadata = {"response_length": response}
    old = dispatch.forward("policy", batch)
    logprobs = [row["logprobs"] for row in old.loss_fn_outputs]
    batch["action_log_probs"] = torch.tensor(logprobs)
    dispatch.forward_backward("policy", batch)
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    return norms + [value for row in logprobs for value in row]
