"""The policy with a value head, and log-probabilities of the response tokens only.

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tppo.config import Precision


class TokenBatch(NamedTuple):
    """Prompts and responses as the model reads them."""

    input_ids: Tensor
    """(B, P+T)"""
    attention_mask: Tensor
    """(B, P+T), False on padding at either side."""
    response_mask: Tensor
    """(B, T), True on generated tokens, end-of-sequence included."""

    def rows(self, index: Tensor | slice) -> TokenBatch:
        return TokenBatch(*(tensor[index] for tensor in self))

    def trimmed(self) -> TokenBatch:
        """Without the columns that are padding in every row, at either side."""
        num_response = self.response_mask.shape[1]
        start = int(self.attention_mask.any(0).long().argmax())
        kept_response = int(self.response_mask.sum(-1).max())
        stop = self.input_ids.shape[1] - num_response + kept_response
        return TokenBatch(
            self.input_ids[:, start:stop], self.attention_mask[:, start:stop], self.response_mask[:, :kept_response]
        )


class PolicyOutput(NamedTuple):
    logprobs: Tensor
    """(B, T) float32, log pi(y_t | x, y_<t) at the sampling temperature; 0 outside the response."""
    values: Tensor | None
    """(B, T) float32, V(s_t) before token t is chosen; 0 outside the response."""
    entropy: Tensor | None
    """(B, T) float32, in nats; 0 outside the response."""


def autocast(precision: Precision) -> AbstractContextManager[Any]:
    """bf16 matrix products over float32 weights, or plain float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


class PolicyWithValue(nn.Module):
    """A causal language model and a linear value head on its last hidden state.

    Args:
        lm: any causal language model of transformers.
        detach_value: train the head as a probe; its loss then leaves the policy's weights alone.
    """

    def __init__(self, lm: Any, detach_value: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.detach_value = detach_value
        self.value_head = nn.Linear(lm.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._hidden: Tensor | None = None
        # The model's own forward makes the logits (some families scale or cap them); the hook only
        # keeps the hidden state it makes on the way.
        lm.base_model.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def forward(
        self, batch: TokenBatch, temperature: float, precision: Precision, with_entropy: bool = False
    ) -> PolicyOutput:
        with autocast(precision):
            logprobs_BT, entropy_BT = response_logprobs(self.lm, batch, temperature, with_entropy)
        assert self._hidden is not None
        mask_BT = batch.trimmed().response_mask
        num_response = mask_BT.shape[1]
        hidden_BTD = self._hidden[:, -num_response - 1 : -1].float()
        self._hidden = None
        if self.detach_value:
            hidden_BTD = hidden_BTD.detach()
        values_BT = _padded(self.value_head(hidden_BTD).squeeze(-1) * mask_BT, batch)
        return PolicyOutput(logprobs_BT, values_BT, entropy_BT)


def response_logprobs(
    lm: Any, batch: TokenBatch, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropy) of the response tokens, in float32, (B, T).

    The logits of the prompt are never made: position P-1+t predicts response token t, so the last T+1
    positions suffice. Columns that are padding in every row are left out of the computation.
    """
    whole, batch = batch, batch.trimmed()
    num_response = batch.response_mask.shape[1]
    position_ids = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = lm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=position_ids,
        logits_to_keep=num_response + 1,
        use_cache=False,
    )
    logits_BTV = output.logits[:, :-1].float() / temperature
    assert logits_BTV.shape[1] == num_response
    targets_BT = batch.input_ids[:, -num_response:]
    logprobs_BT = -F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    logprobs_BT = logprobs_BT.view_as(targets_BT) * batch.response_mask
    entropy_BT = None
    if with_entropy:
        log_p_BTV = logits_BTV.detach().log_softmax(-1)
        entropy_BT = _padded(-(log_p_BTV.exp() * log_p_BTV).sum(-1) * batch.response_mask, whole)
    return _padded(logprobs_BT, whole), entropy_BT


def _padded(values_BT: Tensor, batch: TokenBatch) -> Tensor:
    """Zeros on the right, up to the batch's response width."""
    return F.pad(values_BT, (0, batch.response_mask.shape[1] - values_BT.shape[1]))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters into a model of the same shape, in the target's precision (the rollout copy)."""
    for source_parameter, target_parameter in zip(source.parameters(), target.parameters(), strict=True):
        target_parameter.copy_(source_parameter)
