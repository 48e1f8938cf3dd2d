"""Sizes of the models that a recipe names: counted from their config, without their weights and without a download."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, LlamaConfig, LongformerConfig, MistralConfig

from tppo.core.common import UserError
from tppo.core.config import Recipe, Reward
from tppo.core.files import cache_dir
from tppo.core.models import MINILM, SCRATCH, SMOLLM2, load_encoder_path
from tppo.estimate import ModelSize, model_size
from tppo.reward.longformer import to_longformer
from tppo.reward.models import first_layers
from tppo.tune.scratch import check_settings as check_scratch
from tppo.tune.scratch import llama_config


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


def shape_of(name: str, setting: str, layers: int = 0) -> Any:
    """The config of a model that keeps its first `layers` layers (0: all)."""
    config = config_of(name, setting)
    for field, value in first_layers(config, name, layers).items():
        setattr(config, field, value)
    return config


@cache
def size_of(name: str, setting: str, num_labels: int = 0, layers: int = 0) -> ModelSize:
    """The size of a model by its name, counted once; `setting` is what messages call it by."""
    return model_size(shape_of(name, setting, layers), num_labels)


@cache
def longformer_size(name: str, max_length: int, attention_window: int, layers: int = 0) -> ModelSize:
    """The size of the Longformer that `reward.to_longformer` makes of the encoder called `name`.

    Raises:
        UserError: it cannot be made one (see `tppo.reward.longformer`).
    """
    with torch.device("meta"):
        short = AutoModelForTokenClassification.from_config(shape_of(name, "reward.encoder", layers))
        config = to_longformer(short, max_length, attention_window).config
    return model_size(config, num_labels=3)


def policy_size(recipe: Recipe) -> ModelSize:
    """The size of the policy; that of one made from scratch with all the tokens its tokenizer may have."""
    sft, task = recipe.sft, recipe.task
    if sft.model != SCRATCH:
        return size_of(sft.model, "sft.model")
    check_scratch(sft.scratch)
    return model_size(
        llama_config(sft.scratch, sft.scratch.vocabulary, task.max_prompt_tokens + task.max_response_tokens)
    )


def encoder_size(reward: Reward) -> ModelSize:
    """The size of a reward model."""
    if reward.to_longformer:
        return longformer_size(reward.encoder, reward.max_length, reward.attention_window, reward.encoder_layers)
    return size_of(reward.encoder, "reward.encoder", num_labels=3, layers=reward.encoder_layers)
