"""The policy with its value function, and its two frozen copies: the one that samples and the reference.

Log-probabilities are taken of the response tokens only. No model is loaded twice: both copies are made from the policy
in memory at the start. With LoRA there is no reference model at all (the policy with its adapters off is one), and the
sampling copy has the adapters merged.

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary, D hidden size,
N response tokens of a rollout, K candidates of the value probe.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.rnn import pad_sequence

from tppo.core.causal import Read, headless_copy, hidden_size, read
from tppo.core.checkpoint import load_moments, moments
from tppo.core.common import UserError, stream_seed
from tppo.core.config import RL, Precision
from tppo.core.device import autocast, generation_dtype, resolved
from tppo.core.models import with_adapters
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
        start = int(self.attention_mask.any(0).long().argmax())
        num_response = int(self.response_mask.sum(-1).max())
        stop = self.input_ids.shape[1] - self.response_mask.shape[1] + num_response
        return TokenBatch(
            self.input_ids[:, start:stop], self.attention_mask[:, start:stop], self.response_mask[:, :num_response]
        )


def pad_batch(generations: Sequence[Generation], pad_id: int) -> TokenBatch:
    """Left-pad the prompts, right-pad the responses. Padding is known by its place, so its id does not matter."""
    assert all(generation.response_ids for generation in generations), "a response without any token"
    ids, masks = [], []
    for name, side in (("prompt_ids", "left"), ("response_ids", "right")):
        rows = [torch.tensor(getattr(generation, name)) for generation in generations]
        real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        ids.append(pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side))
        masks.append(pad_sequence(real, batch_first=True, padding_side=side))
    return TokenBatch(torch.cat(ids, dim=1), torch.cat(masks, dim=1), masks[1])


class PolicyOutput(NamedTuple):
    """What the policy says of a batch; float32, 0 outside the response."""

    logprobs: Tensor
    """(B, T), log pi(y_t | x, y_<t) at the sampling temperature."""
    values: Tensor
    """(B, T), V(s_t) before token t is chosen; 0 for a probe while training."""
    entropy: Tensor
    """(B, T), in nats; 0 unless scoring."""
    hidden: Tensor
    """(B, T, D), what a probe reads; (B, T, 0) unless scoring with a probe."""

    def rows(self, index: Tensor) -> PolicyOutput:
        return PolicyOutput(*(tensor[index] for tensor in self))


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
        size = hidden_size(lm)
        self.value_trunk = None
        if value_function == "separate":
            # In a tuple: the trunk's weights are to be listed once.
            self._value_lm = (headless_copy(lm),)
            self.value_trunk = self._value_lm[0].base_model
        self.value_head = ValueProbe(size) if value_function == "probe" else skip_init(nn.Linear, size, 1)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)  # V = 0 at the start, as the probe's

    def forward(
        self, batch: TokenBatch, temperature: float, precision: Precision, scoring: bool = False
    ) -> PolicyOutput:
        """Log-probabilities and values of a batch; `scoring` a rollout asks for entropy and hidden states too."""
        width, batch = batch.response_mask.shape[1], batch.trimmed()
        mask_BT, is_probe = batch.response_mask, isinstance(self.value_head, ValueProbe)
        with autocast(precision):
            logprobs_BT, entropy_BT, read_BTD = _scored(self.lm, batch, temperature, with_entropy=scoring)
        values_BT, hidden_BTD = torch.zeros_like(logprobs_BT), logprobs_BT.new_zeros(*logprobs_BT.shape, 0)
        if scoring or not is_probe:
            if self.value_trunk is not None:
                with autocast(precision):
                    read_BTD = _read_response(self._value_lm[0], batch).hidden
            read_BTD = read_BTD.float()
            values_BT = self.value_head(read_BTD).view(mask_BT.shape) * mask_BT
            hidden_BTD = read_BTD * mask_BT[..., None] if is_probe else hidden_BTD
        return PolicyOutput(*(_padded(t, width) for t in (logprobs_BT, values_BT, entropy_BT, hidden_BTD)))


def _read_response(lm: Any, batch: TokenBatch) -> Read:
    """What the model makes of the positions that predict response tokens, (B, T, V) and (B, T, D).

    The logits of the prompt are never made: position P-1+t predicts response token t, so the last T+1
    positions suffice.
    """
    read_BT = read(lm, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1] + 1)
    return Read(read_BT.logits[:, :-1], read_BT.hidden[:, :-1])


def _scored(lm: Any, batch: TokenBatch, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy (else 0) of the response tokens in float32, (B, T), and the hidden states before
    each, (B, T, D), of a trimmed batch."""
    num_response = batch.response_mask.shape[1]
    logits_BTV, hidden_BTD = _read_response(lm, batch)
    logits_BTV = logits_BTV.float()
    if temperature != 1:
        logits_BTV = logits_BTV / temperature
    assert logits_BTV.shape[1] == num_response
    targets_BT = batch.input_ids[:, -num_response:]
    log_p_BTV = logits_BTV.log_softmax(-1)
    logprobs_BT = log_p_BTV.gather(-1, targets_BT[..., None])[..., 0] * batch.response_mask
    entropy_BT = torch.zeros_like(logprobs_BT)
    if with_entropy:
        log_p_BTV = log_p_BTV.detach()
        entropy_BT = -(log_p_BTV.exp() * log_p_BTV).sum(-1) * batch.response_mask
    return logprobs_BT, entropy_BT, hidden_BTD


