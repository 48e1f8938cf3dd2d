"""How a causal language model of transformers is called, whatever its family, and the check at load that it can be.

Families differ in what their forward takes (positions, an attention mask, which logits are wanted), in what they keep
between two tokens (keys and values, windows of them, convolutions, recurrent states, nothing) and in what stands
between their trunk and their output layer. All of tppo calls models by the functions here, so that `check_family` can
say of a loaded model whether its answers are right: before anything is trained, not in the middle.

Shapes: B rows, T tokens (prompts left-padded, responses right-padded), V vocabulary, D what the output layer reads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache

from tppo.core.common import UserError

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The argument and output that hold a cache of transformers, newest name first (renamed in 5.24). What other families
keep (RWKV, Reformer, XLNet) cannot be asked for some of its rows: those are computed anew at every token."""
FAMILIES_PAGE = "docs/models.md"


def plain(model: Any) -> Any:
    """The model inside of PEFT's wrapper, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@lru_cache
def _arguments(kind: type) -> tuple[frozenset[str], bool]:
    """Names that a class's forward takes, and whether it hands others on."""
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def takes(model: Any, name: str) -> bool:
    """Whether the family's forward has an argument of this name."""
    return name in _arguments(plain(model).__class__)[0]


_UNPADDED = "_tppo_unpadded"


def is_unpadded(model: Any) -> bool:
    """Whether padding before a prompt is seen by the model, so that rows have to start at the first column.

    `check_family` finds out. So it is where positions are counted by column (BART's kin) or a recurrent state reads
    every token (RWKV). Prompts of a batch then have one length, and what is padded is padded at the right, which a
    causal model cannot see.
    """
    return getattr(plain(model), _UNPADDED, False)


def _call(model: Any, ids_BT: Tensor, mask_BT: Tensor | None, use_cache: bool = False, **further: Any) -> Any:
    """The model's output; of every argument what the family takes.

    Args:
        mask_BT: of all tokens so far, those in the cache included; 0 (False) is padding. None: there is none.
    """
    names, hands_on = _arguments(plain(model).__class__)
    if mask_BT is not None:
        # Positions count from the first token that is no padding.
        positions_BT = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        further |= {"attention_mask": mask_BT.long(), "position_ids": positions_BT}
    further = {name: value for name, value in further.items() if name in names}
    if hands_on or "use_cache" in names:
        further["use_cache"] = use_cache
    return model(input_ids=ids_BT, **further)


class Continuation:
    """Prompts that grow by a token at a time, left-padded, with whatever cache the family has."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        width = max(map(len, prompts))
        assert not is_unpadded(model) or all(len(p) == width for p in prompts), "the model sees padding"
        rows = [([pad_id] * (width - len(p)) + list(p), [0] * (width - len(p)) + [1] * len(p)) for p in prompts]
        self.model = model
        # Padding is masked out, so its id does not matter.
        self._ids_BT = torch.tensor([ids for ids, _ in rows], device=model.device)
        self._mask_BT = torch.tensor([mask for _, mask in rows], device=model.device)
        self._cache_name = next((name for name in _CACHE_NAMES if takes(model, name)), None)
        self._cache: Any = None
        self._alive = torch.arange(len(prompts), device=model.device)

    def next_logits(self) -> Tensor:
        """Logits (B, V) of the token that comes next, of the rows that are left."""
        # The last position by index, not as a slice: a slice of bf16 hidden states is not contiguous, and the
        # matrix product with the vocabulary would first copy the weights once for every row.
        further = {"logits_to_keep": torch.tensor([self._ids_BT.shape[1] - 1], device=self._ids_BT.device)}
        mask_BT = None if is_unpadded(self.model) else self._mask_BT
        if self._cache_name is not None and self._cache is not None:
            further[self._cache_name] = self._cache
            if mask_BT is not None and not _has_keys(self._cache):
                mask_BT = mask_BT[:, -1:]  # a recurrent state has read the padding already, as nothing
        output = _call(self.model, self._ids_BT, mask_BT, use_cache=self._cache_name is not None, **further)
        if self._cache_name is not None:
            self._cache = getattr(output, self._cache_name, None)
        logits_BV = output.logits[:, -1]
        return logits_BV if len(logits_BV) == len(self._alive) else logits_BV[self._alive]

    def extend(self, tokens_B: Tensor, rows: Tensor | None = None) -> None:
        """The next token of every row that is left; only `rows` (indices into them) go on."""
        if rows is not None:
            tokens_B, self._alive = tokens_B[rows], self._alive[rows]
            if self._cache is None or _can_select(self._cache):
                self._ids_BT, self._mask_BT = self._ids_BT[self._alive], self._mask_BT[self._alive]
                if self._cache is not None:
                    # Made for beam search, and so there for every kind of layer; any indices will do.
                    self._cache.reorder_cache(self._alive)
                self._alive = torch.arange(len(rows), device=rows.device)
        new_B = self._ids_BT[:, -1].clone()
        new_B[self._alive] = tokens_B
        # Without a cache the whole sequence is read again.
        self._ids_BT = new_B[:, None] if self._cache is not None else torch.cat([self._ids_BT, new_B[:, None]], dim=1)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(new_B[:, None])], dim=1)


def _has_keys(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return layers is None or any(hasattr(layer, "keys") for layer in layers)


def _can_select(cache: Any) -> bool:
    """A family's own kind of cache may keep more than its layers (MiniMax): its rows stay together."""
    return type(cache).__module__ == Cache.__module__


