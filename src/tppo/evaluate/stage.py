"""The evaluate stage: every policy answers the same prompts with the same seed; one judge reads all answers.

Two reference rows show the scale of the judge: `targets` judges the user's true next queries as if a model
had written them, `other_user` judges those of another user of the same evaluation set.

Each (split, model) part is written to parts/ as soon as it is judged; a restarted stage keeps the parts it
finds (the run folder guarantees the same settings and inputs).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from tppo.config import Recipe, Rubric
from tppo.errors import UserError
from tppo.evaluate.compare import build_metrics
from tppo.evaluate.metrics import form_metrics, truth_metrics
from tppo.evaluate.votes import VOTES, vote_rows
from tppo.judge.choose import make_judge, saved_judge
from tppo.judge.record import IRRELEVANT, RELEVANT, Judge, JudgeItem, Verdict, other_user_items
from tppo.models import load_policy
from tppo.policy.generate import encode_examples, generate
from tppo.progress import console
from tppo.run import RunFolder, rl_stage, write_json
from tppo.seeding import rng, stream_seed
from tppo.tables import Example, field, load_examples, read_table, write_table
from tppo.text import parse_response, render_response

RUBRICS: tuple[Rubric, ...] = ("targets", "history")
REFERENCES = ("targets", "other_user")


def _rubric_fields(rubric: str, against: str) -> list[pa.Field]:
    return [
        field(f"relevant_{rubric}", pa.float64(), f"1 relevant to {against}, 0 not; unparseable 0", True),
        field(f"words_{rubric}", pa.float64(), f"share of words relevant to {against}; unparseable 0", True),
        field(f"sentence_score_{rubric}", pa.float64(), "judge's score of the response as written", True),
        field(
            f"word_labels_{rubric}",
            pa.list_(pa.int8()),
            "1 irrelevant, 2 relevant, per word as written",
            True,
        ),
        field(f"status_{rubric}", pa.string(), "ok; abstained or not_asked (then the four columns before are null)"),
    ]


GENERATIONS = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("user_id", pa.string(), "keyed hash of the user: the cluster of the bootstrap"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "sft, tppo, ppo, ppo_sum, dpo; or the references targets and other_user"),
        field("response", pa.string(), "text without special tokens"),
        field("queries", pa.list_(pa.string()), "normalised queries, in order"),
        field("words", pa.list_(pa.string()), "words of the response, in order, as judged"),
        field("word_query", pa.list_(pa.int32()), "number of the query each word belongs to"),
        field("finished", pa.bool_(), "the model ended the response itself"),
        field("problem", pa.string(), "why the response is unparseable, else null", True),
        field("unparseable", pa.float64(), "1 when there is a problem"),
        field("response_tokens", pa.float64(), "tokens, end-of-sequence included; null for references", True),
        *_rubric_fields("targets", "the true next queries"),
        *_rubric_fields("history", "the history"),
        field("similarity", pa.float64(), "sentence_score_targets; unparseable 0", True),
        *[
            field(name, pa.float64(), "see tppo.evaluate.metrics", True)
            for name in (
                "hit",
                "overlap",
                "token_f1",
                "queries_written",
                "words_per_query",
                "copied_queries",
                "copied_words",
                "repeated_queries",
            )
        ],
    ]
)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Generate, judge, measure; writes generations.parquet and metrics.json.

    Raises:
        UserError: an evaluation set is empty, or a stage to the left is not finished.
    """
    if not recipe.evaluate.splits:
        raise UserError("evaluate.splits is empty: name eval1, eval2 or both")
    if recipe.evaluate.bootstrap_samples < 100:
        raise UserError(f"evaluate.bootstrap_samples={recipe.evaluate.bootstrap_samples}: give at least 100")
    judge = choose_judge(recipe, run)
    examples: dict[str, list[Example]] = {s: choose_examples(recipe, run, s) for s in recipe.evaluate.splits}
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    seconds: dict[str, float] = {}
    dropped: dict[str, int] = {}
    models = evaluated_models(recipe)
    for model in models:
        missing = [split for split in examples if not _part(parts, split, model).exists()]
        if missing:
            start = time.monotonic()
            dropped.update(_answer(recipe, run, judge, model, {s: examples[s] for s in missing}, parts))
            seconds[model] = round(time.monotonic() - start, 1)
    if not recipe.evaluate.tuned_only:
        for split, chosen in examples.items():
            _write_references(recipe, judge, split, chosen, parts)

    order = [(split, model) for split in examples for model in (*models, *REFERENCES)]
    tables = [read_table(path, GENERATIONS) for s, m in order if (path := _part(parts, s, m)).exists()]
    generations = pa.concat_tables(tables)
    write_table(folder / "generations.parquet", generations, GENERATIONS)
    votes = None
    if recipe.evaluate.vote:
        votes = vote_rows(recipe, examples, generations.to_pylist())
        write_table(folder / "votes.parquet", votes, VOTES)
    metrics = build_metrics(generations.to_pylist(), recipe, votes)
    metrics["judge"] = judge.name
    metrics["judge_labelled_training"] = judge.name == run.facts("label")["judge"]
    write_json(folder / "metrics.json", metrics)
    shutil.rmtree(parts)
    return {
        "examples": {split: len(chosen) for split, chosen in examples.items()},
        "users": {split: len({e.user_id for e in chosen}) for split, chosen in examples.items()},
        "judge": judge.name,
        "history_events_dropped_to_fit_the_prompt": dropped,
        "seconds_by_model": seconds,
        "headline": [row for row in metrics["rows"] if row["metric"] == metrics["headline"]],
    }


