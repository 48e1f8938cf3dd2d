"""Longformers: making one from a short encoder, and which of a reward model's tokens attend globally.

The recipe is that of Beltagy, Peters and Cohan 2020 (Longformer, section 5 "MLM Continued Pretraining"; code:
allenai/longformer, scripts/convert_model_to_long.ipynb), without their continued pretraining: position embeddings
are tiled, the global projections start as copies of the local ones, every other weight keeps its name. Departures:
the result is transformers' own Longformer instead of a RoBERTa with exchanged attention, and BERT kinds are
converted, too: their positions start at 0, a Longformer's after the padding token's id.
"""

from __future__ import annotations

import re
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import LongformerConfig, LongformerForTokenClassification

from tppo.core.common import UserError
from tppo.core.config import GlobalAttention
from tppo.reward.data import Batch

CONVERTIBLE = ("bert", "roberta", "xlm-roberta", "camembert")
"""Model types whose layers are a Longformer's in names and computation."""
LONG_ALREADY = ("longformer", "big_bird", "modernbert", "nomic_bert", "eurobert")
_SHARED_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id"),
)


def to_longformer(model: Any, max_length: int, attention_window: int) -> LongformerForTokenClassification:
    """A Longformer that computes what `model` does wherever the window, or global attention, covers the input.

    Args:
        model: token-classification model of a `CONVERTIBLE` kind; it is left as it is.
        max_length: longest input of the result, in tokens.
        attention_window: tokens that a token attends to, half of them on each side.

    Raises:
        UserError: an encoder of another kind; an odd window; a length that is no multiple of the window (inputs are
            padded to one, so the rest could not be used), or that the encoder can read as it is.
    """
    _check_kind(model.config)
    table = model.base_model.embeddings.position_embeddings
    source_PD, first = table.weight.detach()[first_position(table) :], model.config.pad_token_id + 1
    _check_sizes(len(source_PD), max_length, attention_window)
    config = LongformerConfig(
        **{name: getattr(model.config, name) for name in _SHARED_SETTINGS},
        attention_window=attention_window,
        max_position_embeddings=first + max_length,
    )
    longformer = LongformerForTokenClassification(config)
    positions_PD = torch.zeros(first + max_length, config.hidden_size)
    positions_PD[first:] = tile_positions(source_PD, max_length)
    weights = {
        name.replace(f"{model.base_model_prefix}.", "longformer.", 1): value
        for name, value in model.state_dict().items()
    }
    # ...self.query.weight is copied to ...self.query_global.weight, and so on.
    attention = {name: value for name, value in weights.items() if ".attention.self." in name}
    weights |= {re.sub(r"\.(\w+)$", r"_global.\1", name): value for name, value in attention.items()}
    weights["longformer.embeddings.position_embeddings.weight"] = positions_PD
    longformer.load_state_dict(weights)  # strict: a weight without a place, or a place without a weight, is an error
    return longformer.train(model.training)


def tile_positions(positions_PD: Tensor, length: int) -> Tensor:
    """Position embeddings (P,D) over and over until there are `length` of them: (length, D)."""
    return positions_PD[torch.arange(length, device=positions_PD.device) % len(positions_PD)]


def first_position(position_embeddings: torch.nn.Embedding | None) -> int:
    """Index of the first token's position: 0 as in BERT, or after the padding token's id as in RoBERTa."""
    padding = getattr(position_embeddings, "padding_idx", None)
    return 0 if padding is None else padding + 1


def global_attention_mask(batch: Batch, where: GlobalAttention) -> Tensor:
    """1 for tokens that attend to all others and are attended to by all, else 0: (B,T).

    transformers' token-classification head sets none (its sequence classification sets CLS). Global attention on G
    of T tokens costs G x T: with `history` as much as full attention, with `cls` and `response` little.
    """
    attended_BT = batch.inputs["attention_mask"]
    if where == "history":
        return attended_BT * ~batch.response_mask_BT
    if where == "response":
        return attended_BT * batch.response_mask_BT
    mask_BT = torch.zeros_like(attended_BT)
    if where == "cls":
        mask_BT[:, 0] = 1
    return mask_BT


def check_global_attention(where: Any, source: str) -> None:
    """Raise UserError when `where`, which `source` says, is no known choice."""
    if where not in get_args(GlobalAttention):
        raise UserError(f"{source} is {where!r} and has to be one of {', '.join(get_args(GlobalAttention))}")


def _check_kind(config: Any) -> None:
    if config.model_type in LONG_ALREADY:
        raise UserError(
            f"reward.to_longformer: the encoder is of kind {config.model_type}, which reads long inputs as it is; "
            "leave to_longformer out"
        )
    if config.model_type not in CONVERTIBLE or config.is_decoder:
        kind = f"{config.model_type} (decoder)" if getattr(config, "is_decoder", False) else config.model_type
        raise UserError(
            f"reward.to_longformer: a model of kind {kind} cannot be converted, only encoders of kind "
            f"{', '.join(CONVERTIBLE)}; give one of these, or one that is long already and leave to_longformer out"
        )


def _check_sizes(readable: int, max_length: int, attention_window: int) -> None:
    if attention_window < 2 or attention_window % 2:
        raise UserError(f"reward.attention_window={attention_window} must be even and at least 2: half on each side")
    if max_length % attention_window:
        above = (max_length // attention_window + 1) * attention_window
        raise UserError(
            f"reward.max_length={max_length} must be a multiple of reward.attention_window={attention_window}, such "
            f"as {above}"
        )
    if max_length <= readable:
        raise UserError(
            f"reward.to_longformer: the encoder reads {readable} tokens as it is, so reward.max_length={max_length} "
            "needs no Longformer; raise it (the paper has 2048), or leave to_longformer out"
        )
