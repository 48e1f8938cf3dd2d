"""The label stage: every response judged, word by word where the judge does that, under each of its rubrics.

Writes labels.parquet (one row per sampled response and rubric), constructed.parquet (the same for constructed
responses, with `label.constructed`) and judge.json (the judge, which the evaluate stage loads again).

Which judge a stage uses: made anew (`make_judge`) or as the label stage saved it (`saved_judge`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tppo.core.common import UserError, rng
from tppo.core.config import JudgeKind, Label, Recipe, Rubric, judge_identity
from tppo.core.run import RunFolder
from tppo.core.tables import CONSTRUCTED, LABELS, RESPONSES, Example, load_examples, read_table, write_table
from tppo.core.text import render_response
from tppo.judge.injection import probe_injection
from tppo.judge.llm import LLMJudge
from tppo.judge.probes import CONSTRUCTIBLE, construct, noise_items
from tppo.judge.verdict import CONSTRUCTED_FILE, JUDGE_FILE, Judge, JudgeItem, Verdict, other_user_items, verdict_to_row

Asked = tuple[Example, int, str]
"""An example, the number of a response among those to it, and the response."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Label the responses of the sample stage, and constructed ones."""
    check_settings(recipe.label)
    examples = load_examples(run.require("prepare"))
    by_id = {example.example_id: example for example in examples}
    responses = read_table(run.require("sample") / "responses.parquet", RESPONSES).to_pylist()
    unknown = [row["example_id"] for row in responses if row["example_id"] not in by_id]
    if unknown:
        raise UserError(
            f"responses.parquet has {len(unknown)} responses to examples that examples.parquet lacks (first: "
            f"{unknown[0]}): it was sampled from another prepare stage; give `--redo sample`"
        )
    judge, facts = make_judge(recipe.label.judge, recipe, examples)
    asked = [(by_id[row["example_id"]], row["sample"], row["response"]) for row in responses]
    rows = []
    shares: dict[str, Any] = {"sft_responses": {}}
    for rubric in judge.rubrics:
        found, shares["sft_responses"][rubric] = _label(judge, rubric, asked, f"labelling, rubric {rubric}")
        rows += found
    write_table(folder / "labels.parquet", rows, LABELS)
    constructed = _label_constructed(judge, recipe, examples, folder)
    judge.save(folder)
    if recipe.label.judge == "embedding":  # the LLM judge would have to be paid for it
        held_out = [e for e in examples if e.split == "reward_eval"]
        shares |= _scale(judge, draw_examples(held_out, recipe.label.calibration_examples, recipe.seed), recipe.seed)
    return {
        "judge": judge.name,
        "responses": len(responses),
        "labels": len(rows) + constructed.pop("labels"),
        "constructed": constructed,
        **facts,
        "relevant_share": shares,
        "injection": probe_injection(judge, _items(asked), recipe.label.injection_probes, recipe.seed),
    }


def check_settings(settings: Label) -> None:
    """Raise UserError for a kind of constructed response that does not exist, or a count below 0."""
    for kind, count in settings.constructed.items():
        if kind not in CONSTRUCTIBLE:
            raise UserError(f"label.constructed: there is no kind '{kind}', only {', '.join(CONSTRUCTIBLE)}")
        if count < 0:
            raise UserError(f"label.constructed: {kind} is {count}, it must be at least 0")


def _label_constructed(judge: Judge, recipe: Recipe, examples: list[Example], folder: Path) -> dict[str, Any]:
    """Label constructed responses to training examples; returns {labels, and by kind: responses and shares}.

    They are for learning only: the held-out users are answered by the policy alone.
    """
    train = [example for example in examples if example.split == "train"]
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for rubric in judge.rubrics:
        found = construct(train, recipe.label.constructed, rubric, recipe.task.num_queries, recipe.data_seed)
        for kind, pairs in found.items():
            asked = [(example, 0, response) for example, response in pairs]
            description = f"labelling constructed responses ({kind}), rubric {rubric}"
            labelled, shares = _label(judge, rubric, asked, description)
            facts.setdefault(kind, {"responses": len(pairs)})[rubric] = shares
            rows += [{**row, "kind": kind} for row in labelled]
    if rows:
        write_table(folder / CONSTRUCTED_FILE, rows, CONSTRUCTED)
    return {"labels": len(rows), **facts}


