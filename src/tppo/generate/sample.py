"""The sample stage: responses of the SFT model to be labelled, written to responses.parquet.

Nothing is filtered: an unparseable response is a row like any other, with its problem, and is counted.

The examples are of users that SFT never saw (section `parts`). `sample.seen_examples` that it was trained on are
answered beside them, once each, in seen.parquet: how differently it answers the two is reported (`tppo.judge.gap`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tppo.core.common import console, draw, stream_seed
from tppo.core.config import Recipe, Task
from tppo.core.device import generation_dtype
from tppo.core.models import load_policy
from tppo.core.parts import SEEN_FILE, read_trained_on, require_unseen, say_fewer, train_examples
from tppo.core.run import RunFolder
from tppo.core.tables import RESPONSES, Example, load_examples, write_table
from tppo.core.text import parse_response
from tppo.generate.engine import Generation, encode_examples, generate


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Sample `samples_per_example` responses to drawn examples of the train and reward_eval users."""
    settings, task = recipe.sample, recipe.task
    chosen, seen = draw_prompts(recipe, run.require("prepare"), run.require("sft"))
    model, tokenizer = load_policy(
        run.require("sft") / "model", dtype=generation_dtype(recipe.sft.precision), task=task
    )
    examples = [example for example in chosen for _ in range(settings.samples_per_example)]
    prompts, dropped = encode_examples(tokenizer, examples, task)
    generations = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_response_tokens,
        temperature=settings.temperature,
        seed=stream_seed(recipe.seed, "sample"),
        batch_size=settings.batch_size,
        description="sampling batches",
    )
    rows = response_rows(examples, generations, task)
    write_table(folder / "responses.parquet", rows, RESPONSES)
    if seen:
        again = generate(
            model,
            tokenizer,
            encode_examples(tokenizer, seen, task)[0],
            max_new_tokens=task.max_response_tokens,
            temperature=settings.temperature,
            seed=stream_seed(recipe.seed, "sample", "seen"),
            batch_size=settings.batch_size,
            description="sampling batches of what SFT was trained on",
        )
        write_table(folder / SEEN_FILE, response_rows(seen, again, task), RESPONSES)
    facts = summarise(rows, task) | {"seen_responses": len(seen)}
    facts["history_events_dropped_to_fit_the_prompt"] = dropped // max(1, settings.samples_per_example)
    console.print(f"sampled {facts['responses']} responses, {facts['unparseable_share']:.1%} unparseable")
    return facts


def draw_prompts(recipe: Recipe, prepare: Path, sft: Path) -> tuple[list[Example], list[Example]]:
    """The examples to respond to (those of training users, then those of reward_eval users), and those SFT has seen.

    Raises:
        UserError: SFT was trained on users whose answers are to be labelled, although the parts are disjoint.
    """
    settings, parts, seed = recipe.sample, recipe.parts, recipe.seed
    mine = train_examples(prepare, "reward", parts, recipe.data_seed)
    say_fewer(len(mine), settings.train_examples, "sample.train_examples", parts, "reward")
    train = draw(mine, settings.train_examples, seed, "sample", "train")
    if train:
        require_unseen(train, sft, parts, "the answers to be labelled")
    held_out = draw(load_examples(prepare, "reward_eval"), settings.reward_eval_examples, seed, "sample", "reward_eval")
    trained = read_trained_on(sft)
    if not settings.seen_examples or trained is None:
        return [*train, *held_out], []
    known = [example for example in load_examples(prepare, "train") if example.example_id in trained.example_ids]
    return [*train, *held_out], draw(known, settings.seen_examples, seed, "sample", "seen")


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


def summarise(rows: Sequence[dict[str, Any]], task: Task) -> dict[str, Any]:
    """Counts by split and problem, and mean lengths in tokens, queries and words."""
    if not rows:
        return {"responses": 0, "unparseable_share": 0.0}
    parsed = [parse_response(row["response"], row["finished"], task.num_queries) for row in rows]
    return {
        "responses": len(rows),
        "by_split": dict(Counter(row["split"] for row in rows)),
        "unparseable": dict(Counter(row["problem"] for row in rows if row["problem"])),
        "unparseable_share": sum(row["problem"] is not None for row in rows) / len(rows),
        "mean_tokens": sum(len(row["response_ids"]) for row in rows) / len(rows),
        "mean_queries": sum(len(p.queries) for p in parsed) / len(rows),
        "mean_words": sum(len(p.words) for p in parsed) / len(rows),
    }
