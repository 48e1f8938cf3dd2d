"""Who answers the evaluation examples, and the answers: answers.parquet.

`make_answerer` does what is done once (load a model, count queries, embed them) and returns a function that answers the
examples of a split. Everything after it (readings, comparisons, report) is the same for policies, simple baselines and
the two reference rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tppo.core.common import UserError, console, draw, stream_seed, track
from tppo.core.config import Evaluate, Precision, Recipe, Task
from tppo.core.device import generation_dtype
from tppo.core.models import load_policy
from tppo.core.resume import Row, chunks, make_rows
from tppo.core.run import RunFolder
from tppo.core.stages import DISPLAY, REFERENCES, evaluated_models, rl_stage
from tppo.core.tables import Example, drawn_examples, field, load_examples, read_table
from tppo.core.text import Event, parse_response, render_response
from tppo.generate.engine import Generation, encode_examples
from tppo.generate.respond import as_generations, respond
from tppo.generate.simple import FrequentNext, NearestNeighbour, best_sample, last_query, repeat_recent
from tppo.judge.embedding import Encoder
from tppo.judge.probes import log_texts
from tppo.judge.verdict import other_user_items
from tppo.rl.reward_function import make_sample
from tppo.rl.stage import QueryReward, query_reward

_CHUNK = 1024  # texts embedded at a time: bounds the memory of the word vectors, which are not kept


@dataclass(frozen=True)
class Answers:
    """One response per example, in order. `tokens` (end-of-sequence included) is None for what no model wrote."""

    responses: list[str]
    finished: list[bool]
    tokens: list[int | None]
    dropped_events: int | None = None
    """Oldest history events that did not fit the prompts; None where there is no prompt."""


ANSWERS = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("user_id", pa.string(), "keyed hash of the user"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "sft, an algorithm, untuned, a baseline, or a reference (targets, other_user)"),
        field("seed", pa.int64(), "seed that the answer was drawn with"),
        field("response", pa.string(), "text without special tokens"),
        field("queries", pa.list_(pa.string()), "normalised queries, in order"),
        field("words", pa.list_(pa.string()), "words of the response, in order, as judged"),
        field("word_query", pa.list_(pa.int32()), "number of the query each word belongs to"),
        field("finished", pa.bool_(), "the model ended the response itself"),
        field("problem", pa.string(), "why the response is unparseable, else null", True),
        field("response_tokens", pa.float64(), "tokens, end-of-sequence included; null for what no model wrote", True),
    ]
)
RETURNS = pa.schema([field("return", pa.float64(), "sum of a sample's rewards")])
Answered = dict[str, dict[str, Row]]
"""Rows of answers.parquet by model and example."""


Answerer = Callable[[str, Sequence[Example]], Answers | None]
"""Split and its examples -> answers; None: there is nothing to answer with (and it has been said)."""


def make_answerer(
    name: str, recipe: Recipe, run: RunFolder, encoder: Encoder | None, parts: Path | None = None
) -> Answerer:
    """The answerer called `name`: sft, an algorithm, untuned, a baseline, or a reference.

    Args:
        encoder: needed by `nearest` only.
        parts: keeps the responses of a model as they come, by split; None keeps nothing.

    Raises:
        UserError: a stage to the left is not finished, or a model does not load.
    """
    count = recipe.task.num_queries
    if name == "targets":
        return lambda split, examples: from_queries([example.targets for example in examples])
    if name == "other_user":
        return partial(_other_user, recipe.data_seed)
    if name == "repeat_last":
        return lambda split, examples: from_queries([_listed(last_query(example.history)) for example in examples])
    if name == "repeat_recent":
        return lambda split, examples: from_queries([repeat_recent(example.history, count) for example in examples])
    if name in ("frequent_next", "nearest"):
        train = load_examples(run.require("prepare"), "train")
        if not train:
            raise UserError(
                f"evaluate.baselines holds {name}, which learns from training examples, but "
                f"{run.path('prepare')}/examples.parquet has none: prepare more, or take it out"
            )
        baseline: Callable[[Sequence[Event]], list[str]]
        if name == "frequent_next":
            baseline = FrequentNext(train, count)
        else:
            assert encoder is not None, "nearest compares embeddings"
            embed = partial(embed_texts, encoder, description="evaluate: embedding queries")
            baseline = NearestNeighbour(train, count, embed)
        return lambda split, examples: from_queries([baseline(example.history) for example in examples])
    source: str | Path = recipe.sft.model
    if name != "untuned":
        source = run.require("sft" if name in ("sft", "best_of_n") else rl_stage(name)) / "model"
    policy = Policy.load(source, recipe.task, recipe.rl.precision, recipe.sample.batch_size)
    if name == "best_of_n":
        config = replace(recipe.rl, algorithm="tppo")
        reward_of = partial(query_reward, run, config, recipe.task, tokenizer=policy.tokenizer)
        return _best_of_n(policy, reward_of, recipe.evaluate, recipe.seed, parts)

    def answer(split: str, examples: Sequence[Example]) -> Answers:
        # The same stream for every model: equal distributions would give equal samples.
        seed, description = stream_seed(recipe.seed, "evaluate", split), f"evaluate: {name} answers {split}"
        kept = parts and parts / f"{split}.{name}"
        return _from_generations(*policy.respond(examples, recipe.evaluate.temperature, seed, description, kept))

    return answer


class Policy(NamedTuple):
    """A language model that answers the prompts of examples."""

    model: Any
    tokenizer: Any
    task: Task
    batch_size: int

    @classmethod
    def load(cls, source: str | Path, task: Task, precision: Precision, batch_size: int) -> Policy:
        """The model of a folder or name, in the precision of sampling."""
        model, tokenizer = load_policy(source, dtype=generation_dtype(precision), task=task)
        return cls(model, tokenizer, task, batch_size)

    def respond(
        self, examples: Sequence[Example], temperature: float, seed: int, description: str, folder: Path | None
    ) -> tuple[list[Generation], int]:
        """One response to each example, and how many history events did not fit the prompts.

        Args:
            folder: keeps the responses as they come (`tppo.generate.respond`).
        """
        table = respond(
            self.model,
            self.tokenizer,
            examples,
            self.task,
            temperature=temperature,
            seed=seed,
            batch_size=self.batch_size,
            description=description,
            folder=folder,
        )
        prompts, dropped_events = encode_examples(self.tokenizer, examples, self.task)
        return as_generations(self.model, self.tokenizer, table, prompts), dropped_events


def from_queries(queries: Iterable[Sequence[str]]) -> Answers:
    """Answers of something that ends by itself and counts no tokens."""
    responses = [render_response(found) for found in queries]
    return Answers(responses, [True] * len(responses), [None] * len(responses))


def readable_encoder(recipe: Recipe, examples: Sequence[Example]) -> Encoder | None:
    """The encoder of the similarities and of `nearest`; None, and it is said, when it cannot read the log's script.

    Raises:
        UserError: it cannot, and `nearest` is to answer.
    """
    encoder = Encoder(recipe.evaluate.encoder, setting="evaluate.encoder")
    setting = f"evaluate.encoder={recipe.evaluate.encoder}"
    try:
        encoder.legibility.check(
            log_texts(examples),
            setting,
            "give a sentence encoder for the log's languages, or take nearest out of evaluate.baselines and do without "
            "similarities",
        )
    except UserError as error:
        if "nearest" in evaluated_models(recipe):
            raise
        console.print(f"WARNING: {error}")
        return None
    return encoder


def embed_texts(encoder: Encoder, texts: Sequence[str], description: str | None = None) -> np.ndarray:
    """Unit sentence vectors of texts, (len(texts), D), in their order."""
    chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
    vectors = []
    for chunk in track(chunks, description) if description and len(chunks) > 1 else chunks:
        embeddings = encoder.encode(chunk)
        vectors += [embeddings[text].sentence for text in chunk]
    return np.stack(vectors) if vectors else np.zeros((0, 0))


def _listed(query: str | None) -> list[str]:
    return [] if query is None else [query]


def _other_user(seed: int, split: str, examples: Sequence[Example]) -> Answers | None:
    """The true next queries of another user of the same set."""
    if len({example.user_id for example in examples}) < 2:
        console.print(f"evaluate: {split} holds one user only, so there is no other user to compare with")
        return None
    items = other_user_items(examples, stream_seed(seed, "evaluate", split))
    responses = [item.response for item in items]
    return Answers(responses, [True] * len(responses), [None] * len(responses))


def _best_of_n(
    policy: Policy,
    reward_of: Callable[[list[Example]], QueryReward],
    settings: Evaluate,
    seed: int,
    parts: Path | None,
) -> Answerer:
    """Of `evaluate.best_of` samples for each example the one with TPPO's largest return without KL: the sum of the
    rewards that RL pays, format terms included."""
    times, size = settings.best_of, policy.batch_size

    def answer(split: str, examples: Sequence[Example]) -> Answers:
        repeated = [example for example in examples for _ in range(times)]
        stream, description = stream_seed(seed, "best_of_n", split), f"evaluate: best_of_n answers {split}"
        kept = parts and parts / f"{split}.best_of_n"
        generations, dropped = policy.respond(repeated, settings.temperature, stream, description, kept)
        reward_fn = reward_of(repeated)
        samples = [make_sample(policy.tokenizer, generation, i) for i, generation in enumerate(generations)]

        def score(numbers: range) -> list[Row]:
            return [
                {"return": float(np.sum(rewards))}
                for rewards in reward_fn(samples[numbers.start : numbers.stop]).rewards
            ]

        scored = make_rows(
            parts and parts / f"{split}.best_of_n.returns",
            RETURNS,
            chunks(len(samples), size),
            score,
            made_with={"seed": stream},
            description="evaluate: best_of_n scores its samples",
        )
        returns = scored["return"].to_pylist()
        starts = range(0, len(generations), times)
        best = [generations[start + best_sample(returns[start : start + times])] for start in starts]
        return _from_generations(best, dropped // times)

    return answer


def _from_generations(generations: Sequence[Generation], dropped_events: int) -> Answers:
    return Answers(
        [generation.response for generation in generations],
        [generation.finished for generation in generations],
        [len(generation.response_ids) for generation in generations],
        dropped_events,
    )


def answer_rows(answers: Answers, examples: Sequence[Example], *, model: str, seed: int, num_queries: int) -> list[Row]:
    """Rows of answers.parquet: one response per example."""
    rows = []
    for example, response, finished, tokens in zip(
        examples, answers.responses, answers.finished, answers.tokens, strict=True
    ):
        parsed = parse_response(response, finished, num_queries)
        rows.append(
            {
                **{name: getattr(example, name) for name in ("example_id", "user_id", "split")},
                "model": model,
                "seed": seed,
                "response": response,
                "queries": parsed.queries,
                "words": [word.text for word in parsed.words],
                "word_query": [word.query for word in parsed.words],
                "finished": finished,
                "problem": parsed.problem,
                "response_tokens": tokens,
            }
        )
    return rows


def readable(row: Row) -> str | None:
    """The response, or None when it is unparseable."""
    return row["response"] if row["problem"] is None else None


def choose_examples(settings: Evaluate, prepare: Path, split: str, seed: int) -> list[Example]:
    """`evaluate.max_examples` examples of a split, drawn with the seed, in file order (0: all)."""
    examples = list(drawn_examples(prepare, split, settings.max_examples or None, seed, "evaluate", split))
    if not examples:
        raise UserError(
            f"{prepare}/examples.parquet has no example of split '{split}': raise prepare.{split}_share or take the "
            "split out of evaluate.splits"
        )
    return examples


def asked_about(examples: Mapping[str, Sequence[Example]], limit: int, seed: int) -> list[Example]:
    """Examples that a reader is asked about: `limit` of each split, drawn with the seed; 0 means all.

    Args:
        examples: by split.
        limit: `examples` of the reading; equal limits draw equal examples.
    """
    return [
        example
        for split, found in examples.items()
        for example in draw(found, limit or None, seed, "second judge", split)
    ]


def by_model(rows: Sequence[Row]) -> Answered:
    """Rows of answers.parquet by model and example."""
    answers: Answered = {}
    for row in rows:
        answers.setdefault(row["model"], {})[row["example_id"]] = row
    return answers


def load_answers(evaluation: Path) -> list[Row]:
    """Rows of a finished evaluate stage.

    Raises:
        UserError: no such file, or no such table.
    """
    return read_table(evaluation / "answers.parquet", ANSWERS).to_pylist()


def records(answers: pd.DataFrame) -> list[Row]:
    """Rows of a frame of answers, as `load_answers` gives them: what is null is None, not NaN."""
    return answers.astype(object).where(answers.notna(), None).to_dict("records")


def answers_of(folders: Mapping[str, Path]) -> Answered:
    """The answers of finished evaluations, by model and example. A reference that an evaluation could not have (one
    user only) is left out.

    Args:
        folders: by model.

    Raises:
        UserError: an evaluation does not hold its model, or two models answered different examples.
    """
    read = {folder: by_model(load_answers(folder)) for folder in dict.fromkeys(folders.values())}
    answers = {model: read[folder].get(model, {}) for model, folder in folders.items()}
    for model, folder in folders.items():
        if not answers[model]:
            if model not in REFERENCES:
                raise UserError(
                    f"{folder} holds no answer of {model}: evaluate.answers has to name an evaluation of it"
                )
            console.print(f"{folder} has no row '{DISPLAY[model]}'", soft_wrap=True)
    answered = {model: rows.keys() for model, rows in answers.items() if rows and model not in REFERENCES}
    for model, ids in answered.items():
        if ids != next(iter(answered.values())):
            named = ", ".join(str(folders[name]) for name in answered)
            raise UserError(f"{named}: {model} answered other examples than the first; name equal evaluations")
    return {model: rows for model, rows in answers.items() if rows}


def answered_examples(answers: Answered, prepare: Path, limit: int, seed: int) -> list[Example]:
    """Those of the examples answered that a reader is asked about (see `asked_about`), by split.

    Raises:
        UserError: the prepare stage does not know them.
    """
    ids = list(dict.fromkeys(name for rows in answers.values() for name in rows))
    known = {example.example_id: example for example in load_examples(prepare).with_ids(ids)}
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{prepare} has no example {missing[0]}, which was answered: name its own prepare")
    by_split: dict[str, list[Example]] = {}
    for name in ids:
        by_split.setdefault(known[name].split, []).append(known[name])
    return asked_about(by_split, limit, seed)
