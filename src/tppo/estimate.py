"""Memory and time of training and generation from a model's shape: pure arithmetic, no weights, no GPU.

Memory is that of one device holding everything, as this package's stages do. Per parameter, with AdamW: float32
weights 4 bytes, gradients 4, two moments 8 (Rajbhandari et al., ZeRO, SC 2020, section 3.1, with float32 weights in
place of its float16 ones and their float32 copy); under bf16 autocast 2 more for the cached bf16 weights. What is
saved for the backward pass is counted tensor by tensor, as Korthikanti et al. (MLSys 2023, section 4.1) do, without
checkpointing:

    per token and layer 6 values of the hidden size around the two norms (float32 at all times) and, in the precision
    of the products, 4 hidden sizes in the attention (a Longformer's global projections: 3 more), 4 (gated) or 2
    intermediate sizes in the feed-forward part; and per head and attended position, where dropout or Longformer's own
    code keeps the scores, 10 or 26 bytes. A causal model's attention keeps none (`scaled_dot_product_attention`).

Both constants were found by counting the saved tensors of tiny models; tests/test_estimate.py counts them again.

Time is floating-point operations over the assumed rate: 2 N per token forward, 6 N forward and backward, 4 N when only
adapters are trained (Kaplan et al. 2020, section 2.1; N all parameters; attention scores left out). A generated token
is also bounded by reading the weights and the key-value cache once (Pope et al., MLSys 2023, section 2).

Shapes: N parameters, B sequences, P prompt tokens, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

FLOAT32, BFLOAT16 = 4, 2
ADAM_BYTES = 8
GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """What the formulas need of a model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    """Key-value heads x their width: values of a key (or of a value) per token and layer."""
    vocabulary: int
    gated: bool
    """The feed-forward part has a gate (three matrices in place of two)."""
    linear_widths: int
    """Sum of input and output widths over the linear layers but the output: LoRA has rank x this many parameters."""
    positions: int
    """Longest input."""
    window: int = 0
    """Longformer: tokens attended to beside the global ones; 0: full attention."""


def model_size(config: Any, num_labels: int = 0) -> ModelSize:
    """Count a model built from `config` on torch's meta device, which takes no memory.

    Args:
        num_labels: above 0: a token classifier with so many classes; else a causal language model.
    """
    with torch.device("meta"):
        if num_labels:
            config.num_labels = num_labels
            model: Any = AutoModelForTokenClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = model.get_output_embeddings() if not num_labels else None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "attention_window", 0)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        vocabulary=text.vocab_size,
        gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
        linear_widths=sum(module.in_features + module.out_features for module in linears),
        positions=getattr(text, "max_position_embeddings", 0),
        window=max(window) if isinstance(window, list | tuple) else window,
    )


def trained_parameters(size: ModelSize, tuning: str, lora_r: int) -> int:
    """All of them, or those of the adapters."""
    return lora_r * size.linear_widths if tuning == "lora" else size.parameters


def training_state(size: ModelSize, tuning: str, lora_r: int, precision: str) -> dict[str, float]:
    """Bytes that training holds from the first step to the last, by what they are for."""
    trained = trained_parameters(size, tuning, lora_r)
    adapters = trained if tuning == "lora" else 0
    return {
        "weights": FLOAT32 * (size.parameters + adapters),
        "gradients": FLOAT32 * trained,
        "Adam moments": ADAM_BYTES * trained,
        "bf16 weights of autocast": BFLOAT16 * (size.parameters + adapters) if precision == "bf16" else 0,
    }


def weights(size: ModelSize, precision: str) -> float:
    """Bytes of a frozen copy."""
    return bytes_per_value(precision) * size.parameters


def activations(size: ModelSize, tokens: int, precision: str, attended: int = 0) -> float:
    """Bytes kept for the backward pass of one forward pass over `tokens` tokens.

    Args:
        attended: positions whose scores each token keeps: 0 for a causal model, the sequence for an encoder trained
            with dropout, window + 1 + global tokens for a Longformer.
    """
    around_norms = FLOAT32 * 6 * size.hidden
    in_products = (7 if size.window else 4) * size.hidden + (4 if size.gated else 2) * size.intermediate
    scores = (26 if size.window else 10) * size.heads * attended
    return tokens * size.layers * (around_norms + bytes_per_value(precision) * in_products + scores)


def logits(size: ModelSize, positions: int, precision: str) -> float:
    """Bytes of the output layer and the loss: logits, their float32 copy if they are not, log-softmax, gradient."""
    copies = [bytes_per_value(precision)] + ([FLOAT32] if precision == "bf16" else []) + 2 * [FLOAT32]
    return sum(copies) * positions * size.vocabulary


def kv_cache(size: ModelSize, sequences: int, tokens: int, precision: str) -> float:
    """Bytes of keys and values of `sequences` sequences of `tokens` tokens."""
    return 2 * bytes_per_value(precision) * size.layers * size.kv_width * sequences * tokens


def bytes_per_value(precision: str) -> int:
    return BFLOAT16 if precision == "bf16" else FLOAT32


@dataclass(frozen=True)
class Machine:
    """Assumed speed of one device."""

    flops: float
    """Floating-point operations per second, utilisation included."""
    bandwidth: float
    """Bytes per second between memory and processor."""

    def forward(self, size: ModelSize, tokens: float) -> float:
        """Seconds to read `tokens` tokens."""
        return 2 * size.parameters * tokens / self.flops

    def train(self, size: ModelSize, tokens: float, tuning: str = "full") -> float:
        """Seconds of forward and backward passes over `tokens` tokens."""
        return (4 if tuning == "lora" else 6) * size.parameters * tokens / self.flops

    def generate(
        self, size: ModelSize, prompts: int, batch: int, prompt_tokens: int, new_tokens: int, precision: str
    ) -> float:
        """Seconds to answer `prompts` prompts, `batch` at a time, each with `new_tokens` tokens."""
        full, rest = divmod(prompts, batch)
        seconds = 0.0
        for sequences, times in ((batch, full), (rest, 1 if rest else 0)):
            # The mean cache over the response; every step reads it and the weights once.
            cache = kv_cache(size, sequences, prompt_tokens + math.ceil(new_tokens / 2), precision)
            step = max(
                self.forward(size, sequences), (bytes_per_value(precision) * size.parameters + cache) / self.bandwidth
            )
            seconds += times * (self.forward(size, sequences * prompt_tokens) + new_tokens * step)
        return seconds
