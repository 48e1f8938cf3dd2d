"""What stops a run before its first update (settings, prompts) and what stops an update: numbers that are none,
samples from another distribution, memory, too much KL.

Every check of an update raises `GuardError`, which leaves weights and optimizer state as they were before the update
and names the tensor or setting, the update and the sample. What a halted run ends with is kept here, too.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from tppo.core.common import UserError
from tppo.core.config import RL
from tppo.core.device import resolved
from tppo.core.encode import brings_back, encode_text, start_ids
from tppo.rl.policy import PolicyWithValue, load_training_state, training_state
from tppo.rl.reward_function import Sample, name_sample

RATIO_TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 5e-2)}
"""Mean and largest |log ratio| of a micro-batch of the first minibatch that are rounding and not a bug. The mean tells
a small fault of every token from the rounding of a rare one."""
_SIGMAS = 6.0
"""Standard errors that still count as noise: a false alarm about once in a billion rollouts."""
_MIN_RESPONSES = 8
"""A standard error over fewer responses says too little to stop a run."""
_ROUNDING = 0.02
"""Nats by which a bf16 rollout copy may differ from the policy, per token or per response."""
_WAY_OUT = "A smaller rl.learning_rate or rl.precision=fp32 may keep it finite; the last checkpoint is whole"


Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or the `BatchEncoding` that holds them."""


class GuardError(UserError):
    """The update was not made."""


