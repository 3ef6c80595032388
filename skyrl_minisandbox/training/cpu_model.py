"""A model and a tokenizer that need no download and no GPU: 115,000 random weights, a token per byte.

`write_model` makes a directory that `AutoTokenizer` and `AutoModelForCausalLM` read as any other checkpoint. Nobody
would use the model for anything but to see that training works: what it samples at first is noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

START, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)
"""The chat template of the Qwen family, without its special cases."""

WIDTH, LAYERS, HEADS = 64, 2, 4
CONTEXT = 4096
"""Tokens. Positions are rotary, so a longer one would take no weights."""

SPREAD = 0.2
"""Standard deviation of the weights. With transformers' 0.02 all prompts look alike to two layers, and nothing is
learned in the first hundred steps; with this a menu of four is at 0.9 after twenty (measured on the toy set)."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in ChatML that can write any text. `END` ends an answer, and pads."""
    letters = [START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """A random Qwen2 in float32 for the tokenizer's vocabulary; the same seed gives the same weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_model(directory: Path, *, seed: int) -> None:
    """Write both to `directory`, which is made. What is there already is overwritten."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    make_model(tokenizer, seed=seed).save_pretrained(directory)


def load_model(directory: Path) -> PreTrainedModel:
    """The weights of a checkpoint in float32. Raises `OSError` when there is none."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
