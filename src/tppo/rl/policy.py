"""The policy with its value function, and log-probabilities of the response tokens only.

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from tppo.config import Precision
from tppo.precision import autocast
from tppo.rl.value import ValueHead, ValueProbe


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
    """(B, T) float32, V(s_t) before token t is chosen; 0 outside the response. None for a probe while training."""
    entropy: Tensor | None
    """(B, T) float32, in nats; 0 outside the response. Only when scoring."""
    hidden: Tensor | None
    """(B, T, D) float32, what a probe reads; 0 outside the response. Only when scoring with a probe."""

    def rows(self, index: Tensor) -> PolicyOutput:
        """Some responses, without gradients."""
        logprobs, *others = (None if tensor is None else tensor[index].detach() for tensor in self)
        assert logprobs is not None
        return PolicyOutput(logprobs, *others)

    @staticmethod
    def cat(parts: Sequence[PolicyOutput]) -> PolicyOutput:
        """Micro-batches one after another."""
        logprobs, *others = (None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True))
        assert logprobs is not None
        return PolicyOutput(logprobs, *others)


class PolicyWithValue(nn.Module):
    """A causal language model and its value function.

    Args:
        lm: any causal language model of transformers, or a peft model around one.
        value_function: `probe` reads the policy's hidden states and leaves its weights alone; `shared` trains a linear
            head and the policy's weights below it; `separate` trains a head on a copy of the model's trunk.
    """

    def __init__(self, lm: Any, value_function: str = "probe") -> None:
        super().__init__()
        self.lm = lm
        self.value_function = value_function
        hidden_size = lm.config.get_text_config().hidden_size
        self.value_trunk = copy.deepcopy(self._trunk) if value_function == "separate" else None
        self.value_head = ValueProbe(hidden_size) if value_function == "probe" else ValueHead(hidden_size)

    @property
    def _trunk(self) -> Any:
        """The model without its vocabulary projection."""
        return (self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm).base_model

    def forward(
        self, batch: TokenBatch, temperature: float, precision: Precision, scoring: bool = False
    ) -> PolicyOutput:
        """Log-probabilities and values of a batch; `scoring` a rollout asks for entropy and hidden states too."""
        # The model's own forward makes the logits (some families scale or cap them); the hook only keeps the
        # hidden state it makes on the way.
        kept: list[Tensor] = []
        handle = self._trunk.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
        try:
            with autocast(precision):
                logprobs_BT, entropy_BT = response_logprobs(self.lm, batch, temperature, with_entropy=scoring)
        finally:
            handle.remove()
        if self.value_function == "probe" and not scoring:
            return PolicyOutput(logprobs_BT, None, entropy_BT, None)
        if self.value_trunk is not None:
            with autocast(precision):
                kept = [self.value_trunk(**model_inputs(batch.trimmed()), use_cache=False).last_hidden_state]
        mask_BT = batch.trimmed().response_mask
        hidden_BTD = kept[0][:, -mask_BT.shape[1] - 1 : -1].float()
        values_BT = _padded(self.value_head(hidden_BTD) * mask_BT, batch)
        if self.value_function != "probe":
            return PolicyOutput(logprobs_BT, values_BT, entropy_BT, None)
        hidden_BDT = (hidden_BTD * mask_BT[..., None]).transpose(1, 2)
        return PolicyOutput(logprobs_BT, values_BT, entropy_BT, _padded(hidden_BDT, batch).transpose(1, 2))


def model_inputs(batch: TokenBatch) -> dict[str, Tensor]:
    """What a model of transformers reads; positions count from the first token that is no padding."""
    position_ids = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "position_ids": position_ids,
    }


def response_logprobs(
    lm: Any, batch: TokenBatch, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropy) of the response tokens, in float32, (B, T).

    The logits of the prompt are never made: position P-1+t predicts response token t, so the last T+1
    positions suffice. Columns that are padding in every row are left out of the computation.
    """
    whole, batch = batch, batch.trimmed()
    num_response = batch.response_mask.shape[1]
    output = lm(**model_inputs(batch), logits_to_keep=num_response + 1, use_cache=False)
    logits_BTV = output.logits[:, :-1].float()
    if temperature != 1:
        logits_BTV = logits_BTV / temperature
    assert logits_BTV.shape[1] == num_response
    targets_BT = batch.input_ids[:, -num_response:]
    log_p_BTV = logits_BTV.log_softmax(-1)
    logprobs_BT = log_p_BTV.gather(-1, targets_BT[..., None])[..., 0] * batch.response_mask
    entropy_BT = None
    if with_entropy:
        log_p_BTV = log_p_BTV.detach()
        entropy_BT = _padded(-(log_p_BTV.exp() * log_p_BTV).sum(-1) * batch.response_mask, whole)
    return _padded(logprobs_BT, whole), entropy_BT


def _padded(values: Tensor, batch: TokenBatch) -> Tensor:
    """(..., t) -> (..., T): zeros on the right, up to the batch's response width."""
    return F.pad(values, (0, batch.response_mask.shape[1] - values.shape[-1]))
