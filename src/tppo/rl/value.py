"""Value functions: a linear head, and a probe (ridge regression from hidden states to returns, in closed form).

One Adam step an update leaves a linear head far behind a policy that moves. The probe is solved exactly after every
rollout instead, on sums that forget old rollouts, and predicts the next rollout's values. How much it is shrunk is
decided by how well each amount has predicted rollouts it was not fitted on; the most shrunk candidate is the mean
return. The probe is never asked about tokens it was fitted on, so `explained_variance` is an honest figure.

Shapes: N response tokens, D hidden size, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DECAY = 0.8
"""Weight of all earlier rollouts against one later: about five rollouts count."""
RIDGES = (1e6, 1.0, 0.1, 0.01, 0.001)
"""Candidates for the ridge penalty, as a share of the mean squared hidden unit; the first leaves the mean only."""


class ValueHead(nn.Linear):
    """A linear head trained by the value loss; it starts at V = 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...)"""
        return super().forward(hidden).squeeze(-1)


class ProbeState(NamedTuple):
    """Decayed sums over tokens and what follows from them; float64, the last of D+1 columns is the constant 1."""

    gram: Tensor
    """(D+1, D+1), sum of h h^T."""
    moment: Tensor
    """(D+1), sum of h times return."""
    errors: Tensor
    """(K), squared errors of each candidate on rollouts it had not seen."""
    weights: Tensor
    """(K, D+1)"""


class ValueProbe(nn.Module):
    """V(s) = w . h(s) + b, with h the last hidden state before the token is chosen. 0 before the first fit."""

    gram: Tensor
    moment: Tensor
    errors: Tensor
    weights: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        size, candidates = hidden_size + 1, len(RIDGES)
        shapes = {"gram": (size, size), "moment": (size,), "errors": (candidates,), "weights": (candidates, size)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32, by the candidate with the smallest error so far."""
        weight = self.weights[self.errors.argmin()]
        return (hidden.double() @ weight[:-1] + weight[-1]).float()

    def fitted(self, hidden_ND: Tensor, returns_N: Tensor) -> ProbeState:
        """The state after one more rollout. Nothing changes until it is given to `accept`."""
        features_ND = torch.cat([hidden_ND.double(), torch.ones(len(hidden_ND), 1, dtype=torch.float64)], dim=1)
        targets_N = returns_N.double()
        residual_KN = self.weights @ features_ND.T - targets_N
        gram = DECAY * self.gram + features_ND.T @ features_ND
        moment = DECAY * self.moment + features_ND.T @ targets_N
        penalty = torch.full((len(gram),), gram.diagonal()[:-1].mean().item(), dtype=torch.float64)
        penalty[-1] = 0.0  # the mean return is not shrunk
        weights = torch.stack([torch.linalg.solve(gram + (ridge * penalty).diag(), moment) for ridge in RIDGES])
        return ProbeState(gram, moment, DECAY * self.errors + residual_KN.square().sum(1), weights)

    def accept(self, state: ProbeState) -> None:
        for name, value in state._asdict().items():
            getattr(self, name).copy_(value)