class MaxKLExceeded(Exception):
    """The rollout's KL is above `max_kl`; the update was not made."""

    def __init__(self, update: int, kl: float, limit: float) -> None:
        super().__init__(
            f"halted before update {update}: the rollout's KL to the reference is {kl:.3g} nats per response, above "
            f"rl.max_kl={limit:g}. A larger rl.kl_coef or a smaller rl.learning_rate holds the policy closer"
        )
        self.facts = {"before_update": update, "kl": kl, "max_kl": limit}


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
    limit: Any = max_response_tokens  # from anybody's Python
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UserError(f"max_response_tokens={limit!r} must be a whole number (int) of at least 1")
    buffer_fits = not config.overlong_penalty or 0 < config.overlong_buffer < max_response_tokens
    for fits, setting, must_be in (
        (config.batch_size >= 2, "batch_size", "at least 2: advantages are compared"),
        (config.temperature > 0, "temperature", "above 0: greedy rollouts have no gradient"),
        (config.kl_placement != "loss" or config.kl_estimator != "k1", "kl_estimator", "k2 or k3 in the loss"),
        (not config.dual_clip or config.dual_clip > 1, "dual_clip", "above 1, or 0 (off)"),
        (config.updates >= 1, "updates", "at least 1"),
        (config.save_every >= 1, "save_every", "at least 1"),
        (config.keep_checkpoints >= 1, "keep_checkpoints", "at least 1"),
        (buffer_fits, "overlong_buffer", f"between 1 and {max_response_tokens - 1}, the response limit less 1"),
        (config.max_kl >= 0, "max_kl", "0 (off) or more"),
        (config.kl_target >= 0, "kl_target", "0 (off) or more"),
    ):
        if not fits:
            raise UserError(f"rl.{setting}={getattr(config, setting)} must be {must_be}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UserError when there is no tokenizer, or none with an end-of-sequence token."""
    if tokenizer is None:
        raise UserError("TokenPPOTrainer needs the policy's tokenizer: TokenPPOTrainer(..., tokenizer=tokenizer)")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a response could never end: set eos_token")


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], embeddings: int) -> list[list[int]]:
    """Token ids of every prompt. Text begins as the tokenizer begins a text (BOS, where it adds one), does not end as
    it ends one, and no part of it becomes a control token: those of a chat template are given as ids.

    Args:
        embeddings: of the model; token ids are below it.

    Raises:
        UserError: no list of prompts, no prompt, an empty one, one that is neither text nor token ids of the model, or
            a text that the tokenizer does not bring back.
    """
    if isinstance(prompts, str | bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {type(prompts).__name__}: give a list with an entry for each prompt")
    encoded = []
    for index, prompt in enumerate(prompts):
        ids = encode_text(tokenizer, prompt) if isinstance(prompt, str) else _token_ids(prompt, index, embeddings)
        if not ids:
            raise UserError(f"prompt {index} ({type(prompt).__name__}) is empty: give it at least one token")
        if isinstance(prompt, str):
            if not brings_back(tokenizer, prompt, ids):
                raise UserError(
                    f"prompt {index} does not come back from the tokenizer: line breaks, spaces or characters are "
                    "lost. Take a tokenizer that keeps them, or give the prompts as token ids"
                )
            ids = [*start_ids(tokenizer), *ids]
        encoded.append(ids)
    if not encoded:
        raise UserError("there is no prompt to roll out from")
    return encoded


def _token_ids(prompt: Any, index: int, embeddings: int) -> list[int]:
    """The ids of a prompt that is no text: any sequence of integers, or a mapping (`BatchEncoding`) with `input_ids`,
    (T,) or, as `return_tensors` makes them, (1, T)."""
    ids: Any = prompt.get("input_ids") if isinstance(prompt, Mapping) else prompt
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(prompt, Mapping) and isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    try:
        if isinstance(ids, bytes | bytearray | Mapping | Set):
            raise TypeError
        ids = list(ids)
        found = [operator.index(token) for token in ids]
        if any(isinstance(token, bool) for token in ids):  # a mask, not ids
            raise TypeError
    except (TypeError, ValueError):
        raise UserError(
            f"prompt {index} ({type(prompt).__name__}) is neither a text nor a list of token ids, which are integers"
        ) from None
    if wrong := [token for token in found if not 0 <= token < embeddings]:
        raise UserError(
            f"prompt {index} holds the token id {wrong[0]}, but those of the policy are 0 to {embeddings - 1}: encode "
            "it with the policy's tokenizer"
        )
    return found


def check_finite(name: str, tensor: Tensor, update: int, samples: Sequence[Sample]) -> None:
    """Every row of `tensor` (B, ...) is finite; else the first sample that is not is named."""
    bad_B = ~tensor.isfinite().flatten(1).all(-1)
    if bad_B.any():
        way_out = "Mend the reward function for this sample" if name == "reward" else _WAY_OUT
        raise GuardError(
            f"NaN or infinity in the {name} of update {update}, {name_sample(samples, int(bad_B.nonzero()[0]))}; "
            f"the weights are unchanged. {way_out}"
        )


def raise_for_gradients(policy: nn.Module, update: int, samples: Sequence[Sample]) -> NoReturn:
    """Their norm is no number: name the first gradient that is at fault, before anything scales or uses them."""
    gradients = [(name, parameter.grad) for name, parameter in policy.named_parameters() if parameter.grad is not None]
    bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
    what = f"NaN or infinity in the gradient of {bad[0]}" if bad else "the norm of the gradients is infinite"
    raise GuardError(
        f"{what}, update {update}, minibatch of {len(samples)} samples from {name_sample(samples, 0)} on; "
        f"the weights are unchanged. {_WAY_OUT}"
    )


def check_first_ratio(
    log_ratio_BT: Tensor, response_mask_BT: Tensor, policy: nn.Module, config: RL, update: int
) -> None:
    """Before any step of an update the policy is the one that was scored: |log ratio| within rounding."""
    size_N = log_ratio_BT[response_mask_BT].abs()
    mean, largest = size_N.mean().item(), size_N.max().item()
    precision = resolved(config.precision)
    mean_tolerance, largest_tolerance = RATIO_TOLERANCE[precision]
    if mean <= mean_tolerance and largest <= largest_tolerance:
        return
    if policy.training:
        cause = "policy.train() was called, so dropout is on: call policy.eval(); the trainer needs no train mode"
    else:
        cause = (
            "the model gives other log-probabilities for the same tokens at the second call: look for noise inside its "
            f"forward pass, or a temperature other than rl.temperature={config.temperature:g} in one of them"
        )
    raise GuardError(
        f"before any step of update {update} the ratio to the old policy must be 1, but |log ratio| is {mean:.3g} on "
        f"average and reaches {largest:.3g} (rounding under rl.precision={precision}: {mean_tolerance:g} and "
        f"{largest_tolerance:g}); {cause}"
    )


def check_sampling(
    logprobs_BT: Tensor, entropy_BT: Tensor, kl_B: Tensor, response_mask_BT: Tensor, temperature: float, update: int
) -> None:
    """The rollout was drawn from the distribution its log-probabilities are taken from.

    For such samples surprise - entropy is a martingale difference, so its mean is 0 within its standard error,
    and the mean KL (k1) is not negative.
    """
    if len(response_mask_BT) < _MIN_RESPONSES:
        return
    excess_N = (-logprobs_BT - entropy_BT)[response_mask_BT]
    count = len(excess_N)
    excess, kl = excess_N.mean().item(), kl_B.mean().item()
    # A nearly certain policy shows no spread until a rare token comes: 10 log(n)/n covers those not seen yet.
    noise = _SIGMAS * excess_N.square().sum().sqrt().item() / count + 10 * math.log(count + 1) / count + _ROUNDING
    kl_noise = _SIGMAS * kl_B.std().item() / math.sqrt(len(kl_B)) + _ROUNDING
    if abs(excess) <= noise and kl >= -kl_noise:
        return
    if excess < 0:
        cause = f"a temperature below rl.temperature={temperature:g}, top-k, top-p or a minimum length"
    else:
        cause = f"a temperature above rl.temperature={temperature:g}, or a sampling copy with other weights"
    raise GuardError(
        f"the responses of update {update} were not drawn from the policy they are scored with: surprise minus entropy "
        f"is {excess:+.3g} nats per token (noise: {noise:.2g}), KL {kl:+.3g} nats per response. Sampling used {cause}"
    )


@contextmanager
def phase(name: str, config: RL, seconds: dict[str, float]) -> Iterator[None]:
    """A phase of an update: its time goes into `seconds`, and running out of memory names the setting to lower."""
    start = time.perf_counter()
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            sign in text for sign in ("not enough memory", "can't allocate memory")
        ):
            raise
        setting = "batch_size" if name == "rollout" else "micro_batch_size"
        raise GuardError(
            f"out of memory in the {name}: lower rl.{setting} (now {getattr(config, setting)}); the weights are "
            f"unchanged ({text.splitlines()[0][:200] if text else 'MemoryError'})"
        ) from error
    seconds[name] = time.perf_counter() - start


