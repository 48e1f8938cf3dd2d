"""The policy with its value function, and log-probabilities of the response tokens only.

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.

Value functions: a linear head, and a probe (ridge regression from hidden states to returns, in closed form).

One Adam step an update leaves a linear head far behind a policy that moves. The probe is solved exactly after every
rollout instead, on sums that forget old rollouts, and predicts the next rollout's values. How much it is shrunk is
decided by how well each amount has predicted rollouts it was not fitted on; the most shrunk candidate is the mean
return. The probe is never asked about tokens it was fitted on, so `explained_variance` is an honest figure.

Shapes: N response tokens, D hidden size, K candidates.

The two frozen companions of the policy: the reference that KL is measured against, and the copy that samples.

Both are copied from the policy in memory at the start; no model is loaded twice. With LoRA there is no reference
model at all (the policy with its adapters off is one), and the sampling copy has the adapters merged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tppo.core.common import UserError, stream_seed
from tppo.core.config import RL, Precision
from tppo.core.device import autocast, generation_dtype, resolved
from tppo.core.models import lora_config
from tppo.generate.engine import Generation


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


_ADAPTER = "default"


def rollout_copy(lm: Any, config: RL) -> Any:
    """A frozen copy of the language model to sample with, in the rollout's precision."""
    dtype = generation_dtype(config.precision)
    return copy.deepcopy(lm).to(dtype).eval().requires_grad_(False)


def reference_copy(lm: Any, config: RL) -> Any:
    """A frozen copy whose results equal the policy's to the last bit, in less memory under bf16.

    Autocast rounds the weights of a linear layer to bf16 at every use, so they are held rounded. Embeddings
    (and output layers tied to them) and norms are used in float32, and stay so.
    """
    reference = copy.deepcopy(lm).eval().requires_grad_(False)
    if resolved(config.precision) == "bf16":
        tied = {id(module.weight) for module in reference.modules() if isinstance(module, nn.Embedding)}
        for module in reference.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in tied:
                module.to(torch.bfloat16)
    return reference


def with_adapters(lm: Any, config: RL, seed: int) -> Any:
    """The language model with fresh LoRA adapters on every linear layer but the output; they start at zero change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "rl", "lora"))
        return get_peft_model(lm, lora_config(config.lora_r))


@torch.no_grad()
def reference_logprobs(lm: Any, reference: Any | None, batch: TokenBatch, config: RL) -> Tensor:
    """Log-probabilities (B, T) under the frozen reference; None means the policy with its adapters off."""
    model = lm if reference is None else reference
    with model.disable_adapter() if reference is None else nullcontext(), autocast(config.precision):
        return response_logprobs(model, batch, config.temperature)[0]


@torch.no_grad()
def copy_weights(source: Any, target: nn.Module) -> None:
    """Bring the rollout copy up to date: the policy's parameters (LoRA merged) in the copy's precision."""
    if not isinstance(source, PeftModel):
        for source_parameter, target_parameter in zip(source.parameters(), target.parameters(), strict=True):
            target_parameter.copy_(source_parameter)
        return
    # The weights without an adapter never change.
    for name, module in source.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            merged = module.get_base_layer().weight + module.get_delta_weight(_ADAPTER)
            target.get_parameter(f"{name}.weight").copy_(merged)


def pad_batch(generations: Sequence[Generation], pad_id: int) -> TokenBatch:
    """Left-pad the prompts, right-pad the responses. Padding is known by its place, so its id does not matter."""
    prompt_width = max(len(generation.prompt_ids) for generation in generations)
    response_width = max(len(generation.response_ids) for generation in generations)
    input_ids = torch.full((len(generations), prompt_width + response_width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, generation in enumerate(generations):
        assert generation.response_ids, "a response without any token"
        start, end = prompt_width - len(generation.prompt_ids), prompt_width + len(generation.response_ids)
        input_ids[row, start:end] = torch.tensor(generation.prompt_ids + generation.response_ids)
        attention_mask[row, start:end] = True
    return TokenBatch(input_ids, attention_mask, attention_mask[:, prompt_width:].clone())


EAGER_TOKENS = 512  # a layer's attention weights of 16 such sequences with 9 heads take 150 MB in float32


def require_float32(lm: Any) -> None:
    """Small steps vanish in bf16 weights: 1e-5 added to 1 is 1.

    Raises:
        UserError: a parameter of another dtype.
    """
    for name, parameter in lm.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"the policy's {name} is {parameter.dtype}, but weights are trained in float32: load it with "
                "dtype=torch.float32 (rl.precision=bf16 computes in bf16 all the same)"
            )


def set_attention(lm: Any, config: RL, longest: int) -> None:
    """Set `config.attention` on a model whose longest sequence (prompt and response) has this many tokens."""
    chosen = config.attention
    if chosen == "auto":
        chosen = "eager" if lm.device.type == "cpu" and longest <= EAGER_TOKENS else "sdpa"
    lm.set_attn_implementation(chosen)