class Read(NamedTuple):
    """What a model makes of the last positions of padded rows."""

    logits: Tensor
    """(B, K, V)"""
    hidden: Tensor
    """(B, K, D), what its output layer reads."""


def read(model: Any, ids_BT: Tensor, mask_BT: Tensor, keep: int) -> Read:
    """Logits and hidden states of the last `keep` positions; rows are padded at either side (mask False).

    The hidden state is the output layer's input, because some families do not call their trunk, or change what it
    gives (OPT projects it). The model's own forward makes the logits: some families scale or cap them.
    """
    # Where padding is seen, what stands before a row moves behind it, and what is asked for is found there.
    num_tokens, unpadded = ids_BT.shape[1], is_unpadded(model)
    left_B1 = mask_BT.long().argmax(-1, keepdim=True)
    kept: list[Tensor] = []
    layer = plain(model).get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        if unpadded:
            columns_BT = (torch.arange(num_tokens, device=ids_BT.device) + left_B1) % num_tokens
            logits_BTV = _call(model, ids_BT.gather(1, columns_BT), None).logits
        else:
            logits_BTV = _call(model, ids_BT, mask_BT, logits_to_keep=keep).logits
    finally:
        handle.remove()
    [hidden_BTD] = kept
    if unpadded:
        found_BK = (torch.arange(num_tokens - keep, num_tokens, device=ids_BT.device) - left_B1).clamp(min=0)
        rows_B1 = torch.arange(len(ids_BT), device=ids_BT.device)[:, None]
        return Read(logits_BTV[rows_B1, found_BK], hidden_BTD[rows_B1, found_BK])
    # A family that cannot choose makes all.
    return Read(logits_BTV[:, -keep:], hidden_BTD[:, -keep:])


def hidden_size(model: Any) -> int:
    """D, the size of what the output layer reads: not always the config's `hidden_size`."""
    return plain(model).get_output_embeddings().weight.shape[-1]


def headless_copy(model: Any) -> Any:
    """A copy of the model whose output layer makes nothing of what it reads, and has no weights; for `read`."""
    headless = copy.deepcopy(plain(model))
    headless.set_output_embeddings(nn.Identity())
    return headless


_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.5
"""Largest difference between two ways to the same logits, in standard deviations of the logits over the vocabulary, in
float32 and in 16 bits. Over the families of docs/models.md rounding makes up to 3e-6 in float32, and what is wrong 2e-3
and more. In bf16 a row's logits depend on the rows beside it, so there only what is plainly wrong can be told: training
starts in float32 and is checked there."""
_LENGTHS = {False: ((5, 8), (2, 4)), True: ((5, 8), (5, 7))}
"""By `is_unpadded`: tokens of prompt, and of prompt and response, of the two rows of the check."""
_FAULTY = {
    "youtu": "transformers zeroes the embedding of its padding id at every load, so that what is trained is not what "
    "is loaded again"
}
"""Families with faults of transformers (5.24) that logits do not show; found by benchmarks/families.py."""
_NOT_CAUSAL = (
    "a token's logits depend on the tokens after it, so it is no causal model (a BERT kind becomes one by "
    '"is_decoder": true in its config.json)'
)


@torch.no_grad()
def check_family(model: Any, name: str) -> None:
    """Two prompts of different length, one ended earlier, beside each other and alone: seven short forwards, and as
    many again of a model that sees padding. Finds out whether it does (`is_unpadded`).

    Args:
        name: how the error calls the model.

    Raises:
        UserError: the model gives other logits where prompts stand beside each other, are continued with its cache, or
            end early; or its forward fails; or its hidden states cannot be read. Says which, and the way out.
    """
    training = model.training
    model.eval()
    try:
        problem = _problem(model, unpadded=False) and _problem(model, unpadded=True)
    finally:
        model.train(training)
    if problem:
        setattr(plain(model), _UNPADDED, False)
        family = getattr(getattr(model, "config", None), "model_type", "unknown")
        raise UserError(
            f"'{name}' ({type(plain(model)).__name__}, family {family}) cannot be sampled and trained: {problem}. "
            f"Take a start model of a family that works ({FAMILIES_PAGE} lists them)"
        )


