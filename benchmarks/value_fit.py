"""How much of the returns different fits of a value probe explain, on the same rollouts of a tiny policy that learns.

    python benchmarks/value_fit.py --hidden 512 --batch 8 --learning_rate 1e-4

Every fit predicts a rollout's Monte-Carlo returns from cached hidden states before it is fitted on them. The reward
is known: one letter pays when the letter before it was another, and repeating the prompt's first letter pays half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.letters import PROMPTS, WORDS, letter_tokenizer
from tppo.core.config import RL, Scratch
from tppo.core.show import Table
from tppo.rl import policy
from tppo.rl.reward_function import Sample
from tppo.rl.trainer import TokenPPOTrainer
from tppo.tune.scratch import llama_config, make_policy

GOOD = 5


class AdamFit:
    """A linear head with some Adam steps a rollout."""

    def __init__(self, hidden: int, learning_rate: float, steps: int) -> None:
        self.head, self.steps = nn.Linear(hidden, 1), steps
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, weight_decay=0.0)

    def predict(self, hidden_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(hidden_ND).squeeze(-1)

    @torch.enable_grad()
    def fit(self, hidden_ND: Tensor, returns_N: Tensor) -> None:
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            (0.5 * (self.head(hidden_ND).squeeze(-1) - returns_N).square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self.optimizer.step()


class ProbeFit:
    """The trainer's probe, with all its candidates or with one."""

    def __init__(self, hidden: int, candidate: int | None = None) -> None:
        self.probe, self.candidate = policy.ValueProbe(hidden), candidate

    def predict(self, hidden_ND: Tensor) -> Tensor:
        if self.candidate is not None:
            self.probe.errors.fill_(1.0)[self.candidate] = 0.0
        return self.probe(hidden_ND)

    def fit(self, hidden_ND: Tensor, returns_N: Tensor) -> None:
        self.probe.load_state_dict(self.probe.fitted(hidden_ND, returns_N))


def known_reward(samples: list[Sample]) -> list[list[float]]:
    rewards = []
    for sample in samples:
        before = [sample.prompt_ids[-1], *sample.response_ids[:-1]]
        first = sample.prompt_ids[0]
        rewards.append(
            [
                float(b == GOOD and a != GOOD) + 0.5 * float(b == first)
                for a, b in zip(before, sample.response_ids, strict=True)
            ]
        )
    return rewards


def make_trainer(hidden: int, batch: int, learning_rate: float) -> TokenPPOTrainer:
    sizes = Scratch(hidden_size=hidden, intermediate_size=2 * hidden, layers=2, heads=4)
    lm = make_policy(llama_config(sizes, len(WORDS), positions=32), seed=0)
    config = RL(
        batch_size=batch,
        minibatch_size=batch,
        micro_batch_size=batch,
        learning_rate=learning_rate,
        kl_coef=0.01,
        precision="fp32",
    )
    return TokenPPOTrainer(
        lm, known_reward, PROMPTS, config, tokenizer=letter_tokenizer(), max_response_tokens=12, seed=1
    )


def explained_variances(trainer: TokenPPOTrainer, fits: dict[str, Any], updates: int) -> dict[str, list[float]]:
    """Explained variance of each fit before it sees a rollout, update by update."""
    found: dict[str, list[float]] = {name: [] for name in fits}
    score_tokens: Callable[..., Any] = trainer._score_tokens
    cached: list[Any] = []

    def remember(*arguments: Any) -> Any:
        cached[:] = [score_tokens(*arguments)]
        return cached[0]

    trainer._score_tokens = remember  # type: ignore[method-assign]
    for _ in range(updates):
        result = trainer.step()
        mask_BT, (old, ref_logprobs_BT) = result.rollout.batch.response_mask, cached[0]
        rewards_BT = result.rewards.rewards - trainer.kl_coef * (old.logprobs - ref_logprobs_BT)
        returns_N = rewards_BT.flip(-1).cumsum(-1).flip(-1)[mask_BT]
        hidden_ND = old.hidden[mask_BT]
        for name, fit in fits.items():
            found[name].append((1 - (returns_N - fit.predict(hidden_ND)).var() / returns_N.var()).item())
            fit.fit(hidden_ND, returns_N)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--updates", type=int, default=40)
    arguments = parser.parse_args()
    fits: dict[str, Any] = {"Adam 1e-3, 1 step": AdamFit(arguments.hidden, 1e-3, 1)}
    for rate, steps in ((1e-2, 1), (1e-3, 20), (1e-2, 20)):
        fits[f"Adam {rate:g}, {steps} step(s)"] = AdamFit(arguments.hidden, rate, steps)
    for number, ridge in enumerate(policy.RIDGES):
        fits[f"ridge {ridge:g}"] = ProbeFit(arguments.hidden, number)
    fits["ridge, chosen (the probe)"] = ProbeFit(arguments.hidden)
    trainer = make_trainer(arguments.hidden, arguments.batch, arguments.learning_rate)
    found = explained_variances(trainer, fits, arguments.updates)
    third = max(2, arguments.updates // 3)
    rows = []
    for name, values in found.items():
        parts = (values[1:third], values[third:-third], values[-third:])
        rows.append([name, *(f"{sum(part) / max(1, len(part)):+.2f}" for part in parts), f"{min(values[1:]):+.2f}"])
    heads = ("fit", "first third", "middle", "last third", "worst")
    print(Table(heads, rows, title="explained variance of the next rollout").markdown())


if __name__ == "__main__":
    main()
