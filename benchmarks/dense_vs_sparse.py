"""Appendix B measured: policy gradients from token rewards against their sum paid at the last token, same policy.

    python benchmarks/dense_vs_sparse.py --seeds 200

Every response of a small token MDP is enumerated (tests/helpers/tabular.py), so nothing is sampled but the problems: a
seed is one random policy with random rewards. Advantages are tppo's GAE, gradients those of tppo's policy loss.
A cell is the median over the seeds with the 5% and the 95% quantile of a ratio, sparse divided by dense:

- norm: length of the expected gradient (Eq. 19 claims it is below 1);
- variance: of the advantages over the tokens of the policy's responses (B.2 claims it is above 1);
- noise: trace of the gradient's covariance, one response;
- signal: squared norm / noise, free of the rewards' scale, one response (below 1: dense learns from fewer responses);
- cosine: between the two expected gradients (1: the same direction).

The sparse critic of "exact" and "position" is fitted to the sparse return, as the dense one is to the dense return.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.tabular import TokenMDP, at_last, measure
from tppo.core.show import Table

MEASURES = ("norm", "variance", "noise", "signal", "cosine")


class Setting(NamedTuple):
    rewards: str
    critic: str
    gamma: float
    lam: float


SETTINGS = [
    Setting(rewards, critic, gamma, lam)
    for rewards in ("normal", "class", "cancelling")
    for critic, gamma, lam in (
        ("exact", 1.0, 1.0),
        ("exact", 1.0, 0.95),
        ("none", 1.0, 1.0),
        ("none", 1.0, 0.95),
        ("none", 0.95, 1.0),
        ("position", 1.0, 0.95),
    )
]


def normal(mdp: TokenMDP, generator: torch.Generator) -> Tensor:
    """Every token in every state is paid a number of its own."""
    return mdp.along(mdp.random_rewards(generator))


def class_values(mdp: TokenMDP, generator: torch.Generator) -> Tensor:
    """As the reward model pays: 1 - p or -p for a relevant or irrelevant token, p = 0.3, nothing for token 0."""
    relevant_SV = torch.rand(mdp.shape, generator=generator, dtype=torch.float64) < 0.3
    rewards_SV = torch.where(relevant_SV, 0.7, -0.3).double()
    rewards_SV[:, 0] = 0.0
    return mdp.along(rewards_SV)


def cancelling(mdp: TokenMDP, generator: torch.Generator) -> Tensor:
    """What one token is paid the next one pays back (a potential's differences), plus a tenth of `normal`."""
    potential_BT = normal(mdp, generator)
    before_BT = torch.cat([torch.zeros_like(potential_BT[:, :1]), potential_BT[:, :-1]], dim=1)
    return (potential_BT - before_BT) * mdp.mask_BT + 0.1 * normal(mdp, generator)


REWARDS: dict[str, Callable[[TokenMDP, torch.Generator], Tensor]] = {
    "normal": normal,
    "class": class_values,
    "cancelling": cancelling,
}


def returns(rewards_BT: Tensor, gamma: float) -> Tensor:
    """Discounted rewards from every token on, (B, T)."""
    discount_T = gamma ** torch.arange(rewards_BT.shape[1], dtype=torch.float64)
    return (rewards_BT * discount_T).flip(-1).cumsum(-1).flip(-1) / discount_T


def critic_values(mdp: TokenMDP, log_policy_SV: Tensor, rewards_BT: Tensor, critic: str, gamma: float) -> Tensor:
    """(B, T): nothing, the exact value of every state, or the best that depends on the position alone."""
    if critic == "none":
        return torch.zeros_like(rewards_BT)
    group_BT = mdp.states_BT if critic == "exact" else torch.arange(rewards_BT.shape[1]).expand_as(rewards_BT)
    weights_BT = mdp.probabilities(log_policy_SV)[:, None] * mdp.mask_BT
    total = torch.zeros(int(group_BT.max()) + 1, dtype=torch.float64)
    weight = total.index_add(0, group_BT.flatten(), weights_BT.flatten())
    total = total.index_add(0, group_BT.flatten(), (weights_BT * returns(rewards_BT, gamma)).flatten())
    return (total / weight)[group_BT] * mdp.mask_BT


def ratios(mdp: TokenMDP, setting: Setting, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    log_policy_SV = mdp.random_policy(generator)
    dense_BT = REWARDS[setting.rewards](mdp, generator)
    found = [
        measure(
            mdp,
            log_policy_SV,
            rewards_BT,
            critic_values(mdp, log_policy_SV, rewards_BT, setting.critic, setting.gamma),
            setting.gamma,
            setting.lam,
        )
        for rewards_BT in (dense_BT, at_last(dense_BT, mdp.mask_BT))
    ]
    dense, sparse = found
    return {
        "norm": sparse.norm / dense.norm,
        "variance": sparse.advantage_variance / dense.advantage_variance,
        "noise": sparse.noise / dense.noise,
        "signal": sparse.signal_to_noise / dense.signal_to_noise,
        "cosine": (dense.gradient * sparse.gradient).sum().item() / (dense.norm * sparse.norm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="random problems, seeds 0 to n-1")
    parser.add_argument("--vocabulary", type=int, default=3)
    parser.add_argument("--horizon", type=int, default=5, help="longest response, in tokens")
    parser.add_argument("--output", type=Path, help="write the quantiles as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mdp = TokenMDP.build(arguments.vocabulary, arguments.horizon)
    title = (
        f"sparse / dense: median [5%, 95%] over {arguments.seeds} seeds; all {len(mdp.tokens_BT)} responses of at most "
        f"{arguments.horizon} tokens, vocabulary {arguments.vocabulary}"
    )
    rows, shown = [], []
    for setting in SETTINGS:
        samples = [ratios(mdp, setting, seed) for seed in range(arguments.seeds)]
        quantiles = {
            name: torch.tensor([sample[name] for sample in samples], dtype=torch.float64)
            .quantile(torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64))
            .tolist()
            for name in MEASURES
        }
        rows.append({**setting._asdict(), **quantiles})
        cells = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in quantiles.values()]
        shown.append([setting.rewards, setting.critic, str(setting.gamma), str(setting.lam), *cells])
    print(Table(("rewards", "critic", "gamma", "lambda", *MEASURES), shown, title=title).markdown())
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
