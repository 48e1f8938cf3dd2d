"""Token-level PPO. One update is `TokenPPOTrainer.step`, and reads like section 3.4 of the paper:

    roll out the old policy -> reward of every token -> minus KL to the reference -> GAE -> whiten -> clipped losses

Three policies, never mixed up: `policy` is being trained, `old` (its log-probabilities at rollout time) is the
denominator of the ratio, `reference` is the frozen SFT model that KL is measured against. The trainer does not
know whether it runs TPPO or PPO: the reward function returns a reward for every token, most of them zero for
sentence-level PPO.

Departures from the paper, beside those of `tppo.rl.rewards`: Eq. 6 writes the advantage of pi_ref; we use GAE of
the old policy, as PPO does. Epsilon, gamma, lambda and the value coefficient are not given; the field's are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tppo.config import RL
from tppo.rl.losses import policy_loss, value_loss
from tppo.rl.policy import (
    PolicyOutput,
    PolicyWithValue,
    TokenBatch,
    autocast,
    copy_weights,
    response_logprobs,
)
from tppo.rl.rewards import gae, kl_k1, masked_mean, whiten
from tppo.rl.rollout import Rollout, roll_out
from tppo.seeding import rng, stream_seed

RATIO_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |log ratio| of the first minibatch that is rounding and not a bug."""


class RewardResult(NamedTuple):
    """What a reward function returns for a rollout."""

    rewards: Tensor
    """(B, T) float32, without KL; 0 outside the response."""
    metrics: dict[str, float]
    """Logged as they are."""
    classes: Tensor | None = None
    """(B, T) most likely class of every token, for display."""


RewardFunction = Callable[[Rollout], RewardResult]


class Experience(NamedTuple):
    """A scored rollout, all (B, T) float32."""

    batch: TokenBatch
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class StepResult:
    """An update's metrics, and the rollout they come from."""

    metrics: dict[str, float]
    rollout: Rollout
    rewards: RewardResult


