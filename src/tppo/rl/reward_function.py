"""What a reward function is given and may return, and how its answer becomes a tensor.

A reward function is a plain callable: `reward_fn(samples)` gets the responses of a rollout and returns, for each
of them, a list of floats (one per response token) or one float (paid at the last token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo.core.common import UserError
from tppo.core.encode import decode_prompt
from tppo.generate.engine import Generation
from tppo.reward.align import Span, token_spans

_SHOWN_PROMPT = 60


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
    """Logged as they are."""
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
        spans=token_spans(tokenizer, generation.response_ids),
    )


def name_sample(samples: Sequence[Sample], row: int) -> str:
    """How a message calls a sample: its row in the rollout, its prompt's index and the prompt's start."""
    sample = samples[row]
    shown = sample.prompt[:_SHOWN_PROMPT] + ("..." if len(sample.prompt) > _SHOWN_PROMPT else "")
    return f"sample {row} (prompt {sample.prompt_index}: {shown!r})"


def score(reward_fn: RewardFunction, samples: list[Sample], response_mask_BT: Tensor) -> TokenRewards:
    """Ask the reward function and place its rewards, (B, T).

    Raises:
        UserError: not one reward per sample, not one float per response token, or something that is no number.
            NaN and infinity are let through: the caller's guard names them as it does for every tensor.
    """
    answer = reward_fn(samples)
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    if len(scores.rewards) != len(samples):
        raise UserError(f"reward_fn returned {len(scores.rewards)} rewards for {len(samples)} samples")
    rewards_BT = torch.zeros_like(response_mask_BT, dtype=torch.float32)
    for row, (sample, reward) in enumerate(zip(samples, scores.rewards, strict=True)):
        length = len(sample.response_ids)
        try:
            with np.errstate(over="ignore"):  # beyond float32 is infinity, which the guard names
                values_T = np.asarray(reward, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward_fn returned no numbers for {name_sample(samples, row)}: {error}. Return one float, or a "
                f"list of {length} floats"
            ) from None
        if values_T.ndim == 0:
            rewards_BT[row, length - 1] = float(values_T)
        elif values_T.shape == (length,):
            rewards_BT[row, :length] = torch.from_numpy(values_T.copy())
        else:
            raise UserError(
                f"reward_fn returned rewards of shape {values_T.shape} for {name_sample(samples, row)}, which has "
                f"{length} response tokens (end-of-sequence included): return {length} floats, or one for the response"
            )
    return TokenRewards(rewards_BT, scores.metrics, scores.classes)
