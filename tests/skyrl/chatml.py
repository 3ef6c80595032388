"""A tokenizer of ours in ChatML: a token per byte and two special ones. All that SkyRL's generator asks of one."""

from __future__ import annotations

import re
from typing import Any

START, END = "<|im_start|>", "<|im_end|>"
_SPECIAL = {START: 256, END: 257}


class ChatML:
    eos_token = END
    eos_token_id = _SPECIAL[END]
    pad_token_id = _SPECIAL[END]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({re.escape(START)}|{re.escape(END)})", text):
            ids += [_SPECIAL[part]] if part in _SPECIAL else part.encode()
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text = b""
        for number in ids:
            if number < 256:
                text += bytes([number])
            elif not skip_special_tokens:
                text += (START if number == _SPECIAL[START] else END).encode()
        return text.decode()

    def batch_decode(self, batch: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **_: Any,
    ) -> Any:
        text = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in conversation)
        if add_generation_prompt:
            text += f"{START}assistant\n"
        return self.encode(text) if tokenize else text