def evaluated_models(recipe: Recipe) -> list[str]:
    """The policies that answer: SFT and every tuned one, or the tuned ones only.

    Raises:
        UserError: none is left.
    """
    models = [*([] if recipe.evaluate.tuned_only else ["sft"]), *recipe.algorithms]
    if not models:
        raise UserError("evaluate.tuned_only leaves nothing to evaluate: `algorithms` is empty")
    return models


def choose_judge(recipe: Recipe, run: RunFolder) -> Judge:
    """The judge named by `evaluate.judge`.

    Raises:
        UserError: it does not judge what the reward models learnt, the headline of the report.
    """
    kind = recipe.evaluate.judge
    if kind == "label":
        judge = saved_judge(run.require("label"), recipe)
    else:
        judge, _ = make_judge(kind, recipe, load_examples(run.require("prepare")))
    if recipe.reward.rubric not in judge.rubrics:
        raise UserError(
            f"the reward models learn rubric '{recipe.reward.rubric}', but judge.rubrics={list(judge.rubrics)} leaves "
            "it out: add it, since it is the headline of the report"
        )
    return judge


def choose_examples(recipe: Recipe, run: RunFolder, split: str) -> list[Example]:
    """`evaluate.max_examples` examples of a split, drawn with the seed, in file order (0: all)."""
    examples = load_examples(run.require("prepare"), split)
    if not examples:
        raise UserError(
            f"{run.path('prepare')}/examples.parquet has no example of split '{split}': raise "
            f"prepare.{split}_share or take the split out of evaluate.splits"
        )
    limit = recipe.evaluate.max_examples
    if not limit or limit >= len(examples):
        return examples
    chosen = rng(recipe.data_seed, "evaluate", split).choice(len(examples), size=limit, replace=False)
    return [examples[i] for i in sorted(chosen)]


def _part(parts: Path, split: str, model: str) -> Path:
    return parts / f"{split}.{model}.parquet"