def _label(
    judge: Judge, rubric: Rubric, asked: Sequence[Asked], description: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of labels.parquet for these responses, in order, and the shares relevant among them."""
    verdicts = judge.judge(_items(asked), rubric, description)
    rows = [
        verdict_to_row(example, sample, rubric, judge.name, response, verdict)
        for (example, sample, response), verdict in zip(asked, verdicts, strict=True)
    ]
    return rows, relevance_shares(verdicts)


def _items(asked: Sequence[Asked]) -> list[JudgeItem]:
    return [JudgeItem(example.history, example.targets, response) for example, _, response in asked]


def relevance_shares(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Share of words and of responses judged relevant (null when there are none), and the counts."""
    judged = [verdict for verdict in verdicts if verdict.status == "ok"]
    words = [word.relevant for verdict in judged for word in verdict.words or []]
    return {
        "words": float(np.mean(words)) if words else None,
        "responses": float(np.mean([verdict.sentence_relevant for verdict in judged])) if judged else None,
        "word_count": len(words),
        "response_count": len(judged),
        "empty_count": sum(verdict.words == [] for verdict in judged),
        "abstained_count": len(verdicts) - len(judged),
    }


def _scale(judge: Judge, held_out: list[Example], seed: int) -> dict[str, Any]:
    """Shares relevant among the true next queries and among unrelated text, on users not calibrated with.

    The `targets` rubric on the true targets is left out: a text is always similar to itself.
    """
    if len({example.user_id for example in held_out}) < 2:
        return {"held_out_users": "fewer than two reward_eval users: no scale measured"}
    true = [JudgeItem(e.history, e.targets, render_response(e.targets)) for e in held_out]
    unrelated = {
        "other_users_targets": (other_user_items(held_out, seed), "another user's queries"),
        "random_words": (noise_items(held_out, seed, "held out"), "random words"),
    }
    return {
        "true_targets": {"history": relevance_shares(judge.judge(true, "history", "true next queries"))},
        **{
            name: {
                rubric: relevance_shares(judge.judge(items, rubric, f"{what}, rubric {rubric}"))
                for rubric in judge.rubrics
            }
            for name, (items, what) in unrelated.items()
        },
    }


def make_judge(kind: JudgeKind, recipe: Recipe, examples: list[Example]) -> tuple[Judge, dict[str, Any]]:
    """A judge ready to use, and facts about how it was made.

    Args:
        examples: all examples of the run; the embedding judge is calibrated on those of training users.
    """
    if kind == "llm":
        return LLMJudge(recipe.judge), {"settings": judge_identity(recipe.judge)}
    from tppo.judge.embedding import EmbeddingJudge  # here: an LLM judge need not wait for torch to load

    settings = recipe.label
    judge = EmbeddingJudge(
        settings.encoder, {}, repeats_irrelevant=settings.repeats_irrelevant, batch_size=settings.batch_size
    )
    train = draw_examples([e for e in examples if e.split == "train"], settings.calibration_examples, recipe.data_seed)
    thresholds = judge.calibrate(train, settings.null_quantile, recipe.data_seed, "calibrating the judge")
    return judge, {"thresholds": thresholds}


def saved_judge(label_folder: Path, recipe: Recipe) -> Judge:
    """The judge of a finished label stage.

    Raises:
        UserError: no judge.json, or the judge it describes is not to be had any more.
    """
    path = label_folder / JUDGE_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind = saved.get("kind", "embedding")
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no saved judge ({error!r}): run `tppo label` first") from None
    if kind == "embedding":
        from tppo.judge.embedding import EmbeddingJudge

        return EmbeddingJudge.load(saved, path)
    if kind == "llm":
        if saved.get("settings") != judge_identity(recipe.judge):
            raise UserError(f"{path} was made with other settings of section `judge`: give `--redo label`")
        return LLMJudge(recipe.judge)
    raise UserError(f"{path} names a judge of kind {kind!r}; this version knows embedding and llm")


def draw_examples(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` examples (all when there are fewer) drawn with the seed."""
    if len(examples) <= count:
        return examples
    chosen = rng(seed, "label").choice(len(examples), size=count, replace=False)
    return [examples[i] for i in chosen]
