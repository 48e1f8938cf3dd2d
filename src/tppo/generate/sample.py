"""The sample stage: responses of the SFT model to be labelled, written to responses.parquet.

Nothing is filtered: an unparseable response is a row like any other, with its problem, and is counted. Responses are
kept as they come: a stage that was stopped goes on, and ends with the same table. Examples are read and written a piece
at a time, so that a million of them fit into memory.

The examples are of users that SFT never saw (section `parts`). `sample.seen_examples` that it was trained on are
answered beside them, once each, in seen.parquet: how differently it answers the two is reported (`tppo.judge.gap`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tppo.core.common import console, stream_seed
from tppo.core.config import Recipe, Sampling, Task
from tppo.core.device import generation_dtype
from tppo.core.files import PARTS
from tppo.core.models import load_policy
from tppo.core.parts import SEEN_FILE, drawn_train_examples, read_trained_on, require_unseen, say_fewer
from tppo.core.resume import chunks
from tppo.core.run import RunFolder
from tppo.core.tables import RESPONSES, Example, Examples, concatenated, drawn_examples, write_table
from tppo.core.text import parse_response
from tppo.generate.engine import Generation
from tppo.generate.respond import Repeated, as_generations, respond

_AT_ONCE = 4096  # examples whose responses are Python objects at a time


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Sample `samples_per_example` responses to drawn examples of the train and reward_eval users."""
    settings, task = recipe.sample, recipe.task
    model, tokenizer = load_policy(
        run.require("sft") / "model", dtype=generation_dtype(recipe.sft.precision), task=task
    )
    chosen, seen = draw_prompts(recipe, run.require("prepare"), run.require("sft"))
    seed = stream_seed(recipe.seed, "sample")
    facts = write_responses(model, tokenizer, chosen, settings, task, seed, folder / "responses.parquet")
    if seen:
        once, seed = replace(settings, samples_per_example=1), stream_seed(recipe.seed, "sample", "seen")
        write_responses(model, tokenizer, seen, once, task, seed, folder / SEEN_FILE)
    facts["seen_responses"] = len(seen)
    console.print(f"sampled {facts['responses']} responses, {facts['unparseable_share']:.1%} unparseable")
    return facts


def write_responses(
    model: Any, tokenizer: Any, examples: Examples, settings: Sampling, task: Task, seed: int, path: Path
) -> dict[str, Any]:
    """Draw `samples_per_example` responses to each example, and write them to `path` as a table of `RESPONSES`; returns
    their summary."""
    times = settings.samples_per_example
    table = respond(
        model,
        tokenizer,
        Repeated(examples, times),
        task,
        temperature=settings.temperature,
        seed=seed,
        batch_size=settings.batch_size,
        description="sampling batches",
        folder=path.parent / PARTS / path.stem,
    )
    pieces, summary = [], Summary(task)
    for numbers in chunks(len(examples), _AT_ONCE):
        part = table.slice(numbers.start * times, len(numbers) * times)
        answered = Repeated(examples[numbers.start : numbers.stop], times)
        rows = response_rows(answered, as_generations(model, tokenizer, part, [[]] * len(answered)), task)
        summary.add(rows)
        pieces.append(pa.Table.from_pylist(rows, schema=RESPONSES))
    write_table(path, pa.concat_tables(pieces or [RESPONSES.empty_table()]), RESPONSES)
    dropped = pc.sum(table["dropped"]).as_py() or 0
    return {**summary.facts(), "history_events_dropped_to_fit_the_prompt": dropped // max(1, times)}


def draw_prompts(recipe: Recipe, prepare: Path, sft: Path) -> tuple[Examples, Examples]:
    """The examples to respond to (those of training users, then those of reward_eval users), and those SFT has seen.

    Raises:
        UserError: SFT was trained on users whose answers are to be labelled, although the parts are disjoint.
    """
    settings, parts, seed = recipe.sample, recipe.parts, recipe.seed
    count = settings.train_examples
    train = drawn_train_examples(prepare, "reward", parts, recipe.data_seed, count, seed, "sample", "train")
    say_fewer(len(train), count, "sample.train_examples", parts, "reward")
    if len(train):
        require_unseen(train, sft, parts, "the answers to be labelled")
    held_out = drawn_examples(prepare, "reward_eval", settings.reward_eval_examples, seed, "sample", "reward_eval")
    chosen, trained = concatenated([train, held_out]), read_trained_on(sft)
    if not settings.seen_examples or trained is None:
        return chosen, train[:0]
    among = ("example_id", trained.example_ids)
    return chosen, drawn_examples(prepare, "train", settings.seen_examples, seed, "sample", "seen", among=among)


def response_rows(examples: Sequence[Example], generations: Sequence[Generation], task: Task) -> list[dict[str, Any]]:
    """Rows of responses.parquet; an example that occurs n times gets samples 0 to n-1."""
    counts: Counter[str] = Counter()
    rows = []
    for example, generation in zip(examples, generations, strict=True):
        rows.append(
            {
                "example_id": example.example_id,
                "split": example.split,
                "sample": counts[example.example_id],
                "response_ids": generation.response_ids,
                "response": generation.response,
                "finished": generation.finished,
                "problem": parse_response(generation.response, generation.finished, task.num_queries).problem,
            }
        )
        counts[example.example_id] += 1
    return rows


class Summary:
    """Counts by split and problem, and mean lengths in tokens, queries and words, of rows of responses.parquet."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.splits, self.problems, self.sums = Counter[str](), Counter[str](), Counter[str]()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            parsed = parse_response(row["response"], row["finished"], self.task.num_queries)
            self.splits[row["split"]] += 1
            if row["problem"]:
                self.problems[row["problem"]] += 1
            self.sums.update(tokens=len(row["response_ids"]), queries=len(parsed.queries), words=len(parsed.words))

    def facts(self) -> dict[str, Any]:
        count = self.splits.total()
        if not count:
            return {"responses": 0, "unparseable_share": 0.0}
        return {
            "responses": count,
            "by_split": dict(self.splits),
            "unparseable": dict(self.problems),
            "unparseable_share": self.problems.total() / count,
            **{f"mean_{name}": self.sums[name] / count for name in ("tokens", "queries", "words")},
        }


def summarise(rows: Sequence[dict[str, Any]], task: Task) -> dict[str, Any]:
    """The summary of rows that are at hand."""
    summary = Summary(task)
    summary.add(rows)
    return summary.facts()
