"""A rollout: responses of the old policy, as samples for the reward function and as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tppo.policy.generate import Generation, generate
from tppo.rl.policy import TokenBatch
from tppo.rl.reward_function import Sample, make_sample


@dataclass(frozen=True)
class Rollout:
    """Responses to a batch of prompts: what a reward function sees, and what the model sees."""

    samples: list[Sample]
    batch: TokenBatch


def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Rollout:
    """Sample one response to each prompt from exactly softmax(logits / temperature)."""
    chosen = [prompts[i] for i in prompt_index]
    generations = generate(
        model,
        tokenizer,
        chosen,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=len(chosen),
    )
    samples = [make_sample(tokenizer, *pair) for pair in zip(generations, prompt_index, strict=True)]
    return Rollout(samples, pad_batch(samples, tokenizer.eos_token_id))


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
