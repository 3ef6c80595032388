"""An inference engine in the trainer's own process, on the CPU: what SkyRL's generator asks of vLLM, for a tiny model.

Each request is computed alone and draws from a random stream of its own, seeded by the weights' version, its session
and its prompt. So what is sampled depends neither on the order in which requests come in nor on what runs beside
them, and two trainings with one seed have the same rollouts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skyrl_minisandbox.errors import InputError

_OFF = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop": None}
"""Sampling parameters that this engine does not have, and the values that mean so to vLLM."""


class CpuEngine:
    """Samples from a copy of the policy's weights. Of SkyRL's `InferenceEngineInterface` it has what a training calls.

    model: tells the architecture, and the weights until `load`. seed: of all sampling.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
        self.weight_version = 0
        self.model_name = "policy"
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._seed = seed
        self._resumed = asyncio.Event()
        self._resumed.set()

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these weights for all tokens from here on; running requests keep what they have, as with vLLM."""
        self._model.load_state_dict(weights)
        self.weight_version += 1

    async def generate(self, input_batch: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
        """Tokens in, tokens out: an answer per prompt with the log-probability of each of its tokens.

        The end token is part of an answer (`stop`); one that reaches `max_tokens` has none (`length`). A temperature
        of 0 takes the likeliest token. Raises `InputError` for a sampling parameter that this engine lacks.
        """
        wanted = _checked(input_batch.get("sampling_params") or {})
        prompts = input_batch["prompt_token_ids"]
        sessions = input_batch.get("session_ids") or range(len(prompts))
        answers = [
            await self._answer(prompt, str(session), wanted) for prompt, session in zip(prompts, sessions, strict=True)
        ]
        return {
            "responses": [self._tokenizer.decode(tokens) for tokens, _, _ in answers],
            "response_ids": [tokens for tokens, _, _ in answers],
            "stop_reasons": [reason for _, _, reason in answers],
            "response_logprobs": [values for _, values, _ in answers] if wanted["logprobs"] is not None else None,
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
            "rollout_sample_support": None,
        }

    async def _answer(
        self, prompt: Sequence[int], session: str, wanted: Mapping[str, Any]
    ) -> tuple[list[int], list[float], str]:
        stream = torch.Generator().manual_seed(self._stream(prompt, session))
        tokens: list[int] = []
        logprobs: list[float] = []
        given, cache = torch.tensor([list(prompt)]), None
        while len(tokens) < wanted["max_tokens"]:
            await self._resumed.wait()
            with torch.inference_mode():
                out = self._model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[0, -1]
            if wanted["temperature"] > 0:
                logits = logits / wanted["temperature"]
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=stream))
            else:
                token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            if token == self._tokenizer.eos_token_id:
                return tokens, logprobs, "stop"
            given, cache = torch.tensor([[token]]), out.past_key_values
            await asyncio.sleep(0)  # other rollouts of this loop
        return tokens, logprobs, "length"

    def _stream(self, prompt: Sequence[int], session: str) -> int:
        """SkyRL's session ids come again each epoch and in evaluations, so the prompt and the version are in it."""
        facts = f"{self._seed} {self.weight_version} {session} {list(prompt)}"
        return int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=7).digest(), "big")

    # -- what has nothing to do in one process ----------------------------------------------------

    async def finish_session(self, session_id: str) -> None:
        """Nothing is kept per session."""

    async def pause_generation(self) -> None:
        """Hold running requests before their next token."""
        self._resumed.clear()

    async def resume_generation(self) -> None:
        """Let them go on."""
        self._resumed.set()

    async def sleep(self, *_: Any, **__: Any) -> None:
        """No memory of an accelerator to give back."""

    async def wake_up(self, *_: Any, **__: Any) -> None:
        """Never asleep."""

    async def teardown(self) -> None:
        """No process to end."""


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    for name, off in _OFF.items():
        if given.get(name, off) not in (off, None):
            raise InputError(
                f"the CPU engine has no `{name}` (it is {given[name]!r})",
                hint=f"generator.sampling_params.{name}={'null' if off is None else off}",
            )
    known = {"max_tokens": 1024, "temperature": 1.0, "logprobs": None}
    return known | {name: given[name] for name in known if name in given}
