"""What is checked and made once, before the first update: settings, prompts, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tppo.config import RL
from tppo.errors import UserError
from tppo.rl.policy import PolicyWithValue

EAGER_TOKENS = 512  # a layer's attention weights of 16 such sequences with 9 heads take 150 MB in float32


def check_config(config: RL, max_response_tokens: int) -> None:
    """Settings that fit each other.

    Raises:
        UserError: names the setting and what it has to be.
    """
    if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batch_size:
        raise UserError(
            f"rl.batch_size={config.batch_size} must be a multiple of rl.minibatch_size={config.minibatch_size}, "
            f"and that of rl.micro_batch_size={config.micro_batch_size}"
        )
    wrong = [
        (config.batch_size < 2, f"batch_size={config.batch_size}", "at least 2: advantages are compared"),
        (config.temperature <= 0, f"temperature={config.temperature}", "above 0: greedy rollouts have no gradient"),
        (config.kl_placement == "loss" and config.kl_estimator == "k1", "kl_estimator=k1", "k2 or k3 in the loss"),
        (config.dual_clip and config.dual_clip <= 1, f"dual_clip={config.dual_clip}", "above 1, or 0 (off)"),
        (config.updates < 1, f"updates={config.updates}", "at least 1"),
        (config.save_every < 1, f"save_every={config.save_every}", "at least 1"),
        (config.keep_checkpoints < 1, f"keep_checkpoints={config.keep_checkpoints}", "at least 1"),
        (
            config.overlong_penalty and not 0 < config.overlong_buffer < max_response_tokens,
            f"overlong_buffer={config.overlong_buffer}",
            f"between 1 and {max_response_tokens - 1}, the response limit less 1",
        ),
        (config.max_kl < 0 or config.kl_target < 0, "max_kl or kl_target", "0 (off) or more"),
    ]
    for is_wrong, setting, must_be in wrong:
        if is_wrong:
            raise UserError(f"rl.{setting} must be {must_be}")


def require_float32(lm: Any) -> None:
    """Small steps vanish in bf16 weights: 1e-5 added to 1 is 1.

    Raises:
        UserError: a parameter of another dtype.
    """
    for name, parameter in lm.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"the policy's {name} is {parameter.dtype}, but weights are trained in float32: load it with "
                "dtype=torch.float32 (rl.precision=bf16 computes in bf16 all the same)"
            )


def encode_prompts(tokenizer: Any, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        UserError: no tokenizer or none with an end-of-sequence token, no prompt, or an empty one.
    """
    if tokenizer is None:
        raise UserError("TokenPPOTrainer needs the policy's tokenizer: TokenPPOTrainer(..., tokenizer=tokenizer)")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a response could never end: set eos_token")
    if not prompts:
        raise UserError("there is no prompt to roll out from")
    encoded = [tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    for index, ids in enumerate(encoded):
        if not ids:
            raise UserError(f"prompt {index} ({prompts[index]!r}) is empty: give it at least one token")
    return encoded


def set_attention(lm: Any, config: RL, longest: int) -> None:
    """Set `config.attention` on a model whose longest sequence (prompt and response) has this many tokens."""
    chosen = config.attention
    if chosen == "auto":
        chosen = "eager" if lm.device.type == "cpu" and longest <= EAGER_TOKENS else "sdpa"
    lm.set_attn_implementation(chosen)


def make_optimizer(policy: PolicyWithValue, config: RL) -> torch.optim.Optimizer:
    """AdamW over what is trained; `full_lr` of a group is its learning rate after warm-up."""
    groups = [
        (list(policy.lm.parameters()), config.learning_rate),
        ([] if policy.value_trunk is None else list(policy.value_trunk.parameters()), config.learning_rate),
        (list(policy.value_head.parameters()), config.value_learning_rate),
    ]
    trained = [([p for p in parameters if p.requires_grad], rate) for parameters, rate in groups]
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "full_lr": rate} for parameters, rate in trained if parameters],
        weight_decay=0.0,
        fused=True,
    )
