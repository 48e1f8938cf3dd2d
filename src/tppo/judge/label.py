"""The label stage: every response judged, word by word where the judge does that, under each of its rubrics.

Writes labels.parquet (one row per sampled response and rubric), constructed.parquet (the same for constructed
responses, with `label.constructed`) and judge.json: the judge, for later stages (`saved_judge`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tppo.core.common import UserError, rng
from tppo.core.config import JudgeKind, JudgeSettings, Label, Parts, Recipe, Rubric, judge_identity
from tppo.core.files import PARTS
from tppo.core.parts import SEEN_FILE, train_examples
from tppo.core.resume import chunks, make_rows
from tppo.core.run import RunFolder, without_retired
from tppo.core.stages import uses_llm_judge
from tppo.core.tables import CONSTRUCTED, LABELS, RESPONSES, Example, load_examples, read_table, write_table
from tppo.core.text import render_response
from tppo.judge.gap import answer_values, gaps
from tppo.judge.llm import LLMJudge
from tppo.judge.probes import CONSTRUCTIBLE, construct, noise_items
from tppo.judge.verdict import (
    CHUNK,
    CONSTRUCTED_FILE,
    JUDGE_FILE,
    RELEVANT,
    Judge,
    JudgeItem,
    Verdict,
    WordVerdict,
    other_user_items,
    split_response,
    verdict_to_row,
)

Row = dict[str, Any]
Asked = tuple[Example, int, str]
"""An example, the number of a response among those to it, and the response."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Label the responses of the sample stage, and constructed ones."""
    settings = recipe.label
    check_settings(settings)
    prepare = run.require("prepare")
    columns = ("example_id", "sample", "response", "finished")
    sampled, seen_path = run.require("sample"), run.require("sample") / SEEN_FILE
    responses = read_table(sampled / "responses.parquet", RESPONSES, columns).to_pylist()
    seen_responses = read_table(seen_path, RESPONSES, columns).to_pylist() if seen_path.exists() else []
    known = load_examples(prepare).with_ids({row["example_id"] for row in [*responses, *seen_responses]})
    examples = {example.example_id: example for example in known}
    unknown = [row["example_id"] for row in responses if row["example_id"] not in examples]
    if unknown:
        raise UserError(
            f"responses.parquet has {len(unknown)} responses to examples that examples.parquet lacks (first: "
            f"{unknown[0]}): it was sampled from another prepare stage; give `--redo sample`"
        )
    train = train_examples(prepare, "reward", recipe.parts, recipe.data_seed)
    judge, facts = make_judge(settings.judge, settings, recipe.judge, train, recipe.data_seed, run.redone("label"))
    asked = [(examples[row["example_id"]], row["sample"], row["response"]) for row in responses]
    rows: list[Row] = []
    shares: dict[str, Any] = {"sft_responses": {}}
    for rubric in judge.rubrics:
        what = f"labelling, rubric {rubric}"
        found, shares["sft_responses"][rubric] = _label(judge, rubric, asked, what, folder / PARTS / rubric)
        rows += found
    write_table(folder / "labels.parquet", rows, LABELS)
    # For learning only: the held-out users are answered by the policy alone.
    constructed, kinds = _label_constructed(
        judge, settings.constructed, train, recipe.task.num_queries, recipe.data_seed, folder / PARTS
    )
    if constructed:
        write_table(folder / CONSTRUCTED_FILE, constructed, CONSTRUCTED)
    seen = _label_seen(judge, seen_responses, folder, examples)
    judge.save(folder)
    if settings.judge == "embedding":  # the LLM judge would have to be paid for it
        held_out = load_examples(prepare, "reward_eval")
        shares |= _scale(judge, draw_examples(held_out, settings.calibration_examples, recipe.seed), recipe.seed)
    return {
        "judge": judge.name,
        "responses": len(responses),
        "labels": len(rows) + len(constructed) + len(seen),
        "constructed": kinds,
        **facts,
        "relevant_share": shares,
        "seen_gap": seen_gap(rows, responses, seen, examples, recipe.parts, recipe.task.num_queries),
    }


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_settings(recipe.label)
    if uses_llm_judge("label", recipe):
        LLMJudge(recipe.judge)


def _label_seen(judge: Judge, responses: Sequence[Row], folder: Path, examples: Mapping[str, Example]) -> list[Row]:
    """Labels of the answers to what SFT was trained on, with `finished`; written to seen.parquet, which nobody learns
    from."""
    asked = [(examples[row["example_id"]], row["sample"], row["response"]) for row in responses]
    rows: list[Row] = []
    for rubric in judge.rubrics if asked else ():
        what = f"labelling answers to what SFT was trained on, rubric {rubric}"
        rows += _label(judge, rubric, asked, what, folder / PARTS / f"{rubric}.seen")[0]
    if rows:
        write_table(folder / SEEN_FILE, rows, LABELS)
    return with_finished(rows, responses)


def with_finished(labels: Sequence[Row], responses: Sequence[Row]) -> list[Row]:
    """Rows of labels.parquet with what responses.parquet says of how the response ended."""
    finished = {(row["example_id"], row["sample"]): row["finished"] for row in responses}
    return [{**row, "finished": finished[row["example_id"], row["sample"]]} for row in labels]


def seen_gap(
    labels: Sequence[Row],
    responses: Sequence[Row],
    seen: Sequence[Row],
    examples: Mapping[str, Example],
    parts: Parts,
    num_queries: int,
) -> dict[str, Any]:
    """How much better SFT answers what it was trained on than people it never saw (`tppo.judge.gap`)."""
    # Without parts the labelled training examples may be among those that SFT was trained on.
    unseen = [row for row in labels if parts.disjoint or row["split"] != "train"]
    groups = (seen, with_finished(unseen, responses))
    found = gaps(*(answer_values(rows, examples, num_queries) for rows in groups))
    return {"disjoint": parts.disjoint, "measures": found}


