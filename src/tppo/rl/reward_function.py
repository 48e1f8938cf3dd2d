"""What a reward function is given and may return, and how its answer becomes a tensor.

A reward function is a plain callable: `reward_fn(samples)` gets the responses of a rollout and returns, for each
of them, a list of floats (one per response token) or one float (paid at the last token). NumPy arrays, tensors (whose
gradient is cut), other sequences, generators and booleans do as well; what is no number, hides one (a masked array) or
does not fit a sample is an error that names the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo.core.common import UserError
from tppo.core.encode import decode_prompt
from tppo.generate.engine import Generation
from tppo.reward.align import Span, response_spans

_SHOWN_PROMPT = 60
_EXACT = 2.0**53
"""Below it a float64 is every integer."""


@dataclass(frozen=True)
class Sample(Generation):
    """A response to be rewarded. `response_ids` ends with end-of-sequence iff `finished`.

    >>> sample = Sample([5], [7, 8, 0], "red shoes", True, prompt_index=0, prompt="p", spans=[(0, 3), (3, 9), (9, 9)])
    >>> [sample.response[start:end] for start, end in sample.spans]
    ['red', ' shoes', '']
    """

    prompt_index: int
    """Which of the trainer's prompts it answers."""
    prompt: str
    """Its text, without what the tokenizer puts before every text; control tokens of a chat are shown."""
    spans: list[Span]
    """Character span of every response token in `response`; empty (start == end) for end-of-sequence."""


Reward = float | Sequence[float]
"""One float per response token (end-of-sequence included), or one float for the response."""


@dataclass(frozen=True)
class Scores:
    """A reward function's answer with extras; a bare list of rewards does as well.

    >>> Scores([[0.5, -1.0, 0.0], 2.0], {"good": 0.5}).metrics  # a float per token; one for the response
    {'good': 0.5}
    """

    rewards: Sequence[Reward]
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as they are. An update's own names (`tppo.rl.trainer.OUR_METRICS`) are refused."""
    classes: Sequence[Sequence[int]] | None = None
    """Class of every response token, for display."""


RewardFunction = Callable[[list[Sample]], Scores | Sequence[Reward]]


class TokenRewards(NamedTuple):
    """The rewards of a rollout."""

    rewards: Tensor
    """(B, T) float32, without KL; 0 outside the response."""
    metrics: dict[str, float]
    classes: Sequence[Sequence[int]] | None


def make_sample(tokenizer: Any, generation: Generation, prompt_index: int) -> Sample:
    return Sample(
        **vars(generation),
        prompt_index=prompt_index,
        prompt=decode_prompt(tokenizer, generation.prompt_ids),
        spans=response_spans(tokenizer, generation.response_ids, generation.finished),
    )


def name_sample(samples: Sequence[Sample], row: int) -> str:
    """How a message calls a sample: its row in the rollout, its prompt's index and the prompt's start."""
    sample = samples[row]
    shown = sample.prompt[:_SHOWN_PROMPT] + ("..." if len(sample.prompt) > _SHOWN_PROMPT else "")
    return f"sample {row} (prompt {sample.prompt_index}: {shown!r})"


def score(reward_fn: RewardFunction, samples: list[Sample], response_mask_BT: Tensor) -> TokenRewards:
    """Ask the reward function and place its rewards, (B, T). Tensors lose their gradient: rewards are constants.

    Raises:
        UserError: not one reward per sample, not one float per response token, something that is no number or cannot
            be read as one, classes that are no integers, or other extras that do not fit. NaN and infinity are let
            through: the caller's guard names them as it does for every tensor.
    """
    answer = reward_fn(samples)
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    rewards = _per_sample("rewards", scores.rewards, samples)
    rewards_BT = torch.zeros_like(response_mask_BT, dtype=torch.float32)
    for row, (sample, reward) in enumerate(zip(samples, rewards, strict=True)):
        length = len(sample.response_ids)
        where, wanted = f"for {name_sample(samples, row)}", f"one float, or a list of {length} floats"
        values_T = _numbers(reward, where, wanted, length)
        if values_T.ndim == 0:
            rewards_BT[row, length - 1] = float(values_T)
        elif values_T.shape == (length,):
            rewards_BT[row, :length] = torch.from_numpy(values_T.copy())
        else:
            raise UserError(
                f"reward_fn returned rewards of shape {values_T.shape} for {name_sample(samples, row)}, which has "
                f"{length} response tokens (end-of-sequence included): return {length} floats, or one for the response"
            )
    return TokenRewards(rewards_BT, _metrics(scores.metrics), _classes(scores.classes, samples))