def _answer(
    recipe: Recipe,
    run: RunFolder,
    judge: Judge,
    model_name: str,
    examples: dict[str, list[Example]],
    parts: Path,
) -> dict[str, int]:
    """Let one policy answer the given splits; returns how many history events did not fit, per split."""
    stage = "sft" if model_name == "sft" else rl_stage(model_name)
    dtype = torch.bfloat16 if recipe.rl.precision == "bf16" else torch.float32
    model, tokenizer = load_policy(run.require(stage) / "model", dtype=dtype)
    dropped = {}
    for split, chosen in examples.items():
        prompts, dropped[f"{split}.{model_name}"] = encode_examples(tokenizer, chosen, recipe.task)
        generations = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=recipe.task.max_response_tokens,
            temperature=recipe.evaluate.temperature,
            # The same stream for every model: equal distributions would give equal samples.
            seed=stream_seed(recipe.seed, "evaluate", split),
            batch_size=recipe.evaluate.batch_size,
            description=f"evaluate: {model_name} answers {split}",
        )
        rows = response_rows(
            judge,
            chosen,
            [g.response for g in generations],
            [g.finished for g in generations],
            [len(g.response_ids) for g in generations],
            model=model_name,
            num_queries=recipe.task.num_queries,
        )
        write_table(_part(parts, split, model_name), rows, GENERATIONS)
    return dropped


def _write_references(recipe: Recipe, judge: Judge, split: str, examples: list[Example], parts: Path) -> None:
    """Judge the true next queries of the users, and those of other users, as if a model had written them."""
    answers = {"targets": [render_response(example.targets) for example in examples]}
    if len({example.user_id for example in examples}) > 1:
        seed = stream_seed(recipe.data_seed, "evaluate", split)
        answers["other_user"] = [item.response for item in other_user_items(examples, seed)]
    else:
        console.print(f"evaluate: {split} holds one user only, so there is no other user to compare with")
    count = len(examples)
    for name, responses in answers.items():
        path = _part(parts, split, name)
        if not path.exists():
            rows = response_rows(
                judge,
                examples,
                responses,
                [True] * count,
                [None] * count,
                model=name,
                num_queries=recipe.task.num_queries,
            )
            write_table(path, rows, GENERATIONS)


def response_rows(
    judge: Judge,
    examples: Sequence[Example],
    responses: Sequence[str],
    finished: Sequence[bool],
    tokens: Sequence[int | None],
    *,
    model: str,
    num_queries: int,
) -> list[dict[str, Any]]:
    """Judge and measure one response per example: rows of generations.parquet."""
    items = [JudgeItem(e.history, e.targets, r) for e, r in zip(examples, responses, strict=True)]
    verdicts = {rubric: judge.judge(items, rubric, f"judging {model}, rubric {rubric}") for rubric in judge.rubrics}
    rows = []
    for i, (example, response) in enumerate(zip(examples, responses, strict=True)):
        parsed = parse_response(response, finished[i], num_queries)
        usable = parsed.problem is None
        row: dict[str, Any] = {
            "example_id": example.example_id,
            "user_id": example.user_id,
            "split": example.split,
            "model": model,
            "response": response,
            "queries": parsed.queries,
            "words": [word.text for word in parsed.words],
            "word_query": [word.query for word in parsed.words],
            "finished": finished[i],
            "problem": parsed.problem,
            "unparseable": float(not usable),
            "response_tokens": tokens[i],
        }
        for rubric in RUBRICS:
            row |= _verdict_columns(verdicts[rubric][i] if rubric in verdicts else None, rubric, usable)
        score = row["sentence_score_targets"]
        row["similarity"] = 0.0 if not usable and score is not None else score
        row |= truth_metrics(parsed.queries, example.targets, usable)
        row |= form_metrics(parsed.queries, example.history)
        rows.append(row)
    return rows


def _verdict_columns(verdict: Verdict | None, rubric: str, usable: bool) -> dict[str, Any]:
    """The five columns of a rubric; an abstention, or what the judge was not asked, is null, never a 0."""
    relevant: float | None = None
    share: float | None = None
    labels: list[int] | None = None
    score: float | None = None
    if verdict and verdict.status == "ok":
        relevant = float(usable and verdict.sentence_relevant)
        score = verdict.sentence_score
        if verdict.words is not None:
            labels = [RELEVANT if word.relevant else IRRELEVANT for word in verdict.words]
            share = labels.count(RELEVANT) / len(labels) if usable and labels else 0.0
    return {
        f"relevant_{rubric}": relevant,
        f"words_{rubric}": share,
        f"sentence_score_{rubric}": score,
        f"word_labels_{rubric}": labels,
        f"status_{rubric}": verdict.status if verdict else "not_asked",
    }
