"""Responses to many prompts, kept as they come (`tppo.core.resume`): what sampling, evaluation and distance draw with.

Prompts of similar length share a batch, chosen among `WINDOW` prompts at a time, so that memory does not grow with
their number. Which prompts share a batch, and the uniform numbers of each, depend on the prompts and the seed alone: a
response is the same whether the job ran through or was stopped between any two batches. The numbers are those of one
table drawn for all prompts at once, row after row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from tppo.core.config import Task
from tppo.core.models import stop_ids
from tppo.core.resume import Row, make_rows
from tppo.core.tables import Example, field
from tppo.generate.engine import Generation, as_generation, encode_examples, generate

WINDOW = 16_384
DRAWN = pa.schema(
    [
        field("row", pa.int64(), "number of the prompt"),
        field("response_ids", pa.list_(pa.int32()), "generated token ids, end-of-sequence included when finished"),
        field("dropped", pa.int32(), "oldest history events that did not fit the prompt"),
    ]
)


class Repeated(Sequence[Example]):
    """Each example so many times in a row."""

    def __init__(self, examples: Sequence[Example], times: int) -> None:
        self.examples, self.times = examples, times

    def __len__(self) -> int:
        return len(self.examples) * self.times

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.examples[index // self.times]

    def __iter__(self) -> Iterator[Example]:
        return (example for example in self.examples for _ in range(self.times))


class _Window(NamedTuple):
    """Prompts to be batched together, and the uniform numbers of each (W, T)."""

    prompts: list[list[int]]
    dropped: list[int]
    order: list[int]
    uniforms_WT: torch.Tensor


class _Windows:
    """The windows of a job, one in memory at a time. They have to be asked for in order, but may be passed over."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], task: Task, seed: int) -> None:
        self.tokenizer, self.examples, self.task = tokenizer, examples, task
        self.generator = torch.Generator().manual_seed(seed)
        self.number = -1

    def __getitem__(self, number: int) -> _Window:
        while self.number < number:
            self.number += 1
            start = self.number * WINDOW
            count = min(WINDOW, len(self.examples) - start)
            # A window that is passed over uses up its numbers as well.
            size = (count, self.task.max_response_tokens)
            uniforms_WT = torch.rand(*size, generator=self.generator, dtype=torch.float64)
            if self.number == number:
                chosen = self.examples[start : start + count]
                encoded = [encode_examples(self.tokenizer, [example], self.task) for example in chosen]
                prompts = [prompt for (prompt,), _ in encoded]
                order = sorted(range(count), key=lambda i: -len(prompts[i]))
                self.window = _Window(prompts, [dropped for _, dropped in encoded], order, uniforms_WT)
        return self.window


def respond(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    task: Task,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
    description: str,
    folder: Path | None,
) -> pa.Table:
    """A response to each example: a table of `DRAWN`, in their order.

    Args:
        folder: takes what is finished, and gives it back after a stop; None keeps nothing.
    """
    windows = _Windows(tokenizer, examples, task, seed)
    units = [
        (number, first)
        for number in range(-(-len(examples) // WINDOW))
        for first in range(0, min(WINDOW, len(examples) - number * WINDOW), batch_size)
    ]

    def draw(unit: tuple[int, int]) -> list[Row]:
        number, first = unit
        window = windows[number]
        batch = window.order[first : first + batch_size]
        generations = generate(
            model,
            tokenizer,
            [window.prompts[i] for i in batch],
            max_new_tokens=task.max_response_tokens,
            temperature=temperature,
            uniforms_NT=window.uniforms_WT[batch],
            batch_size=batch_size,
        )
        return [
            {"row": number * WINDOW + i, "response_ids": generation.response_ids, "dropped": window.dropped[i]}
            for i, generation in zip(batch, generations, strict=True)
        ]

    made_with = {"prompts": len(examples), "temperature": temperature, "seed": seed, "batch_size": batch_size}
    table = make_rows(folder, DRAWN, units, draw, made_with=made_with, description=description)
    return table.sort_by("row")


def as_generations(model: Any, tokenizer: Any, table: pa.Table, prompts: Sequence[list[int]]) -> list[Generation]:
    """Rows of `respond` as generations; `prompts` are those of these rows."""
    stops = stop_ids(model, tokenizer)
    return [
        as_generation(tokenizer, prompt, ids, stops)
        for prompt, ids in zip(prompts, table["response_ids"].to_pylist(), strict=True)
    ]