def check_settings(settings: Label) -> None:
    """UserError for a kind of constructed response that does not exist, or a count below 0."""
    for kind, count in settings.constructed.items():
        if kind not in CONSTRUCTIBLE:
            raise UserError(f"label.constructed: there is no kind '{kind}', only {', '.join(CONSTRUCTIBLE)}")
        if count < 0:
            raise UserError(f"label.constructed: {kind} is {count}, it must be at least 0")


def _label_constructed(
    judge: Judge, counts: dict[str, int], train: Sequence[Example], num_queries: int, seed: int, parts: Path
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of constructed.parquet, and by kind the number of responses and the shares relevant among them."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for rubric in judge.rubrics:
        for kind, pairs in construct(train, counts, rubric, num_queries, seed).items():
            asked = [(example, 0, response) for example, response in pairs]
            what, kept = f"labelling constructed responses ({kind}), rubric {rubric}", parts / f"{rubric}.{kind}"
            labelled, shares = _label(judge, rubric, asked, what, kept)
            facts.setdefault(kind, {"responses": len(pairs)})[rubric] = shares
            rows += [{**row, "kind": kind} for row in labelled]
    return rows, facts


def _label(
    judge: Judge, rubric: Rubric, asked: Sequence[Asked], description: str, parts: Path
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of labels.parquet for these responses, in order, and the shares relevant among them.

    Args:
        parts: keeps what the embedding judge has done. The LLM judge has its ledger, and is asked all at once.
    """

    def label(numbers: Sequence[int], inner: str | None) -> list[Row]:
        found = [asked[number] for number in numbers]
        items = [JudgeItem(example.history, example.targets, response) for example, _, response in found]
        return [
            verdict_to_row(example, sample, rubric, judge.name, response, verdict)
            for (example, sample, response), verdict in zip(found, judge.judge(items, rubric, inner), strict=True)
        ]

    if isinstance(judge, LLMJudge):
        rows = label(range(len(asked)), description)
    else:
        units, made_with = chunks(len(asked), CHUNK), {"judge": judge.name}
        table = make_rows(
            parts, LABELS, units, lambda unit: label(unit, None), made_with=made_with, description=description
        )
        rows = table.to_pylist()
    return rows, _relevant_shares([_verdict_of(row) for row in rows])


def _verdict_of(row: Row) -> Verdict:
    """The verdict that a row of labels.parquet was made of."""
    judged = row["status"] == "ok" and (row["words"] or not split_response(row["response"]).words)
    words = [WordVerdict(word["score"], word["label"] == RELEVANT) for word in row["words"]] if judged else None
    return Verdict(words, row["sentence_score"] or 0.0, bool(row["sentence_label"]), row["status"], row["problem"])


def _relevant_shares(verdicts: Sequence[Verdict]) -> dict[str, Any]:
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
    measured = {
        "true_targets": (true, "true next queries", ("history",)),
        "other_users_targets": (other_user_items(held_out, seed), "another user's queries", judge.rubrics),
        "random_words": (noise_items(held_out, seed, "held out"), "random words", judge.rubrics),
    }
    return {
        name: {rubric: _relevant_shares(judge.judge(items, rubric, f"{what}, rubric {rubric}")) for rubric in rubrics}
        for name, (items, what, rubrics) in measured.items()
    }


def make_judge(
    kind: JudgeKind,
    label: Label,
    judge: JudgeSettings,
    train: Sequence[Example],
    seed: int,
    retry_before: float = 0.0,
) -> tuple[Judge, dict[str, Any]]:
    """A judge ready to use, and facts about how it was made.

    Args:
        train: what the embedding judge is calibrated with.
        retry_before: Unix time; what the LLM judge abstained on before is asked again.
    """
    if kind == "llm":
        return LLMJudge(judge, retry_before), {"settings": judge_identity(judge)}
    from tppo.judge.embedding import EmbeddingJudge  # here: an LLM judge need not wait for torch to load

    made = EmbeddingJudge(label.encoder, {}, repeats_irrelevant=label.repeats_irrelevant)
    drawn = draw_examples(train, label.calibration_examples, seed)
    return made, {"thresholds": made.calibrate(drawn, label.null_quantile, seed, "calibrating the judge")}


def saved_judge(label_folder: Path, settings: JudgeSettings, retry_before: float = 0.0) -> Judge:
    """The judge of a finished label stage; UserError when what judge.json describes is not to be had any more.

    Args:
        retry_before: see `make_judge`.
    """
    path = label_folder / JUDGE_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind = saved.get("kind", "embedding")
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no saved judge ({error!r}): run `tppo label` first") from None
    if kind == "embedding":
        from tppo.judge.embedding import EmbeddingJudge

        try:
            return EmbeddingJudge.load(saved, path)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no saved judge ({error!r}): run `tppo label` first") from None
    if kind == "llm":
        made_with = without_retired({"judge": saved.get("settings") or {}})["judge"]
        if made_with != judge_identity(settings):
            raise UserError(f"{path} was made with other settings of section `judge`: give `--redo label`")
        return LLMJudge(settings, retry_before)
    raise UserError(f"{path} names a judge of kind {kind!r}; this version knows embedding and llm")


def draw_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` examples (all when there are fewer) drawn with the seed."""
    if len(examples) <= count:
        return list(examples)
    return [examples[i] for i in rng(seed, "label").choice(len(examples), size=count, replace=False)]