@contextmanager
def all_or_nothing(policy: PolicyWithValue, optimizer: torch.optim.Optimizer, num_steps: int) -> Iterator[None]:
    """Take back the optimiser steps of an update that is stopped on the way; no gradient stays behind either way."""
    # A single step changes nothing before its last check; only a second one needs the way back.
    state = training_state(policy, optimizer) if num_steps > 1 else {}
    before = {part: {name: value.clone() for name, value in tensors.items()} for part, tensors in state.items()}
    try:
        yield
    except BaseException:
        if before:
            load_training_state(policy, optimizer, before)
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


class KeptPolicy(NamedTuple):
    """A policy is judged by its own rollout, so what is kept is the copy that sampled it, in its precision."""

    update: int
    """Updates it had."""
    value: float
    """What it was kept for."""
    weights: dict[str, Tensor]


def keep_policy(
    kept: dict[str, KeptPolicy], config: RL, update: int, metrics: dict[str, float], rollout_model: nn.Module
) -> None:
    """Keep what the settings ask for of a policy of `update` updates, whose rollout had these metrics: the newest as
    `last_good` with `max_kl` (the caller shows only those within the limit), the best as `best` with `best_metric`.

    Raises:
        UserError: there is no such metric.
    """

    def keep(name: str, value: float) -> None:
        weights = {name: parameter.detach().clone() for name, parameter in rollout_model.named_parameters()}
        kept[name] = KeptPolicy(update, value, weights)

    if config.max_kl:
        keep("last_good", metrics["kl"])
    if not config.best_metric:
        return
    metric = config.best_metric.removeprefix("-")
    if metric not in metrics:
        raise UserError(f"rl.best_metric={metric!r} is no metric of a rollout: choose of {sorted(metrics)}")
    sign = -1.0 if config.best_metric.startswith("-") else 1.0
    value = metrics[metric]
    if not math.isnan(value) and ("best" not in kept or sign * value > sign * kept["best"].value):
        keep("best", value)
