"""Value functions: a linear head, and a probe (ridge regression from hidden states to returns, in closed form).

One Adam step an update leaves a linear head far behind a policy that moves. The probe is solved exactly after
every rollout instead, on sums that forget old rollouts, and predicts the next rollout's values. It is never asked
about tokens it was fitted on, so `explained_variance` in the metrics is an honest figure.

Shapes: N response tokens, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DECAY = 0.9
"""Weight of all earlier rollouts against one later: about ten rollouts count."""
RIDGE = 0.01
"""Ridge penalty as a share of the mean squared hidden unit."""


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
    """Sums over tokens, and their solution; float64, the last column is the constant 1."""

    gram: Tensor
    """(D+1, D+1), sum of h h^T."""
    moment: Tensor
    """(D+1), sum of h times return."""
    weight: Tensor
    """(D+1)"""


class ValueProbe(nn.Module):
    """V(s) = w . h(s) + b, with h the last hidden state before the token is chosen. 0 before the first fit."""

    gram: Tensor
    moment: Tensor
    weight: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        size = hidden_size + 1
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(size, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32"""
        return (hidden.double() @ self.weight[:-1] + self.weight[-1]).float()

    def fitted(self, hidden_ND: Tensor, returns_N: Tensor) -> ProbeState:
        """The state after one more rollout. Nothing changes until it is given to `accept`."""
        features_ND = torch.cat([hidden_ND.double(), torch.ones(len(hidden_ND), 1, dtype=torch.float64)], dim=1)
        gram = DECAY * self.gram + features_ND.T @ features_ND
        moment = DECAY * self.moment + features_ND.T @ returns_N.double()
        penalty = torch.full((len(gram),), RIDGE * gram.diagonal()[:-1].mean().item(), dtype=torch.float64)
        penalty[-1] = 0.0  # the mean return is not shrunk
        return ProbeState(gram, moment, torch.linalg.solve(gram + penalty.diag(), moment))

    def accept(self, state: ProbeState) -> None:
        for buffer, value in zip((self.gram, self.moment, self.weight), state, strict=True):
            buffer.copy_(value)
