"""An inference engine that plays scripts, token by token, and remembers what it sent.

Unless asked otherwise its tokens are not those that the tokenizer would make of the same text: a word is spelled in
pieces. So whoever decodes and encodes again gets other ids, and shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Any


@dataclasses.dataclass
class Sent:
    """One answer: what it was asked with, what it gave."""

    prompt: list[int]
    text: str
    ids: list[int]
    logprobs: list[float]


class ScriptedEngine:
    """Answers each session from its script, from the start again after the session was finished.

    answers: texts by session. before: awaited before each answer with (session, turn from 0, text); it may raise,
    hang, or give what is handed out instead of the answer. canonical: the tokenizer's own tokens.
    """

    weight_version = 0

    def __init__(
        self,
        tokenizer: Any,
        answers: dict[str, list[str]],
        before: Callable[[str, int, str], Awaitable[Any]] | None = None,
        *,
        canonical: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._answers = answers
        self._before = before
        self._canonical = canonical
        self._random = random.Random(0)
        self.tries: dict[str, list[list[Sent]]] = {}
        self._open: set[str] = set()
        self.finished: list[str] = []

    async def generate(self, engine_input: Any, model: str | None = None) -> Any:
        outputs = []
        for session, prompt in zip(engine_input["session_ids"], engine_input["prompt_token_ids"], strict=True):
            if session not in self._open:
                self._open.add(session)
                self.tries.setdefault(session, []).append([])
            turns = self.tries[session][-1]
            text = self._answers[session][len(turns)]
            if self._before is not None:
                instead = await self._before(session, len(turns), text)
                if instead is not None:
                    return instead
            await asyncio.sleep(0)
            ids = [*self._spell(text), self._tokenizer.eos_token_id]
            logprobs = [-round(self._random.uniform(0.01, 3.0), 6) for _ in ids]
            sent = Sent(list(prompt), text, ids, logprobs)
            turns.append(sent)
            outputs.append(sent)
        return {
            # As the real client: special tokens are in the text.
            "responses": [self._tokenizer.decode(sent.ids) for sent in outputs],
            "response_ids": [list(sent.ids) for sent in outputs],
            "stop_reasons": ["stop"] * len(outputs),
            "response_logprobs": [list(sent.logprobs) for sent in outputs],
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
            "rollout_sample_support": None,
        }

    async def finish_session(self, session: str) -> None:
        self.finished.append(session)
        self._open.discard(session)

    def last(self, session: str) -> list[Sent]:
        """What the session's last try was sent."""
        return self.tries[session][-1]

    def _spell(self, text: str) -> list[int]:
        """The text in tokens, cut at random places."""
        if self._canonical:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        ids: list[int] = []
        while text:
            length = self._random.randint(1, 5)
            ids += self._tokenizer.encode(text[:length], add_special_tokens=False)
            text = text[length:]
        return ids
