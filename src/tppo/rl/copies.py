"""The two frozen companions of the policy: the reference that KL is measured against, and the copy that samples.

Both are copied from the policy in memory at the start; no model is loaded twice. With LoRA there is no reference
model at all (the policy with its adapters off is one), and the sampling copy has the adapters merged.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tppo.config import RL
from tppo.models import lora_config
from tppo.precision import autocast, generation_dtype, resolved
from tppo.rl.policy import TokenBatch, response_logprobs
from tppo.seeding import stream_seed

_ADAPTER = "default"


def rollout_copy(lm: Any, config: RL) -> Any:
    """A frozen copy of the language model to sample with, in the rollout's precision."""
    dtype = generation_dtype(config.precision)
    return copy.deepcopy(lm).to(dtype).eval().requires_grad_(False)


def reference_copy(lm: Any, config: RL) -> Any:
    """A frozen copy whose results equal the policy's to the last bit, in less memory under bf16.

    Autocast rounds the weights of a linear layer to bf16 at every use, so they are held rounded. Embeddings
    (and output layers tied to them) and norms are used in float32, and stay so.
    """
    reference = copy.deepcopy(lm).eval().requires_grad_(False)
    if resolved(config.precision) == "bf16":
        tied = {id(module.weight) for module in reference.modules() if isinstance(module, nn.Embedding)}
        for module in reference.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in tied:
                module.to(torch.bfloat16)
    return reference


def with_adapters(lm: Any, config: RL, seed: int) -> Any:
    """The language model with fresh LoRA adapters on every linear layer but the output; they start at zero change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "rl", "lora"))
        return get_peft_model(lm, lora_config(config.lora_r))


@torch.no_grad()
def reference_logprobs(lm: Any, reference: Any | None, batch: TokenBatch, config: RL) -> Tensor:
    """Log-probabilities (B, T) under the frozen reference; None means the policy with its adapters off."""
    model = lm if reference is None else reference
    with model.disable_adapter() if reference is None else nullcontext(), autocast(config.precision):
        return response_logprobs(model, batch, config.temperature)[0]


@torch.no_grad()
def copy_weights(source: Any, target: nn.Module) -> None:
    """Bring the rollout copy up to date: the policy's parameters (LoRA merged) in the copy's precision."""
    if not isinstance(source, PeftModel):
        for source_parameter, target_parameter in zip(source.parameters(), target.parameters(), strict=True):
            target_parameter.copy_(source_parameter)
        return
    # The weights without an adapter never change.
    for name, module in source.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            merged = module.get_base_layer().weight + module.get_delta_weight(_ADAPTER)
            target.get_parameter(f"{name}.weight").copy_(merged)