def _problem(model: Any, unpadded: bool) -> str | None:
    """What is wrong with the model's answers when its rows are padded, or are not."""
    setattr(plain(model), _UNPADDED, unpadded)
    try:
        if fault := _FAULTY.get(model.config.model_type):
            return fault
        vocabulary = model.get_input_embeddings().weight.shape[0]
        # Ordinary words stand in the middle of a vocabulary, special ones at its ends.
        ids = [vocabulary // 4 + (5 * i) % max(1, vocabulary // 2) for i in range(8)]
        rows = [ids[:total] for _, total in _LENGTHS[unpadded]]
        alone = [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float() for row in rows]
        if not all(logits_TV.isfinite().all() for logits_TV in alone):
            return "its logits are not finite numbers: its weights are broken"
        # The second row is the start of the first.
        if any(_differ(alone[1][place], alone[0][place]) for place in range(len(rows[1]))):
            return _NOT_CAUSAL
        return _sampling_problem(model, rows, alone) or _training_problem(model, rows, alone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's forward raises
        message = (str(error).strip().splitlines() or [""])[0]
        return f"its forward fails on two prompts ({type(error).__name__}: {message})"


def _differ(found_V: Tensor, expected_V: Tensor) -> bool:
    limit = _TOLERANCE if found_V.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    return not bool((found_V.float() - expected_V).abs().max() <= limit * expected_V.std())


def _sampling_problem(model: Any, rows: list[list[int]], alone: list[Tensor]) -> str | None:
    """With the cache, a token at a time, rows leaving."""
    (start, end), (second_start, second_end) = _LENGTHS[is_unpadded(model)]
    if is_unpadded(model) and takes(model, "position_ids"):
        places_1T = torch.arange(end, device=model.device)[None]
        placed = model(input_ids=torch.tensor([rows[0]], device=model.device), position_ids=places_1T).logits[0]
        if _differ(placed[-1], alone[0][-1]):
            return "given positions from 0, as its own `generate` gives them, it makes other logits than without"
    continuation = Continuation(model, [rows[0][:start], rows[1][:second_start]], pad_id=rows[0][0])
    for step in range(end - start):
        logits_BV = continuation.next_logits()
        places = (start + step, second_start + step)[: 1 + (second_start + step <= second_end)]
        if len(logits_BV) != len(places):
            return "a row that has ended does not leave the batch"
        for found_V, logits_TV, place in zip(logits_BV, alone, places, strict=False):
            if _differ(found_V, logits_TV[place - 1]):
                where = "beside a longer one" if step == 0 else "continued with its cache"
                return f"a prompt gets other logits {where} than read alone"
        going = [row for row, place in enumerate(places) if place < len(rows[row])]
        tokens = [row[place] if place < len(row) else 0 for row, place in zip(rows, places, strict=False)]
        tokens_B, going_B = (torch.tensor(values, device=model.device) for values in (tokens, going))
        continuation.extend(tokens_B, going_B if len(going) < len(places) else None)
    return None


def _training_problem(model: Any, rows: list[list[int]], alone: list[Tensor]) -> str | None:
    """Prompts padded at the left, responses at the right, the last positions only."""
    (start, end), (second_start, second_end) = _LENGTHS[is_unpadded(model)]
    left, num_response = start - second_start, end - start
    right = end - left - second_end
    pad = rows[0][0]
    ids_BT = torch.tensor([rows[0], [pad] * left + rows[1] + [pad] * right], device=model.device)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :left] = 0
    mask_BT[1, end - right :] = 0
    # SFT trains with dropout on; some families then read a text in another way (Reformer: of one length only).
    with torch.random.fork_rng(devices=[]):
        read(model.train(), ids_BT, mask_BT, num_response + 1)
    logits_BKV, hidden_BKD = read(model.eval(), ids_BT, mask_BT, num_response + 1)
    if hidden_BKD.dim() != 3 or hidden_BKD.shape[:2] != logits_BKV.shape[:2]:
        return "the hidden states that its output layer reads are not one for each token"
    for row, (prompt, total) in enumerate(((start, end), (second_start, second_end))):
        for step in range(total - prompt + 1):
            if _differ(logits_BKV[row, step], alone[row][prompt + step - 1]):
                return "a padded prompt and response get other logits than read alone"
    return None
