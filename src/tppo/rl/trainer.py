"""Token-level PPO. One update is `TokenPPOTrainer.step`, and reads like section 3.4 of the paper:

    roll out the old policy -> reward of every token -> minus KL to the reference -> GAE -> whiten -> clipped losses

Three policies, never mixed up: `policy` is being trained, `old` (its log-probabilities at rollout time) is the
denominator of the ratio, `reference` is the frozen SFT model that KL is measured against. The trainer does not
know whether it runs TPPO or PPO: the reward function returns a reward for every token, most of them zero for
sentence-level PPO.

Departures from the paper, each forced by a gap or a trap in it; a setting in brackets restores or turns it.

1. What a token is worth is centred on the share of relevant tokens, not 1 and 2 (`reward_values`).
2. It is the expected value over the classes, not the most likely class's (`reward_estimator`).
3. The length-weighted penalty shrinks positive rewards only (`length_penalty_on`).
4. Positive rewards are weighted with the share of the asked queries that a response holds (`format_weight`), and what
   is missing or cannot be read costs (`bad_format_reward`, `missing_query_reward`).
5. PPO's one reward is scaled so that its best return is as large as TPPO's (`returns`).
6. A query that is not new may be paid as irrelevant (`repeats_irrelevant`, off by default).
7. Eq. 6-7 write pi_ref for the policy that sampled the rollout: here it is `old`, in the ratio and in the advantage.
8. The advantage is GAE of the old policy, whitened over the rollout's tokens, as in PPO (`whiten_advantages`).
9. KL to the reference enters the reward of every token, the field's usual place (`kl_placement`, `kl_estimator`).
10. The value function, of which the paper only says that there is one, is a `ValueProbe` (`value_function`).
11. Epsilon, gamma, lambda, the value coefficient and the temperature are not given: the field's are used.

The reasons for 1-5 are in `tppo.rl.rewards`, for 6 in `tppo.rl.stage`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo.core.causal import check_family
from tppo.core.common import UserError, rng, stream_seed
from tppo.core.config import RL
from tppo.core.device import resolved
from tppo.core.models import check_positions, check_vocabulary, load_policy, refuse_adapters, sampling_config
from tppo.generate.engine import generate
from tppo.rl import guards
from tppo.rl.guards import KeptPolicy, Prompt
from tppo.rl.losses import kl_estimate, next_kl_coef, policy_loss, value_loss
from tppo.rl.policy import (
    PolicyOutput,
    PolicyWithValue,
    TokenBatch,
    ValueProbe,
    copy_weights,
    make_policies,
    pad_batch,
    reference_logprobs,
)
from tppo.rl.reward_function import RewardFunction, Sample, TokenRewards, make_sample, score
from tppo.rl.rewards import gae, length_penalty_rewards, masked_mean, whiten

Minibatch = tuple[Tensor, ...]
"""The micro-batches of an optimiser step: rows of the rollout, each (B_micro,)."""


OUR_METRICS = frozenset(
    {
        *("update", "reward_mean", "reward_std", "token_reward_mean", "kl", "kl_coef", "entropy", "response_length"),
        *("value_mean", "advantage_std", "explained_variance", "policy_loss", "value_loss", "kl_loss", "loss"),
        *("clip_fraction", "approx_kl", "grad_norm", "learning_rate", "tokens_per_second"),
        *("seconds", "seconds_rollout", "seconds_score", "seconds_reward", "seconds_update"),
    }
)
"""Metrics of an update that no reward function may return: one of two numbers of a name would be lost."""


class Rollout(NamedTuple):
    """Responses to a batch of prompts: what a reward function sees, and what the model sees."""

    samples: list[Sample]
    batch: TokenBatch


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

    >>> from tppo.core.config import Scratch
    >>> from tppo.tune.scratch import llama_config, make_policy, train_tokenizer
    >>> tokenizer = train_tokenizer(["red shoes", "blue hat"], 300)
    >>> policy = make_policy(llama_config(Scratch(layers=1), len(tokenizer), 64), seed=0)
    >>> def short_is_good(samples):
    ...     return [[-0.1] * len(sample.response_ids) for sample in samples]
    >>> config = RL(batch_size=4, minibatch_size=4, micro_batch_size=4)
    >>> trainer = TokenPPOTrainer(policy, short_is_good, ["red"], config, tokenizer=tokenizer, max_response_tokens=8)
    >>> trainer.step().metrics["update"]
    1

    Args:
        policy: a causal language model of transformers with float32 weights, trained in place; or the folder (or name)
            of one, which brings its tokenizer. The reference and the copy that samples are made from it.
        reward_fn: rewards of a rollout: list of samples in, list of floats (or one float) per sample out; see
            `tppo.rl.reward_function`.
        prompts: every training prompt, as text, which is begun as the tokenizer begins a text and holds no control
            token, or as token ids (what `apply_chat_template` returns, for a chat).
        config: settings; those about query rewards (`algorithm`, `reward_values` and so on) are not read here.
        tokenizer: the policy's, when `policy` is a model.
        max_response_tokens: limit of a response, end-of-sequence included.
        seed: prompts, rollouts and minibatches of update u depend on (seed, u) only, so any update can be redone.

    Raises:
        UserError: settings that do not fit together, a tokenizer with more tokens than the policy has embeddings, an
            empty prompt, one that is no text and no token ids of the policy, that the tokenizer does not bring back or
            that is too long for the policy, weights that are not float32, adapters, a model of a family that cannot be
            sampled and trained.
    """

    def __init__(
        self,
        policy: Any,
        reward_fn: RewardFunction,
        prompts: Sequence[Prompt],
        config: RL | None = None,
        *,
        tokenizer: Any = None,
        max_response_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        config = config or RL()
        self.config = config = replace(config, precision=resolved(config.precision))
        guards.check_config(config, max_response_tokens)
        if isinstance(policy, str | Path):
            policy, tokenizer = load_policy(policy)
        else:
            refuse_adapters(policy, "the policy")
            check_family(policy, "the policy")
        self.tokenizer = tokenizer
        guards.check_tokenizer(tokenizer)
        check_vocabulary(policy, tokenizer, "the tokenizer", "take the one the model was trained with")
        self.prompts = guards.encode_prompts(tokenizer, prompts, policy.get_input_embeddings().weight.shape[0])
        longest_prompt = max(map(len, self.prompts))
        limits = f"the longest prompt's {longest_prompt} tokens and max_response_tokens"
        check_positions(policy.config, longest_prompt, max_response_tokens, limits, policy.config.name_or_path)
        longest = longest_prompt + max_response_tokens
        self.policy, self.rollout_model, self.reference = make_policies(policy, config, longest, seed)
        self.probe = self.policy.value_head if isinstance(self.policy.value_head, ValueProbe) else None
        self.reward_fn = reward_fn
        self.max_response_tokens = max_response_tokens
        self.seed = seed
        self.update = 0
        self.kl_coef = config.kl_coef
        self.kept: dict[str, KeptPolicy] = {}
        self.optimizer = make_optimizer(self.policy, config)

    def step(self) -> StepResult:
        """One update: rollout, rewards, advantages, `ppo_epochs` passes of clipped losses.

        Raises:
            UserError: what the reward function returned does not fit the samples.
            GuardError: a number that is none, a rollout from another distribution, or no memory. Weights and
                optimizer are then as before the call, and the call may be made again.
            MaxKLExceeded: the same, when the rollout's KL is above `max_kl`.
        """
        config, seconds = self.config, dict[str, float]()
        with guards.phase("rollout", config, seconds):
            rollout = self._roll_out()
        with guards.phase("scoring", config, seconds):
            mask_BT = rollout.batch.response_mask
            # The reward of every token, and every token's log-probability under the old policy and the reference.
            rewards = self._reward(rollout)
            minibatches = self._minibatches()
            old, ref_logprobs_BT = self._score_tokens(rollout, minibatches)
            # Minus KL, then GAE.
            rewards_BT = rewards.rewards
            if config.kl_placement == "reward":
                kl_BT = kl_estimate(config.kl_estimator, old.logprobs, ref_logprobs_BT)
                rewards_BT = rewards_BT - self.kl_coef * kl_BT
            advantages_BT, returns_BT = gae(rewards_BT, old.values, mask_BT, config.gamma, config.gae_lambda)
            experience = Experience(rollout, old.logprobs, ref_logprobs_BT, old.values, advantages_BT, returns_BT)
            # Before anything is trained: what the rollout says of the old policy, and the fit of its values.
            metrics = rollout_metrics(rewards.rewards, old.entropy, experience)
            metrics |= {"kl_coef": self.kl_coef} | rewards.metrics
            if self.probe is not None:
                next_probe = self.probe.fitted(old.hidden[mask_BT], returns_BT[mask_BT])
            if config.whiten_advantages:
                experience = experience._replace(advantages=whiten(advantages_BT, mask_BT))
            self._check("advantage", experience.advantages, rollout.samples)
            if config.max_kl and metrics["kl"] > config.max_kl:
                raise guards.MaxKLExceeded(self.update + 1, metrics["kl"], config.max_kl)
            guards.keep_policy(self.kept, config, self.update, metrics, self.rollout_model)
        # Eq. 6-7: clipped losses.
        with guards.phase("update", config, seconds):
            metrics |= self._optimize(experience, minibatches)
        if self.probe is not None:
            self.probe.load_state_dict(next_probe)
        self.kl_coef = next_kl_coef(self.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, config.batch_size)
        self.update += 1
        metrics |= zip(("seconds_rollout", "seconds_score", "seconds_update"), seconds.values(), strict=True)
        metrics |= {"seconds": sum(seconds.values())}
        metrics |= {"tokens_per_second": mask_BT.sum().item() / metrics["seconds"]}
        number = {"update": self.update}  # the first column, which nothing overwrites
        return StepResult(number | metrics | number, rollout, rewards)

    def policy_to_save(self, halted: bool = False) -> tuple[Any, int]:
        """The language model the run ends with, in the rollout's precision and LoRA merged, and its number of updates.

        The best by `best_metric` if that is set; else, `halted` by max_kl, that of the last rollout within the
        limit; else the policy as it is. The returned model is the sampling copy, overwritten by the next step. Its
        `generation_config` samples as the rollouts did, whatever the start model's was.
        """
        self.rollout_model.generation_config = sampling_config(
            self.rollout_model, self.tokenizer, self.config.temperature, self.max_response_tokens
        )
        kept = self.kept.get("best") or (self.kept.get("last_good") if halted else None)
        if kept is None:
            copy_weights(self.policy.lm, self.rollout_model)
            return self.rollout_model, self.update
        self.rollout_model.load_state_dict(kept.weights, strict=False)  # tied weights are named once
        return self.rollout_model, kept.update

    def prompt_index(self, update: int) -> list[int]:
        """Prompts of an update: consecutive slices of one seeded permutation after another."""
        size, total = self.config.batch_size, len(self.prompts)
        first, end = update * size, (update + 1) * size
        epochs = range(first // total, (end - 1) // total + 1)
        order = np.concatenate([rng(self.seed, "prompts", epoch).permutation(total) for epoch in epochs])
        return order[first - epochs[0] * total :][:size].tolist()

    def _roll_out(self) -> Rollout:
        """One response to each prompt of the update, from exactly softmax(logits / temperature)."""
        copy_weights(self.policy.lm, self.rollout_model)
        # Prompts of like length side by side, so that a micro-batch has little padding to compute.
        prompt_index = sorted(self.prompt_index(self.update), key=lambda i: len(self.prompts[i]))
        generations = generate(
            self.rollout_model,
            self.tokenizer,
            [self.prompts[i] for i in prompt_index],
            max_new_tokens=self.max_response_tokens,
            temperature=self.config.temperature,
            seed=stream_seed(self.seed, "rollout", self.update),
            batch_size=len(prompt_index),
        )
        samples = [make_sample(self.tokenizer, *pair) for pair in zip(generations, prompt_index, strict=True)]
        return Rollout(samples, pad_batch(samples, self.tokenizer.eos_token_id))

    def _reward(self, rollout: Rollout) -> TokenRewards:
        """The reward function's rewards and the penalties for length, (B, T)."""
        start, mask_BT = time.perf_counter(), rollout.batch.response_mask
        rewards = score(self.reward_fn, rollout.samples, mask_BT)
        if taken := OUR_METRICS & rewards.metrics.keys():
            raise UserError(f"reward_fn returned metrics with names that are ours, {sorted(taken)}: rename them")
        self._check("reward", rewards.rewards, rollout.samples)
        assert not rewards.rewards[~mask_BT].any(), "a reward outside the response"
        finished_B = torch.tensor([sample.finished for sample in rollout.samples], device=mask_BT.device)
        penalties_BT = length_penalty_rewards(self.config, mask_BT, finished_B, self.max_response_tokens)
        metrics = rewards.metrics | {"seconds_reward": time.perf_counter() - start}
        return TokenRewards(rewards.rewards + penalties_BT, metrics, rewards.classes)

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

    @torch.no_grad()
    def _score_tokens(self, rollout: Rollout, minibatches: Sequence[Minibatch]) -> tuple[PolicyOutput, Tensor]:
        """The old policy's output and the reference's log-probabilities, in the micro-batches that are trained on.

        Checked: all are finite, and the rollout was drawn from the old policy.
        """
        temperature, precision = self.config.temperature, self.config.precision
        rows = [rows for minibatch in minibatches for rows in minibatch]
        parts = [rollout.batch.rows(index) for index in rows]
        as_in_rollout = torch.cat(rows).argsort()
        outputs = [self.policy(part, temperature, precision, scoring=True) for part in parts]
        old = PolicyOutput(*(torch.cat(tensors)[as_in_rollout] for tensors in zip(*outputs, strict=True)))
        ref_logprobs = [reference_logprobs(self.policy.lm, self.reference, p, temperature, precision) for p in parts]
        ref_logprobs_BT = torch.cat(ref_logprobs)[as_in_rollout]
        self._check("log-probability of the policy", old.logprobs, rollout.samples)
        self._check("log-probability of the reference", ref_logprobs_BT, rollout.samples)
        self._check("value", old.values, rollout.samples)
        kl_B = kl_estimate("k1", old.logprobs, ref_logprobs_BT).sum(-1)
        mask_BT = rollout.batch.response_mask
        guards.check_sampling(old.logprobs, old.entropy, kl_B, mask_BT, temperature, self.update + 1)
        return old, ref_logprobs_BT

    def _optimize(self, experience: Experience, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """`ppo_epochs` passes over the rollout; means of the loss metrics over the optimiser steps."""
        config = self.config
        warmup = min(1.0, (self.update + 1) / max(1, config.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * warmup
        steps = [minibatches[i] for epoch in range(config.ppo_epochs) for i in self._order(epoch, len(minibatches))]
        totals: dict[str, float] = {}
        with guards.all_or_nothing(self.policy, self.optimizer, len(steps)):
            for number, minibatch in enumerate(steps):
                for name, value in self._minibatch_step(experience, minibatch, first=number == 0).items():
                    totals[name] = totals.get(name, 0.0) + value / len(steps)
        return totals | {"learning_rate": config.learning_rate * warmup}

    def _order(self, epoch: int, count: int) -> list[int]:
        """Order of the minibatches in a pass: as drawn, then shuffled."""
        if epoch == 0:
            return list(range(count))
        return rng(self.seed, "pass", self.update, epoch).permutation(count).tolist()

    def _minibatch_step(self, experience: Experience, minibatch: Minibatch, first: bool) -> dict[str, float]:
        """Gradients accumulated over micro-batches with one global denominator, then one optimiser step."""
        config = self.config
        num_tokens = experience.rollout.batch.response_mask[torch.cat(minibatch)].sum()
        sums: dict[str, float] = {}
        for rows in minibatch:
            part = experience.rows(rows)
            output = self.policy(part.rollout.batch, config.temperature, config.precision)
            self._check("log-probability of the policy", output.logprobs.detach(), part.rollout.samples)
            if first:
                log_ratio_BT, mask_BT = output.logprobs.detach() - part.old_logprobs, part.rollout.batch.response_mask
                guards.check_first_ratio(log_ratio_BT, mask_BT, self.policy, config, self.update + 1)
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

    def _loss(self, output: PolicyOutput, part: Experience, num_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its terms for the metrics; all sums over tokens divided by `num_tokens`."""
        config, mask_BT = self.config, part.rollout.batch.response_mask
        loss, clip_fraction = policy_loss(
            output.logprobs,
            part.old_logprobs,
            part.advantages,
            mask_BT,
            config.clip_range,
            num_tokens,
            config.dual_clip,
        )
        log_ratio_BT = output.logprobs.detach() - part.old_logprobs
        approx_kl = 0.5 * log_ratio_BT.square().sum() / num_tokens
        terms = {"policy_loss": loss, "clip_fraction": clip_fraction, "approx_kl": approx_kl}
        if config.kl_placement == "loss":
            kl_BT = kl_estimate(config.kl_estimator, output.logprobs, part.ref_logprobs)
            terms["kl_loss"] = (kl_BT * mask_BT).sum() / num_tokens
            loss = loss + self.kl_coef * terms["kl_loss"]
        # A probe is not trained here; the error it made on this rollout is the same figure.
        values_BT = output.values if self.probe is None else part.old_values
        terms["value_loss"] = value_loss(
            values_BT, part.old_values, part.returns, mask_BT, config.value_clip_range, num_tokens
        ).loss
        if self.probe is None:
            loss = loss + config.value_coef * terms["value_loss"]
        return loss, terms | {"loss": loss.detach()}

    def _name_bad_loss(self, output: PolicyOutput, part: Experience, num_tokens: Tensor) -> None:
        """Raise GuardError for the first sample whose own loss is no number."""
        rows = torch.arange(len(part.rollout.samples)).split(1)
        losses = [self._loss(output.rows(index), part.rows(index), num_tokens)[0].detach() for index in rows]
        self._check("loss", torch.stack(losses)[:, None], part.rollout.samples)
        raise guards.GuardError(f"the loss of update {self.update + 1} is infinite in sum; the weights are unchanged")

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

    def _check(self, name: str, tensor: Tensor, samples: Sequence[Sample]) -> None:
        guards.check_finite(name, tensor, self.update + 1, samples)


def rollout_metrics(rewards_BT: Tensor, entropy_BT: Tensor, experience: Experience) -> dict[str, float]:
    """What is said of a rollout before the update; KL (k1) in nats per response, the rest per token or response."""
    rollout, old_logprobs_BT, ref_logprobs_BT, values_BT, advantages_BT, returns_BT = experience
    mask_BT, reward_B = rollout.batch.response_mask, rewards_BT.sum(-1)
    residual_N = (returns_BT - values_BT)[mask_BT]
    return {
        "reward_mean": reward_B.mean().item(),
        "reward_std": reward_B.std().item(),
        "token_reward_mean": masked_mean(rewards_BT, mask_BT).item(),
        "kl": kl_estimate("k1", old_logprobs_BT, ref_logprobs_BT).sum(-1).mean().item(),
        "entropy": masked_mean(entropy_BT, mask_BT).item(),
        "response_length": mask_BT.sum(-1).float().mean().item(),
        "value_mean": masked_mean(values_BT, mask_BT).item(),
        "advantage_std": advantages_BT[mask_BT].std().item(),
        "explained_variance": (1 - residual_N.var() / returns_BT[mask_BT].var().clamp(min=1e-8)).item(),
    }


def make_optimizer(policy: PolicyWithValue, config: RL) -> torch.optim.Optimizer:
    """AdamW over what is trained; `full_lr` of a group is its learning rate after warm-up."""
    groups = [
        (policy.lm, config.learning_rate),
        (policy.value_trunk, config.learning_rate),
        (policy.value_head, config.value_learning_rate),
    ]
    trained = [([p for p in m.parameters() if p.requires_grad], rate) for m, rate in groups if m is not None]
    param_groups = [{"params": parameters, "lr": rate, "full_lr": rate} for parameters, rate in trained if parameters]
    return torch.optim.AdamW(param_groups, weight_decay=0.0, fused=True)
