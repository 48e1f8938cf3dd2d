"""The only generation loop: sampling, rollouts, evaluation and serving all draw responses here.

Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no repetition penalty and no minimum
length, whatever the model's `generation_config.json` says. PPO's importance ratio needs the probability a token was
really drawn with, and `model.generate` would merge such settings in silently. Only the ids that end a response are
taken from it (`tppo.core.models.stop_ids`).

An own loop because it is easier to get exactly right, and does less work than `model.generate` where responses differ
in length. Rows that have ended leave the batch, and a token costs one uniform number and a cumulative sum instead of a
random number for every word of the vocabulary. Each prompt has its own uniform numbers, so its sample does not depend
on the batch it is generated in (up to the rounding of the matrix products).

Shapes: B prompts in a batch, T prompt tokens (left-padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tppo.core.causal import Continuation, is_unpadded
from tppo.core.common import track
from tppo.core.config import Task
from tppo.core.encode import decode_text
from tppo.core.models import stop_ids
from tppo.core.tables import Example
from tppo.core.text import Event, encode_prompt


@dataclass(frozen=True)
class Generation:
    """A response: its ids (the id that ended it included iff `finished`) and its text without that."""

    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    finished: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | None = None,
    uniforms_NT: torch.Tensor | None = None,
    batch_size: int = 32,
    description: str | None = None,
) -> list[Generation]:
    """One response for each prompt, in the order of the prompts.

    Args:
        prompts: token ids; prompts of similar length are batched together.
        max_new_tokens: longest response, end-of-sequence token included.
        temperature: 0 is greedy (argmax).
        seed: makes the call reproducible and leaves torch's global generator alone; None draws from the
            global generator (as in RL, where one seed governs the whole run).
        uniforms_NT: numbers in [0, 1) to draw the tokens of each prompt with, float64, instead of those of the seed.
        description: label of a progress bar; None shows none.

    Raises:
        ValueError: an empty prompt, a negative temperature, or max_new_tokens below 1.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"bad {temperature=}, {max_new_tokens=} or {batch_size=}")
    if not all(prompts):
        raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} is empty")
    if uniforms_NT is None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniforms_NT = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    stops = stop_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if is_unpadded(model):
        batches = [list(part) for batch in batches for _, part in groupby(batch, key=lambda i: len(prompts[i]))]
    responses: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        for batch in track(batches, description) if description and batches else batches:
            chunk = _generate_batch(model, [prompts[i] for i in batch], uniforms_NT[batch], stops, temperature)
            for i, ids in zip(batch, chunk, strict=True):
                responses[i] = ids
    finally:
        model.train(training)
    return [as_generation(tokenizer, prompt, ids, stops) for prompt, ids in zip(prompts, responses, strict=True)]


def as_generation(tokenizer: Any, prompt: Sequence[int], ids: list[int], stops: Sequence[int]) -> Generation:
    """Sampled ids with their text; `stops` are those that end a response (`tppo.core.models.stop_ids`)."""
    finished = ids[-1] in stops
    return Generation(list(prompt), ids, decode_response(tokenizer, ids[:-1] if finished else ids), finished)


@torch.inference_mode()
def _generate_batch(
    model: Any, prompts: list[list[int]], uniforms_BT: torch.Tensor, stops: tuple[int, ...], temperature: float
) -> list[list[int]]:
    """Response ids of each prompt, cut after the first id that ends it."""
    continuation = Continuation(model, prompts, pad_id=stops[0])
    stops_S = torch.tensor(stops, device=model.device)
    responses: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    for step in range(uniforms_BT.shape[1]):
        next_B = sample_tokens(continuation.next_logits(), temperature, uniforms_BT[alive, step])
        for row, token in zip(alive.tolist(), next_B.tolist(), strict=True):
            responses[row].append(token)
        going = (~torch.isin(next_B, stops_S)).nonzero()[:, 0]
        if not len(going):
            break
        continuation.extend(next_B, going if len(going) < len(alive) else None)
        alive = alive[going.cpu()]
    return responses


def sample_tokens(logits_BV: torch.Tensor, temperature: float, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Token ids (B,) from softmax(logits / temperature) by inverting its cumulative sum; argmax at 0.

    The sum is taken in float64, so that 50,000 small probabilities do not lose the tail to rounding.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).double().cumsum(-1)
    thresholds_B1 = uniforms_B.to(logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    # right=True: the first token whose cumulative sum exceeds the threshold, never one of probability 0.
    return torch.searchsorted(cumulative_BV, thresholds_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def decode_response(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of response ids without special tokens."""
    return decode_text(tokenizer, ids)


def encode_history(tokenizer: Any, history: Sequence[Event], task: Task) -> tuple[list[int], int]:
    """Prompt ids of a history (its newest `task.history_events` events), and how many events were dropped to fit
    `task.max_prompt_tokens`."""
    recent = history[-task.history_events :]
    return encode_prompt(tokenizer, recent, task.num_queries, task.max_prompt_tokens, task.prompt)


def encode_examples(tokenizer: Any, examples: Sequence[Example], task: Task) -> tuple[list[list[int]], int]:
    """Prompt ids of each example, and how many events in all were dropped to fit."""
    encoded = [encode_history(tokenizer, example.history, task) for example in examples]
    return [ids for ids, _ in encoded], sum(dropped for _, dropped in encoded)
