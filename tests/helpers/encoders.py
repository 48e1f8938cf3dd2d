"""Tiny random encoders to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tests.helpers.tokenizer_kinds import get_tokenizer


def make_tiny_encoder(folder: Path, **settings: Any) -> Path:
    """A folder with a random 2-layer BERT and MiniLM's tokenizer; `settings` are BertConfig's."""
    torch.manual_seed(0)
    tokenizer = get_tokenizer("minilm")
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        }
        | settings
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