def _per_sample(what: str, values: Any, samples: Sequence[Sample]) -> list[Any]:
    """One entry for each sample, in order; anything that can be gone through in a certain order will do."""
    single = isinstance(values, Tensor | np.ndarray) and values.ndim == 0
    if single or isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise UserError(
            f"reward_fn returned {type(values).__name__} as {what}: return a list with an entry for each of the "
            f"{len(samples)} samples, in their order (or `Scores` with one)"
        )
    entries = list(islice(values, len(samples) + 1))  # an iterator may have no end
    if len(entries) != len(samples):
        more = len(values) if isinstance(values, Sized) else f"more than {len(samples)}"
        count = more if len(entries) > len(samples) else len(entries)
        raise UserError(f"reward_fn returned {count} {what} for {len(samples)} samples")
    return entries


def _numbers(value: Any, where: str, wanted: str, most: int, dtype: Any = np.float32) -> np.ndarray:
    """A number, or any sequence of numbers, as `dtype`; of an iterator no more than `most` and one are taken."""
    try:
        array = np.asarray(_without_torch(value, most))
        if array.dtype.kind == "O" and not all(isinstance(item, Real | Decimal) for item in array.flat):
            other = next(item for item in array.flat if not isinstance(item, Real | Decimal))
            raise TypeError(f"{type(other).__name__} among them" if array.ndim else type(other).__name__)
        if array.dtype.kind not in "biufO":
            raise TypeError(str(array.dtype))
        with np.errstate(over="ignore"):  # beyond float32 is infinity, which the guard names
            return array.astype(dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what tensors, containers and generators of others raise has no common base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"reward_fn returned no numbers {where}: {reason}. Return {wanted}") from error


def _without_torch(value: Any, most: int) -> Any:
    """The same values without tensors (on any device, with or without a gradient, of any precision) or iterators."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("a masked array hides values: fill them")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_torch(item, most) for item in islice(value, len(value))]
    if isinstance(value, Iterator):
        return [_without_torch(item, most) for item in islice(value, most + 1)]
    return value


def _metrics(metrics: Any) -> dict[str, float]:
    """Metrics as they can be written: name -> float."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"reward_fn returned {type(metrics).__name__} as metrics: return a dict, name -> float")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if str(name) in found:
            raise UserError(f"reward_fn returned two metrics that are written {str(name)!r}: rename one")
        number = _numbers(value, f"as the metric {name!r}", "one float", most=1)
        if number.ndim:
            raise UserError(f"reward_fn returned the metric {name!r} of shape {number.shape}: return one float")
        found[str(name)] = value if isinstance(value, float | int) else float(number)
    return found


def _classes(classes: Any, samples: Sequence[Sample]) -> list[list[int]] | None:
    """The class of every response token, as it can be written."""
    if classes is None:
        return None
    found = []
    for row, (sample, entry) in enumerate(zip(samples, _per_sample("classes", classes, samples), strict=True)):
        length, where = len(sample.response_ids), f"as classes of {name_sample(samples, row)}"
        values_T = _numbers(entry, where, f"a list of {length} integers", length, np.float64)
        if values_T.shape != (length,):
            raise UserError(f"reward_fn returned shape {values_T.shape} {where}: return {length}, one for each token")
        if not ((values_T == np.trunc(values_T)) & (abs(values_T) < _EXACT)).all():  # NaN equals nothing
            raise UserError(f"reward_fn returned numbers that are no integers {where}: return {length} integers")
        found.append(values_T.astype(int).tolist())
    return found
