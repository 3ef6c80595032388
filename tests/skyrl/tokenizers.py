"""Tokenizers made in code: real ones of transformers, byte pairs learned from shell text, in two chat templates."""

from __future__ import annotations

from typing import Any

from tests.small import SOLVE

START, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = (
    "You are a helpful assistant. Answer with a shell command. exit code 0 prints it should print right wrong",
    f"cat answer.sh ls true false submit {SOLVE} echo nope > answer.sh <think>let me think about this</think>",
)

STRIPPING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in text and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that leaves the reasoning of earlier answers out, as Qwen3's template does."""

TEMPLATES = {"chatml": CHATML, "stripping": STRIPPING}


def make_test_tokenizer(template: str = "chatml") -> Any:
    """A `PreTrainedTokenizerFast` that can write any text; `END` ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATES[template],
    )