class TokenPPOTrainer:
    """PPO over token-level rewards.

    Args:
        policy: trained in place, float32 weights.
        reference: frozen language model in the same precision as the policy's (so that KL starts at 0).
        rollout_model: a copy of the policy's language model used to sample, in any precision; overwritten.
        prompts: token ids of every training prompt.
        reward_fn: rewards of a rollout.
        max_response_tokens: limit of a response, end-of-sequence included.
        seed: prompts, rollouts and minibatches of update u depend on (seed, u) only, so any update can be redone.
    """

    def __init__(
        self,
        policy: PolicyWithValue,
        reference: Any,
        rollout_model: Any,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        reward_fn: RewardFunction,
        config: RL,
        *,
        max_response_tokens: int,
        seed: int,
    ) -> None:
        if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batch_size:
            raise ValueError(
                f"rl.batch_size={config.batch_size} must be a multiple of rl.minibatch_size={config.minibatch_size}, "
                f"and that of rl.micro_batch_size={config.micro_batch_size}"
            )
        # Dropout would make the first ratio differ from 1: the policy is trained in eval mode.
        self.policy = policy.eval()
        self.reference = reference.eval().requires_grad_(False)
        self.rollout_model = rollout_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.reward_fn = reward_fn
        self.config = config
        self.max_response_tokens = max_response_tokens
        self.seed = seed
        self.update = 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(policy.lm.parameters()), "lr": config.learning_rate},
                {"params": list(policy.value_head.parameters()), "lr": config.value_learning_rate},
            ],
            weight_decay=0.0,
            fused=True,
        )

    def step(self) -> StepResult:
        """One update: rollout, rewards, advantages, `ppo_epochs` passes of clipped losses."""
        start = time.perf_counter()
        copy_weights(self.policy.lm, self.rollout_model)
        # Prompts of like length side by side, so that a micro-batch has little padding to compute.
        prompt_index = sorted(self.prompt_index(self.update), key=lambda i: len(self.prompts[i]))
        rollout = roll_out(
            self.rollout_model,
            self.tokenizer,
            self.prompts,
            prompt_index,
            max_new_tokens=self.max_response_tokens,
            temperature=self.config.temperature,
            seed=stream_seed(self.seed, "rollout", self.update),
        )
        rolled_out = time.perf_counter()
        rewards = self.reward_fn(rollout)
        self._check_rewards(rewards.rewards, rollout)
        experience, metrics = self._experience(rollout.batch, rewards.rewards)
        scored = time.perf_counter()
        metrics |= self._optimize(experience)
        done = time.perf_counter()
        self.update += 1
        metrics |= rewards.metrics
        metrics |= {
            "seconds": done - start,
            "seconds_rollout": rolled_out - start,
            "seconds_score": scored - rolled_out,
            "seconds_update": done - scored,
        }
        return StepResult({"update": self.update, **metrics}, rollout, rewards)

    def prompt_index(self, update: int) -> list[int]:
        """Prompts of an update: consecutive slices of one seeded permutation after another."""
        size, total = self.config.batch_size, len(self.prompts)
        index: list[int] = []
        for position in range(update * size, (update + 1) * size):
            epoch, place = divmod(position, total)
            if not index or place == 0:
                order = rng(self.seed, "prompts", epoch).permutation(total)
            index.append(int(order[place]))
        return index

    def _check_rewards(self, rewards_BT: Tensor, rollout: Rollout) -> None:
        mask_BT = rollout.batch.response_mask
        if rewards_BT.shape != mask_BT.shape:
            raise ValueError(f"reward_fn returned shape {tuple(rewards_BT.shape)}, expected {tuple(mask_BT.shape)}")
        bad_B = ~rewards_BT.isfinite().all(-1)
        if bad_B.any():
            row = int(bad_B.nonzero()[0])
            raise FloatingPointError(f"reward_fn returned NaN or infinity for sample {row} of update {self.update}")
        assert not rewards_BT[~mask_BT].any(), "a reward outside the response"

    @torch.no_grad()
    def _experience(self, batch: TokenBatch, rewards_BT: Tensor) -> tuple[Experience, dict[str, float]]:
        """Log-probabilities of old and reference, KL into the rewards, GAE. Returns it with its metrics."""
        config, mask_BT = self.config, batch.response_mask
        old_parts: list[PolicyOutput] = []
        ref_parts: list[Tensor] = []
        for rows in _slices(len(mask_BT), config.micro_batch_size):
            old_parts.append(self.policy(batch.rows(rows), config.temperature, config.precision, with_entropy=True))
            with autocast(config.precision):
                ref_parts.append(response_logprobs(self.reference, batch.rows(rows), config.temperature)[0])
        old_logprobs_BT = torch.cat([part.logprobs for part in old_parts])
        old_values_BT = torch.cat([part.values for part in old_parts if part.values is not None])
        entropy_BT = torch.cat([part.entropy for part in old_parts if part.entropy is not None])
        kl_BT = kl_k1(old_logprobs_BT, torch.cat(ref_parts))

        advantages_BT, returns_BT = gae(
            rewards_BT - config.kl_coef * kl_BT, old_values_BT, mask_BT, config.gamma, config.gae_lambda
        )
        residual = (returns_BT - old_values_BT)[mask_BT]
        return_variance = returns_BT[mask_BT].var()
        reward_B = rewards_BT.sum(-1)
        metrics = {
            "reward_mean": reward_B.mean().item(),
            "reward_std": reward_B.std().item(),
            "token_reward_mean": masked_mean(rewards_BT, mask_BT).item(),
            "kl": kl_BT.sum(-1).mean().item(),
            "entropy": masked_mean(entropy_BT, mask_BT).item(),
            "response_length": mask_BT.sum(-1).float().mean().item(),
            "value_mean": masked_mean(old_values_BT, mask_BT).item(),
            "advantage_std": advantages_BT[mask_BT].std().item(),
            "explained_variance": (1 - residual.var() / return_variance.clamp(min=1e-8)).item(),
        }
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
        return Experience(batch, old_logprobs_BT, old_values_BT, advantages_BT, returns_BT), metrics

    def _optimize(self, experience: Experience) -> dict[str, float]:
        """`ppo_epochs` passes over the rollout; means of the loss metrics over the optimiser steps."""
        config = self.config
        warmup = min(1.0, (self.update + 1) / max(1, config.warmup_updates))
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.value_learning_rate), strict=True
        ):
            group["lr"] = rate * warmup
        totals: dict[str, float] = {}
        steps = 0
        for epoch in range(config.ppo_epochs):
            order = torch.arange(config.batch_size)
            if config.minibatch_size < config.batch_size:
                order = torch.from_numpy(rng(self.seed, "minibatch", self.update, epoch).permutation(config.batch_size))
            for minibatch in order.split(config.minibatch_size):
                for name, value in self._minibatch_step(experience, minibatch, first=steps == 0).items():
                    totals[name] = totals.get(name, 0.0) + value
                steps += 1
        return {name: value / steps for name, value in totals.items()} | {
            "learning_rate": config.learning_rate * warmup
        }

    def _minibatch_step(self, experience: Experience, minibatch: Tensor, first: bool) -> dict[str, float]:
        """Gradients accumulated over micro-batches with one global denominator, then one optimiser step."""
        config = self.config
        num_tokens = experience.batch.response_mask[minibatch].sum()
        sums = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}
        self.optimizer.zero_grad(set_to_none=True)
        for rows in minibatch.sort().values.split(config.micro_batch_size):
            batch = experience.batch.rows(rows)
            output = self.policy(batch, config.temperature, config.precision)
            old_logprobs_BT = experience.old_logprobs[rows]
            if first:
                self._check_first_ratio(output.logprobs.detach() - old_logprobs_BT)
            policy_part = policy_loss(
                output.logprobs,
                old_logprobs_BT,
                experience.advantages[rows],
                batch.response_mask,
                config.clip_range,
                num_tokens,
            )
            value_part = value_loss(
                output.values,
                experience.old_values[rows],
                experience.returns[rows],
                batch.response_mask,
                config.value_clip_range,
                num_tokens,
            )
            loss = policy_part.loss + config.value_coef * value_part.loss
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of update {self.update} is {loss.item()}; weights are unchanged")
            loss.backward()
            sums["policy_loss"] += policy_part.loss.item()
            sums["value_loss"] += value_part.loss.item()
            sums["clip_fraction"] += policy_part.clip_fraction.item()
            log_ratio_BT = output.logprobs.detach() - old_logprobs_BT
            sums["approx_kl"] += (0.5 * log_ratio_BT.square().sum() / num_tokens).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.lm.parameters(), config.max_grad_norm)
        torch.nn.utils.clip_grad_norm_(self.policy.value_head.parameters(), config.max_grad_norm)
        if not grad_norm.isfinite():
            raise FloatingPointError(f"the gradient of update {self.update} is {grad_norm}; weights are unchanged")
        self.optimizer.step()
        loss_value = sums["policy_loss"] + config.value_coef * sums["value_loss"]
        return {**sums, "loss": loss_value, "grad_norm": grad_norm.item()}

    def _check_first_ratio(self, log_ratio_BT: Tensor) -> None:
        worst = log_ratio_BT.abs().max().item()
        tolerance = RATIO_TOLERANCE[self.config.precision]
        assert worst <= tolerance, (
            f"before any step the ratio to the old policy must be 1, but |log ratio| reaches {worst:.3g} "
            f"(tolerance {tolerance}): is dropout on, or the temperature not the rollout's?"
        )


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
