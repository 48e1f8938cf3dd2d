"""Tiny random encoders of every kind the reward models are tested with, each with a tokenizer of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LongformerConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.models.auto import AutoModel

from tests.helpers.tokenizer_kinds import get_tokenizer

POSITIONS = 128
"""What each kind can read, in tokens."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def _after_padding(tokenizer: Any) -> dict[str, Any]:
    """Positions start after the padding token's id, and there is one token type."""
    first = tokenizer.pad_token_id + 1
    return {"max_position_embeddings": POSITIONS + first, "type_vocab_size": 1, **SIZES}


def _config(kind: str, tokenizer: Any) -> PreTrainedConfig:
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    from_zero = {"max_position_embeddings": POSITIONS, **SIZES}
    if kind in ("bert", "minilm_tokens"):
        return BertConfig(**common, **from_zero)
    if kind == "electra":
        return ElectraConfig(**common, **from_zero, embedding_size=16)
    if kind == "deberta_v2":
        return DebertaV2Config(
            **common, **from_zero, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
        )
    if kind == "modernbert":
        return ModernBertConfig(
            **common, **from_zero, local_attention=16, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
        )
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
        return DistilBertConfig(**common, **sizes, max_position_embeddings=POSITIONS)
    if kind == "longformer":
        return LongformerConfig(**common, **_after_padding(tokenizer), attention_window=[8, 8])
    made = {"roberta": RobertaConfig, "xlm_roberta": XLMRobertaConfig, "camembert": CamembertConfig}[kind]
    return made(**common, **_after_padding(tokenizer))


TOKENIZERS = {
    "bert": "word_piece",
    "minilm_tokens": "minilm",
    "distilbert": "word_piece",
    "electra": "word_piece",
    "roberta": "byte_level_bpe",
    "longformer": "byte_level_bpe",
    "modernbert": "byte_level_bpe",
    "xlm_roberta": "unigram",
    "camembert": "sentence_piece",
    "deberta_v2": "sentence_piece",
}
"""Tokenizer kind of each encoder kind; minilm_tokens is BERT with the real tokenizer, whose token types are two."""


def write_encoder(kind: str, folder: Path, tokenizer: Any = None) -> str:
    """Save a random encoder without a head, and its tokenizer; weights large enough for scores that differ."""
    tokenizer = tokenizer or get_tokenizer(TOKENIZERS[kind])
    torch.manual_seed(0)
    config = _config(kind, tokenizer)
    config.initializer_range = 0.2
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
