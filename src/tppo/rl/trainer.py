"""Token-level PPO. One update is `TokenPPOTrainer.step`, and reads like section 3.4 of the paper:

    roll out the old policy -> reward of every token -> minus KL to the reference -> GAE -> whiten -> clipped losses

Three policies, never mixed up: `policy` is being trained, `old` (its log-probabilities at rollout time) is the
denominator of the ratio, `reference` is the frozen SFT model that KL is measured against. The trainer does not
know whether it runs TPPO or PPO: the reward function returns a reward for every token, most of them zero for
sentence-level PPO.

Departures from the paper, beside those of `tppo.rl.rewards`: Eq. 6 writes the advantage of pi_ref; we use GAE of
the old policy, as PPO does. Epsilon, gamma, lambda and the value coefficient are not given; the field's are used.

A rollout: responses of the old policy, as samples for the reward function and as padded tensors.

What is checked and made once, before the first update: settings, prompts, optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tppo.core.common import UserError, rng, stream_seed
from tppo.core.config import RL
from tppo.core.device import resolved
from tppo.core.models import load_policy
from tppo.generate.engine import generate
from tppo.rl import guards
from tppo.rl.guards import KeptPolicies
from tppo.rl.losses import kl_estimate, next_kl_coef, policy_loss, value_loss
from tppo.rl.policy import (
    PolicyOutput,
    PolicyWithValue,
    ProbeState,
    TokenBatch,
    ValueProbe,
    copy_weights,
    pad_batch,
    reference_copy,
    reference_logprobs,
    require_float32,
    rollout_copy,
    set_attention,
    with_adapters,
)
from tppo.rl.reward_function import RewardFunction, Sample, TokenRewards, make_sample, score
from tppo.rl.rewards import gae, length_penalty_rewards, masked_mean, whiten

Minibatch = tuple[Tensor, ...]
"""The micro-batches of an optimiser step: rows of the rollout, each (B_micro,)."""


class Experience(NamedTuple):
    """A scored rollout; tensors are (B, T) float32."""

    rollout: Rollout
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        rollout = Rollout([self.rollout.samples[i] for i in index.tolist()], self.rollout.batch.rows(index))
        return Experience(rollout, *(tensor[index] for tensor in self[1:]))


@dataclass
class StepResult:
    """An update's metrics, and the rollout they come from."""

    metrics: dict[str, float]
    rollout: Rollout
    rewards: TokenRewards


