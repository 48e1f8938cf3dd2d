"""A tiny language for trainers: end-of-sequence (0) and twenty letters, a word each."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<eos>", *(chr(ord("a") + i) for i in range(20))]
PROMPTS: list[str | list[int]] = [[1 + (i * j) % 20 for j in range(1, 3 + i % 4)] for i in range(24)]
"""Token ids; two to five letters."""


def letter_tokenizer() -> Any:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