def response_logprobs(
    lm: Any, batch: TokenBatch, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (and entropy, else 0) of the response tokens, in float32, (B, T).

    Columns that are padding in every row are left out of the computation.
    """
    width = batch.response_mask.shape[1]
    logprobs_BT, entropy_BT, _ = _scored(lm, batch.trimmed(), temperature, with_entropy)
    return _padded(logprobs_BT, width), _padded(entropy_BT, width)


def _padded(values: Tensor, width: int) -> Tensor:
    """(B, t, ...) -> (B, width, ...): zeros on the right."""
    return F.pad(values, (0, 0) * (values.dim() - 2) + (0, width - values.shape[1]))


DECAY = 0.8
"""Weight of all earlier rollouts against one later: about five rollouts count."""
RIDGES = (1e6, 1.0, 0.1, 0.01, 0.001)
"""Candidates for the ridge penalty, as a share of the mean squared hidden unit; the first leaves the mean only."""


class ValueProbe(nn.Module):
    """V(s) = w . h(s) + b, with h the last hidden state before the token is chosen. 0 before the first fit.

    One Adam step an update leaves a linear head far behind a policy that moves. The probe is solved exactly after every
    rollout instead (ridge regression from hidden states to returns), on sums that forget old rollouts, and predicts the
    next rollout's values. How much it is shrunk is decided by how well each amount has predicted rollouts it was not
    fitted on. It is never asked about tokens it was fitted on, so `explained_variance` is an honest figure.

    Buffers are float64; the last of D+1 columns is the constant 1.
    """

    gram: Tensor
    """(D+1, D+1), decayed sum of h h^T over tokens."""
    moment: Tensor
    """(D+1), decayed sum of h times return."""
    errors: Tensor
    """(K), decayed squared errors of each candidate on rollouts it had not seen."""
    weights: Tensor
    """(K, D+1)"""

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

    def fitted(self, hidden_ND: Tensor, returns_N: Tensor) -> dict[str, Tensor]:
        """The buffers after one more rollout. Nothing changes until they are given to `load_state_dict`."""
        features_ND = F.pad(hidden_ND.double(), (0, 1), value=1.0)
        targets_N = returns_N.double()
        residual_KN = self.weights @ features_ND.T - targets_N
        gram = DECAY * self.gram + features_ND.T @ features_ND
        moment = DECAY * self.moment + features_ND.T @ targets_N
        penalty = torch.full_like(moment, gram.diagonal()[:-1].mean().item())
        penalty[-1] = 0.0  # the mean return is not shrunk
        weights = torch.stack([torch.linalg.solve(gram + (ridge * penalty).diag(), moment) for ridge in RIDGES])
        errors = DECAY * self.errors + residual_KN.square().sum(1)
        return {"gram": gram, "moment": moment, "errors": errors, "weights": weights}


EAGER_TOKENS = 512
"""Longest sequence with eager attention (two matrix products and a softmax), which is faster than the fused one on a
CPU and short texts, but whose memory grows with the square of the length: a layer's attention weights of 16 such
sequences with 9 heads take 150 MB in float32. Everywhere else it is the fused one (sdpa)."""
_ADAPTER = "default"


def make_policies(lm: Any, config: RL, longest: int, seed: int) -> tuple[PolicyWithValue, Any, Any | None]:
    """From a language model whose longest sequence (prompt and response) has `longest` tokens: the policy to be
    trained, the copy that samples (in the rollout's precision, see `copy_weights`), the reference (None with LoRA).

    Raises:
        UserError: weights that are not float32 (small steps vanish in bf16: 1e-5 added to 1 is 1), or a family without
            adapters for LoRA.
    """
    for name, parameter in lm.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"the policy's {name} is {parameter.dtype}, but weights are trained in float32: load it with "
                "dtype=torch.float32 (rl.precision=bf16 computes in bf16 all the same)"
            )
    set_attention(lm, "eager" if lm.device.type == "cpu" and longest <= EAGER_TOKENS else "sdpa")
    rollout_model, reference = frozen_copy(lm).to(generation_dtype(config.precision)), None
    if config.tuning == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "rl", "lora"))
            lm = with_adapters(lm, config.lora_r)
    else:
        if not any(parameter.requires_grad for parameter in lm.parameters()):
            lm.requires_grad_(True)  # PEFT freezes a model, and gives it back so when its adapters are merged
        reference = reference_copy(lm, config.precision)
    # Dropout would make the first ratio differ from 1: the policy is trained in eval mode.
    return PolicyWithValue(lm, config.value_function).eval(), rollout_model, reference


def set_attention(lm: Any, implementation: str) -> None:
    """Which attention the model computes; a family that has not got it (no attention, or one kind) stays as it is."""
    with suppress(ValueError, ImportError):
        lm.set_attn_implementation(implementation)


def frozen_copy(lm: Any) -> Any:
    return copy.deepcopy(lm).eval().requires_grad_(False)


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
            # Fused experts are parameters of one module, and PEFT's wrappers of them stand around each other.
            parameter = getattr(module, "parameter_name", "weight")
            merged = getattr(module.get_base_layer(), parameter) + module.get_delta_weight(_ADAPTER)
            target.get_parameter(f"{name.replace('.base_layer', '')}.{parameter}").copy_(merged)


def reference_copy(lm: Any, precision: Precision) -> Any:
    """A frozen copy whose results equal the policy's to the last bit, in less memory under bf16.

    Autocast rounds the weights of a linear layer to bf16 at every use, so they are held rounded. Embeddings
    (and output layers tied to them) and norms are used in float32, and stay so.
    """
    reference = frozen_copy(lm)
    if resolved(precision) == "bf16":
        tied = {id(module.weight) for module in reference.modules() if isinstance(module, nn.Embedding)}
        for module in reference.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in tied:
                module.to(torch.bfloat16)
    return reference


@torch.no_grad()
def reference_logprobs(
    lm: Any, reference: Any | None, batch: TokenBatch, temperature: float, precision: Precision
) -> Tensor:
    """Log-probabilities (B, T) under the frozen reference; None means the policy with its adapters off."""
    model = lm if reference is None else reference
    with model.disable_adapter() if reference is None else nullcontext(), autocast(precision):
        return response_logprobs(model, batch, temperature)[0]


TrainingState = dict[str, dict[str, Tensor]]


def training_state(policy: PolicyWithValue, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Every tensor an update may change, live and not copied: weights and the probe's sums under `policy`, the moments
    of weight w under `optimizer` as `w|moment`.

    Tied weights appear once among the parameters; state_dict would hold them twice.
    """
    parameters = dict(policy.named_parameters())
    weights = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
    sums = {f"value_head.{name}": buffer for name, buffer in policy.value_head.named_buffers()}
    return {"policy": weights | sums, "optimizer": moments(parameters, optimizer)}


@torch.no_grad()
def load_training_state(policy: PolicyWithValue, optimizer: torch.optim.Optimizer, saved: TrainingState) -> None:
    """Bring back the state that `training_state` gave; the optimizer keeps its tensors of `saved`."""
    for name, tensor in training_state(policy, optimizer)["policy"].items():
        tensor.copy_(saved["policy"][name])
    load_moments(dict(policy.named_parameters()), optimizer, saved["optimizer"])
