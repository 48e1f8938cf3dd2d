"""Sizes of the models that a recipe names: counted from their config, without their weights and without a download."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, LlamaConfig, LongformerConfig, MistralConfig

from tppo.config import Reward
from tppo.errors import UserError
from tppo.estimate import ModelSize, model_size
from tppo.models import MINILM, SMOLLM2, load_encoder_path
from tppo.reward.longformer import to_longformer
from tppo.run import cache_dir


def known_configs() -> dict[str, Any]:
    """Shapes of models that need not be on this machine, as their config.json has them."""
    return {
        "mistralai/Mistral-7B-v0.1": MistralConfig(max_position_embeddings=32768),
        "allenai/longformer-base-4096": LongformerConfig(
            vocab_size=50265,
            max_position_embeddings=4098,
            type_vocab_size=1,
            attention_window=[512] * 12,
            pad_token_id=1,
        ),
        SMOLLM2: LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    }


def config_of(name: str, setting: str) -> Any:
    """The config of a model, without downloading anything.

    Raises:
        UserError: it is neither a folder, nor in the hub's cache, nor built in.
    """
    source = name
    if name == MINILM:
        source = load_encoder_path(name)
    elif name == SMOLLM2 and (cache_dir() / SMOLLM2 / "config.json").exists():
        source = str(cache_dir() / SMOLLM2)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        known = known_configs()
        if name in known:
            return known[name]
        where = "is no model folder" if Path(name).is_dir() else "is not on this machine"
        raise UserError(
            f"{setting}={name} {where} and its shape is not built in (built in: {', '.join(known)}): a dry run "
            "downloads nothing; give a folder that holds its config.json"
        ) from None


@cache
def size_of(name: str, setting: str, num_labels: int = 0) -> ModelSize:
    """The size of a model by its name, counted once; `setting` is what messages call it by."""
    return model_size(config_of(name, setting), num_labels)


@cache
def longformer_size(name: str, max_length: int, attention_window: int) -> ModelSize:
    """The size of the Longformer that `reward.to_longformer` makes of the encoder called `name`.

    Raises:
        UserError: it cannot be made one (see `tppo.reward.longformer`).
    """
    with torch.device("meta"):
        short = AutoModelForTokenClassification.from_config(config_of(name, "reward.encoder"))
        config = to_longformer(short, max_length, attention_window).config
    return model_size(config, num_labels=3)


def encoder_size(reward: Reward) -> ModelSize:
    """The size of a reward model."""
    if reward.to_longformer:
        return longformer_size(reward.encoder, reward.max_length, reward.attention_window)
    return size_of(reward.encoder, "reward.encoder", num_labels=3)
