"""A token MDP small enough to write down: every response is enumerated, so every expectation is exact.

A state is the prefix written so far, an action the next token. Tables are float64 tensors over (state, token);
`TokenMDP.along` reads a table along every response and gives the (B, T) tensors that tppo.rl's functions take.

Shapes: S states, V tokens, B responses (all there are), T tokens of the longest response.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tppo.rl.losses import kl_estimate, policy_loss
from tppo.rl.rewards import gae

TERMINAL = -1


@dataclass(frozen=True)
class TokenMDP:
    """All responses of at most `horizon` tokens. With `ends`, token 0 is end-of-sequence; else all are full length."""

    tokens_BT: Tensor
    states_BT: Tensor
    mask_BT: Tensor
    next_state_SV: Tensor
    """State after each token; TERMINAL when the response is over. A next state has a larger number."""

    @classmethod
    def build(cls, vocabulary: int, horizon: int, ends: bool = True) -> TokenMDP:
        going_on = range(1, vocabulary) if ends else range(vocabulary)
        prefixes = [p for length in range(horizon) for p in itertools.product(going_on, repeat=length)]
        number = {prefix: s for s, prefix in enumerate(prefixes)}
        next_state_SV = torch.tensor(
            [[number.get((*prefix, token), TERMINAL) for token in range(vocabulary)] for prefix in prefixes]
        )
        responses = [(*prefix, 0) for prefix in prefixes] if ends else []
        responses += list(itertools.product(going_on, repeat=horizon))
        tokens_BT = torch.zeros(len(responses), horizon, dtype=torch.long)
        states_BT = torch.zeros_like(tokens_BT)
        mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for row, response in enumerate(responses):
            for t, token in enumerate(response):
                tokens_BT[row, t], states_BT[row, t], mask_BT[row, t] = token, number[response[:t]], True
        return cls(tokens_BT, states_BT, mask_BT, next_state_SV)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, V)"""
        return tuple(self.next_state_SV.shape)

    def along(self, table_SV: Tensor) -> Tensor:
        """Entries of a (S, V) table met by every response, (B, T); 0 outside the response."""
        return table_SV[self.states_BT, self.tokens_BT] * self.mask_BT

    def values_along(self, values_S: Tensor) -> Tensor:
        """Entries of a (S,) table met by every response, (B, T); 0 outside the response."""
        return values_S[self.states_BT] * self.mask_BT

    def probabilities(self, log_policy_SV: Tensor) -> Tensor:
        """Probability of every response, (B,); they sum to 1."""
        return self.along(log_policy_SV).sum(-1).exp()

    def next_values(self, values_S: Tensor) -> Tensor:
        """Value of the state after each token, (S, V); 0 after the last one."""
        return torch.where(self.next_state_SV == TERMINAL, 0.0, values_S[self.next_state_SV])

    def random_policy(self, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        """log pi, (S, V)"""
        return (scale * torch.randn(self.shape, generator=generator, dtype=torch.float64)).log_softmax(-1)

    def random_rewards(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


def policy_values(mdp: TokenMDP, rewards_SV: Tensor, log_policy_SV: Tensor) -> Tensor:
    """V of a policy by backward induction (undiscounted): V(s) = sum_a pi(a|s) (r(s, a) + V(s')), (S,)."""
    values_S = torch.zeros(mdp.shape[0], dtype=rewards_SV.dtype)
    for s in reversed(range(mdp.shape[0])):
        values_S[s] = (log_policy_SV[s].exp() * (rewards_SV[s] + mdp.next_values(values_S)[s])).sum()
    return values_S


def objective(mdp: TokenMDP, log_policy_SV: Tensor, rewards_SV: Tensor, log_ref_SV: Tensor, beta: float) -> Tensor:
    """J = E_y~pi [ sum_t r(s_t, a_t) - beta log pi/pi_ref ], summed over every response there is."""
    gain_BT = mdp.along(rewards_SV) - beta * kl_estimate("k1", mdp.along(log_policy_SV), mdp.along(log_ref_SV))
    return (mdp.probabilities(log_policy_SV) * gain_BT.sum(-1)).sum()


class SoftOptimum(NamedTuple):
    values: Tensor
    """(S,) V*(s) = beta log sum_a pi_ref(a|s) exp(Q*(s, a) / beta)"""
    log_policy: Tensor
    """(S, V) log pi*(a|s) = log pi_ref(a|s) + (Q*(s, a) - V*(s)) / beta"""


def soft_optimum(mdp: TokenMDP, rewards_SV: Tensor, log_ref_SV: Tensor, beta: float) -> SoftOptimum:
    """The optimum of `objective` by the soft Bellman backup, Q*(s, a) = r(s, a) + V*(s')."""
    values_S = torch.zeros(mdp.shape[0], dtype=rewards_SV.dtype)
    for s in reversed(range(mdp.shape[0])):
        q_V = rewards_SV[s] + mdp.next_values(values_S)[s]
        values_S[s] = beta * torch.logsumexp(log_ref_SV[s] + q_V / beta, -1)
    q_SV = rewards_SV + mdp.next_values(values_S)
    return SoftOptimum(values_S, log_ref_SV + (q_SV - values_S[:, None]) / beta)


def expected_policy_loss(
    mdp: TokenMDP, log_policy_SV: Tensor, old_log_policy_SV: Tensor, advantages_BT: Tensor, clip_range: float
) -> Tensor:
    """The expectation of tppo's policy loss over responses of the old policy, exact.

    The loss is homogeneous in the advantages, so a response's probability can be multiplied into them.
    """
    weights_B1 = mdp.probabilities(old_log_policy_SV)[:, None]
    return policy_loss(
        mdp.along(log_policy_SV), mdp.along(old_log_policy_SV), weights_B1 * advantages_BT, mdp.mask_BT, clip_range, 1
    ).loss


def at_last(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum of token rewards paid at the last token: the sparse twin of dense rewards, (B, T)."""
    last_B1 = mask_BT.sum(-1, keepdim=True) - 1
    return torch.zeros_like(values_BT).scatter_(1, last_B1, values_BT.sum(-1, keepdim=True))


def past_rewards(rewards_BT: Tensor) -> Tensor:
    """C_t, the sum of the rewards before token t, (B, T): what the sparse return has and the dense one has not."""
    return rewards_BT.cumsum(-1) - rewards_BT


class Estimator(NamedTuple):
    """A policy-gradient estimator from one response, its moments taken over all responses of the policy."""

    gradient: Tensor
    """(S, V) its expectation"""
    noise: float
    """Trace of its covariance."""
    advantage_variance: float
    """Variance of the advantages over the tokens of the policy's responses."""

    @property
    def norm(self) -> float:
        return self.gradient.norm().item()

    @property
    def signal_to_noise(self) -> float:
        """||E g||^2 / tr Cov(g) of one response; n responses have n times as much. No scale of the rewards in it."""
        return self.norm**2 / self.noise


def measure(
    mdp: TokenMDP, log_policy_SV: Tensor, rewards_BT: Tensor, values_BT: Tensor, gamma: float, lam: float
) -> Estimator:
    """Moments of g(y) = sum_t A_t grad log pi(a_t|s_t), with advantages by tppo's GAE and the gradient of tppo's loss.

    The gradient is with respect to the logits of a tabular softmax policy.
    """
    advantages_BT = gae(rewards_BT, values_BT, mdp.mask_BT, gamma, lam).advantages
    probabilities_B = mdp.probabilities(log_policy_SV)
    logits_SV = log_policy_SV.clone().requires_grad_()
    loss = expected_policy_loss(mdp, logits_SV.log_softmax(-1), log_policy_SV, advantages_BT, 0.2)
    (negative_gradient_SV,) = torch.autograd.grad(loss, logits_SV)
    # grad log pi(a|s) with respect to the logits of s is onehot(a) - pi(.|s); a response meets a state once at most.
    score_BTV = torch.nn.functional.one_hot(mdp.tokens_BT, mdp.shape[1]) - log_policy_SV.exp()[mdp.states_BT]
    second_moment_B = (advantages_BT**2 * (score_BTV**2).sum(-1) * mdp.mask_BT).sum(-1)
    noise = (probabilities_B * second_moment_B).sum() - negative_gradient_SV.norm() ** 2
    weights_BT = probabilities_B[:, None] * mdp.mask_BT / (probabilities_B * mdp.mask_BT.sum(-1)).sum()
    mean = (weights_BT * advantages_BT).sum()
    variance = (weights_BT * (advantages_BT - mean) ** 2).sum()
    return Estimator(-negative_gradient_SV, noise.item(), variance.item())