class TokenPPOTrainer:
    """PPO over token-level rewards, for any causal language model and any reward function.

    Args:
        policy: a causal language model of transformers with float32 weights, trained in place; or the folder (or name)
            of one, which brings its tokenizer. The reference and the copy that samples are made from it.
        reward_fn: rewards of a rollout: list of samples in, list of floats (or one float) per sample out; see
            `tppo.rl.reward_function`.
        prompts: every training prompt, as text or as token ids.
        config: settings; those about query rewards (`algorithm`, `reward_values` and so on) are not read here.
        tokenizer: the policy's, when `policy` is a model.
        max_response_tokens: limit of a response, end-of-sequence included.
        seed: prompts, rollouts and minibatches of update u depend on (seed, u) only, so any update can be redone.

    Raises:
        UserError: settings that do not fit together, an empty prompt, weights that are not float32.
    """

    def __init__(
        self,
        policy: Any,
        reward_fn: RewardFunction,
        prompts: Sequence[str | list[int]],
        config: RL | None = None,
        *,
        tokenizer: Any = None,
        max_response_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        config = config or RL()
        self.config = config = replace(config, precision=resolved(config.precision))
        check_config(config, max_response_tokens)
        if isinstance(policy, str | Path):
            policy, tokenizer = load_policy(policy)
        require_float32(policy)
        self.tokenizer = tokenizer
        self.prompts = encode_prompts(tokenizer, prompts)
        set_attention(policy, config, max(map(len, self.prompts)) + max_response_tokens)
        self.rollout_model = rollout_copy(policy, config)
        self.reference = None if config.tuning == "lora" else reference_copy(policy, config)
        lm = with_adapters(policy, config, seed) if config.tuning == "lora" else policy
        # Dropout would make the first ratio differ from 1: the policy is trained in eval mode.
        self.policy = PolicyWithValue(lm, config.value_function).eval()
        self.reward_fn = reward_fn
        self.max_response_tokens = max_response_tokens
        self.seed = seed
        self.update = 0
        self.kl_coef = config.kl_coef
        self.kept = KeptPolicies(config.best_metric, config.max_kl)
        self.optimizer = make_optimizer(self.policy, config)

    def step(self) -> StepResult:
        """One update: rollout, rewards, advantages, `ppo_epochs` passes of clipped losses.

        Raises:
            UserError: what the reward function returned does not fit the samples.
            GuardError: a number that is none, a rollout from another distribution, or no memory. Weights and
                optimizer are then as before the call, and the call may be made again.
            MaxKLExceeded: the same, when the rollout's KL is above `max_kl`.
        """
        start = time.perf_counter()
        with guards.out_of_memory_named(self.config, "rollout"):
            rollout = self._roll_out()
        rolled_out = time.perf_counter()
        with guards.out_of_memory_named(self.config, "scoring"):
            rewards = self._reward(rollout)
            rewarded = time.perf_counter()
            minibatches = self._minibatches()
            experience, probe, metrics = self._experience(rollout, rewards.rewards, minibatches)
        metrics |= rewards.metrics
        if self.config.max_kl and metrics["kl"] > self.config.max_kl:
            raise guards.MaxKLExceeded(self.update + 1, metrics["kl"], self.config.max_kl)
        self.kept.see(self.update, metrics, self.rollout_model)
        scored = time.perf_counter()
        with guards.out_of_memory_named(self.config, "update"):
            metrics |= self._optimize(experience, minibatches)
        done = time.perf_counter()
        if probe is not None:
            assert isinstance(self.policy.value_head, ValueProbe)
            self.policy.value_head.accept(probe)
        self.kl_coef = next_kl_coef(
            self.kl_coef, metrics["kl"], self.config.kl_target, self.config.kl_horizon, self.config.batch_size
        )
        self.update += 1
        metrics |= {
            "seconds": done - start,
            "seconds_rollout": rolled_out - start,
            "seconds_score": scored - rolled_out,
            "seconds_reward": rewarded - rolled_out,
            "seconds_update": done - scored,
            "tokens_per_second": rollout.batch.response_mask.sum().item() / (done - start),
        }
        return StepResult({"update": self.update, **metrics}, rollout, rewards)

    def policy_to_save(self, halted: bool = False) -> tuple[Any, int]:
        """The language model the run ends with, in the rollout's precision and LoRA merged, and its number of updates.

        The best by `best_metric` if that is set; else, `halted` by max_kl, that of the last rollout within the
        limit; else the policy as it is. The returned model is the sampling copy, overwritten by the next step.
        """
        kept = self.kept.best or (self.kept.last_good if halted else None)
        if kept is None:
            copy_weights(self.policy.lm, self.rollout_model)
            return self.rollout_model, self.update
        kept.copy_to(self.rollout_model)
        return self.rollout_model, kept.update

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

    def _roll_out(self) -> Rollout:
        copy_weights(self.policy.lm, self.rollout_model)
        # Prompts of like length side by side, so that a micro-batch has little padding to compute.
        prompt_index = sorted(self.prompt_index(self.update), key=lambda i: len(self.prompts[i]))
        return roll_out(
            self.rollout_model,
            self.tokenizer,
            self.prompts,
            prompt_index,
            max_new_tokens=self.max_response_tokens,
            temperature=self.config.temperature,
            seed=stream_seed(self.seed, "rollout", self.update),
        )

    def _reward(self, rollout: Rollout) -> TokenRewards:
        """The reward function's rewards and the penalties for length, (B, T)."""
        mask_BT = rollout.batch.response_mask
        rewards = score(self.reward_fn, rollout.samples, mask_BT)
        self._check("reward", rewards.rewards, rollout)
        finished_B = torch.tensor([sample.finished for sample in rollout.samples])
        penalties_BT = length_penalty_rewards(self.config, mask_BT, finished_B, self.max_response_tokens)
        assert not rewards.rewards[~mask_BT].any(), "a reward outside the response"
        return rewards._replace(rewards=rewards.rewards + penalties_BT)

    @torch.no_grad()
    def _experience(
        self, rollout: Rollout, rewards_BT: Tensor, minibatches: Sequence[Minibatch]
    ) -> tuple[Experience, ProbeState | None, dict[str, float]]:
        """Log-probabilities of old and reference, KL into the rewards, GAE.

        Returns the experience, the value probe as this rollout would leave it, and the metrics.
        """
        config, mask_BT = self.config, rollout.batch.response_mask
        old, ref_logprobs_BT = self._score_tokens(rollout.batch, minibatches)
        assert old.values is not None
        assert old.entropy is not None
        self._check("log-probability of the policy", old.logprobs, rollout)
        self._check("log-probability of the reference", ref_logprobs_BT, rollout)
        self._check("value", old.values, rollout)
        kl_BT = kl_estimate("k1", old.logprobs, ref_logprobs_BT)
        guards.check_sampling(old.logprobs, old.entropy, kl_BT.sum(-1), mask_BT, config, self.update + 1)

        kl_rewarded_BT = rewards_BT
        if config.kl_placement == "reward":
            kl_rewarded_BT = rewards_BT - self.kl_coef * kl_estimate(config.kl_estimator, old.logprobs, ref_logprobs_BT)
        advantages_BT, returns_BT = gae(kl_rewarded_BT, old.values, mask_BT, config.gamma, config.gae_lambda)
        metrics = _metrics(rewards_BT, kl_BT, old, advantages_BT, returns_BT, mask_BT) | {"kl_coef": self.kl_coef}
        probe = None
        if isinstance(self.policy.value_head, ValueProbe):
            assert old.hidden is not None
            probe = self.policy.value_head.fitted(old.hidden[mask_BT], returns_BT[mask_BT])
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
        self._check("advantage", advantages_BT, rollout)
        return Experience(rollout, old.logprobs, ref_logprobs_BT, old.values, advantages_BT, returns_BT), probe, metrics

    def _score_tokens(self, batch: TokenBatch, minibatches: Sequence[Minibatch]) -> tuple[PolicyOutput, Tensor]:
        """The old policy's output and the reference's log-probabilities, in the micro-batches that are trained on."""
        config = self.config
        parts = [rows for minibatch in minibatches for rows in minibatch]
        old_parts: list[PolicyOutput] = []
        ref_parts: list[Tensor] = []
        for rows in parts:
            part = batch.rows(rows)
            old_parts.append(self.policy(part, config.temperature, config.precision, scoring=True))
            ref_parts.append(reference_logprobs(self.policy.lm, self.reference, part, config))
        as_in_batch = torch.cat(parts).argsort()
        return PolicyOutput.cat(old_parts).rows(as_in_batch), torch.cat(ref_parts)[as_in_batch]

    def _optimize(self, experience: Experience, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """`ppo_epochs` passes over the rollout; means of the loss metrics over the optimiser steps. All or nothing."""
        config = self.config
        warmup = min(1.0, (self.update + 1) / max(1, config.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * warmup
        steps = [minibatches[i] for epoch in range(config.ppo_epochs) for i in self._order(epoch, len(minibatches))]
        # A single step changes nothing before its last check; only a second one needs the way back.
        snapshot = guards.Snapshot(self.policy, self.optimizer) if len(steps) > 1 else None
        totals: dict[str, float] = {}
        try:
            for number, minibatch in enumerate(steps):
                for name, value in self._minibatch_step(experience, minibatch, first=number == 0).items():
                    totals[name] = totals.get(name, 0.0) + value / len(steps)
        except BaseException:
            if snapshot is not None:
                snapshot.restore()
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return totals | {"learning_rate": config.learning_rate * warmup}

    def _minibatches(self) -> list[Minibatch]:
        """The rollout's rows in minibatches, each in micro-batches; drawn once an update, before anything is scored.

        In bf16 a row's log-probabilities depend on the rows and the padding beside it, by up to tenths of a nat. So the
        ratio is 1 where nothing was trained only if the old policy is scored in the micro-batches that are trained on.
        """
        config = self.config
        rows = torch.arange(config.batch_size)
        if config.minibatch_size < config.batch_size:
            rows = torch.from_numpy(rng(self.seed, "minibatch", self.update).permutation(config.batch_size))
        # The rollout's rows are sorted by the length of their prompts: in that order micro-batches have little padding.
        return [part.sort().values.split(config.micro_batch_size) for part in rows.split(config.minibatch_size)]

    def _order(self, epoch: int, count: int) -> list[int]:
        """Order of the minibatches in a pass: as drawn, then shuffled."""
        return (
            list(range(count)) if epoch == 0 else rng(self.seed, "pass", self.update, epoch).permutation(count).tolist()
        )

    def _minibatch_step(self, experience: Experience, minibatch: Minibatch, first: bool) -> dict[str, float]:
        """Gradients accumulated over micro-batches with one global denominator, then one optimiser step."""
        config = self.config
        num_tokens = experience.rollout.batch.response_mask[torch.cat(minibatch)].sum()
        sums: dict[str, float] = {}
        for rows in minibatch:
            part = experience.rows(rows)
            output = self.policy(part.rollout.batch, config.temperature, config.precision)
            self._check("log-probability of the policy", output.logprobs.detach(), part.rollout)
            if first:
                log_ratio_BT = output.logprobs.detach() - part.old_logprobs
                guards.check_first_ratio(
                    log_ratio_BT, part.rollout.batch.response_mask, self.policy, config, self.update + 1
                )
            loss, terms = self._loss(output, part, num_tokens)
            if not loss.isfinite():
                self._name_bad_loss(output, part, num_tokens)
            loss.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        sums["grad_norm"] = self._clip_gradients([experience.rollout.samples[i] for i in torch.cat(minibatch).tolist()])
        if self.update < config.critic_warmup:
            for parameter in self.policy.lm.parameters():
                parameter.grad = None  # the optimizer then passes it over, moments included
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def _clip_gradients(self, samples: Sequence[Sample]) -> float:
        """Clip the policy's gradients and the value function's apart; the norm of the policy's before clipping."""
        in_policy = {id(parameter) for parameter in self.policy.lm.parameters()}
        norms = []
        for inside in (False, True):
            trained = [p for p in self.policy.parameters() if p.grad is not None and (id(p) in in_policy) == inside]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if not norm.isfinite():
                guards.raise_for_gradients(self.policy, self.update + 1, samples)
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, norm)
            norms.append(norm.item())
        return norms[-1]

    def _loss(self, output: PolicyOutput, part: Experience, num_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its terms for the metrics; all sums over tokens divided by `num_tokens`."""
        config, mask_BT = self.config, part.rollout.batch.response_mask
        policy_part = policy_loss(
            output.logprobs,
            part.old_logprobs,
            part.advantages,
            mask_BT,
            config.clip_range,
            num_tokens,
            config.dual_clip,
        )
        log_ratio_BT = output.logprobs.detach() - part.old_logprobs
        terms = {
            "policy_loss": policy_part.loss,
            "clip_fraction": policy_part.clip_fraction,
            "approx_kl": 0.5 * log_ratio_BT.square().sum() / num_tokens,
        }
        loss = policy_part.loss
        if config.kl_placement == "loss":
            kl_BT = kl_estimate(config.kl_estimator, output.logprobs, part.ref_logprobs)
            terms["kl_loss"] = (kl_BT * mask_BT).sum() / num_tokens
            loss = loss + self.kl_coef * terms["kl_loss"]
        if output.values is not None:
            terms["value_loss"] = value_loss(
                output.values, part.old_values, part.returns, mask_BT, config.value_clip_range, num_tokens
            ).loss
            loss = loss + config.value_coef * terms["value_loss"]
        else:
            # The probe is not trained here; the error it made on this rollout is the same figure.
            terms["value_loss"] = 0.5 * ((part.old_values - part.returns).square() * mask_BT).sum() / num_tokens
        return loss, terms | {"loss": loss.detach()}

    def _name_bad_loss(self, output: PolicyOutput, part: Experience, num_tokens: Tensor) -> None:
        """Raise GuardError for the first sample whose own loss is no number."""
        losses = [
            self._loss(output.rows(index), part.rows(index), num_tokens)[0].item()
            for index in torch.arange(len(part.rollout.samples)).split(1)
        ]
        self._check("loss", torch.tensor(losses)[:, None], part.rollout)
        raise guards.GuardError(f"the loss of update {self.update + 1} is infinite in sum; the weights are unchanged")

    def _check(self, name: str, tensor: Tensor, rollout: Rollout) -> None:
        guards.check_finite(name, tensor, self.update + 1, rollout.samples)


@torch.no_grad()
def _metrics(
    rewards_BT: Tensor,
    kl_BT: Tensor,
    old: PolicyOutput,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
) -> dict[str, float]:
    """What is said of a rollout before the update; KL in nats per response, the rest per token or response."""
    assert old.values is not None
    assert old.entropy is not None
    reward_B = rewards_BT.sum(-1)
    residual = (returns_BT - old.values)[mask_BT]
    return {
        "reward_mean": reward_B.mean().item(),
        "reward_std": reward_B.std().item(),
        "token_reward_mean": masked_mean(rewards_BT, mask_BT).item(),
        "kl": kl_BT.sum(-1).mean().item(),
        "entropy": masked_mean(old.entropy, mask_BT).item(),
        "response_length": mask_BT.sum(-1).float().mean().item(),
        "value_mean": masked_mean(old.values, mask_BT).item(),
        "advantage_std": advantages_BT[mask_BT].std().item(),
        "explained_variance": (1 - residual.var() / returns_BT[mask_BT].var().clamp(min=1e-8)).item(),
    }


@dataclass(frozen=True)
class Rollout:
    """Responses to a batch of prompts: what a reward function sees, and what the model sees."""

    samples: list[Sample]
    batch: TokenBatch


def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Rollout:
    """Sample one response to each prompt from exactly softmax(logits / temperature)."""
    chosen = [prompts[i] for i in prompt_index]
    generations = generate(
        model,
        tokenizer,
        chosen,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=len(chosen),
    )
    samples = [make_sample(tokenizer, *pair) for pair in zip(generations, prompt_index, strict=True)]
    return Rollout(samples, pad_batch(samples, tokenizer.eos_token_id))


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
