"""Models small enough to be made where a benchmark needs them: no downloads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POLICY_TOKENS = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|unk|>"}


def byte_level_tokenizer(corpus: Iterable[str], vocab_size: int, **special: str) -> Any:
    """A byte-level BPE tokenizer trained on `corpus`, with these special tokens; encodes any text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys(special.values()))
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if "cls_token" in special:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[(token, raw.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def make_policy(folder: Path, tokenizer: Any, seed: int = 0, **sizes: int) -> None:
    """Write a Llama with random weights and its tokenizer; `sizes` are fields of LlamaConfig."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
