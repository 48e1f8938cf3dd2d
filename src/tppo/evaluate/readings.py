"""Readings: whoever looks at finished answers writes rows (example, model, seed, reader, measure, value).

The evaluation's own judge, another judge later on, votes, the comparison with the true next queries, what a synthetic
log knows of its users, the KL from SFT: all are rows of one kind, so any table is made from any of them. The stage
`read` adds readings to finished evaluations, also of different run folders such as the cells of a study
(`evaluate.answers`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from tppo.core.asked import asked_share, asked_written
from tppo.core.common import UserError, console
from tppo.core.config import JudgeKind, JudgeSettings, Label, Reading, Recipe, Rubric
from tppo.core.files import PARTS
from tppo.core.parts import train_examples
from tppo.core.recipe import check_readings
from tppo.core.run import RunFolder
from tppo.core.stages import MODEL_ORDER, rl_stage
from tppo.core.tables import Example, field, load_examples, write_table
from tppo.core.text import Event, parse_response
from tppo.evaluate.answers import (
    Policy,
    Row,
    answered_examples,
    answers_of,
    asked_about,
    by_model,
    choose_examples,
    embed_texts,
    load_answers,
    readable,
)
from tppo.evaluate.compare import model_pairs, voted_pairs
from tppo.evaluate.distance import distances
from tppo.evaluate.metrics import DISTANCE, LOG, RUBRICS, TEXT, form_metrics, similarity_metrics, truth_metrics
from tppo.evaluate.votes import Contest, vote
from tppo.judge.label import make_judge
from tppo.judge.llm import LLMJudge
from tppo.judge.verdict import IRRELEVANT, RELEVANT, Judge, JudgeItem, Verdict
from tppo.logs.truth import Truth

READINGS = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("user_id", pa.string(), "keyed hash of the user: the cluster of the bootstrap"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "who answered, as in answers.parquet; of a vote: a"),
        field("than", pa.string(), "of a vote: b; else null", True),
        field("seed", pa.int64(), "seed of the answer"),
        field("reader", pa.string(), "judge and version; text, log or distance for what needs no judge"),
        field(
            "measure", pa.string(), "a name of tppo.evaluate.metrics; of a vote: vote_, flipped_, preference_<rubric>"
        ),
        field("value", pa.float64(), "null: the reader was asked and abstained. What was not asked has no row", True),
        field("labels", pa.list_(pa.int8()), "of words_<rubric>: 1 irrelevant, 2 relevant, per word as written", True),
    ]
)


def judge_readings(
    judge: Judge, examples: Mapping[str, Example], answers: Sequence[Row], description: str, num_queries: int
) -> list[Row]:
    """relevant_, asked_relevant_, sentence_score_ and, of a judge of words, words_, asked_words_ and
    relevant_words_<rubric> of each answer.

    Args:
        examples: by id.
        num_queries: how many queries were asked for.
    """
    items = [JudgeItem((e := examples[row["example_id"]]).history, e.targets, row["response"]) for row in answers]
    rows: list[Row] = []
    for rubric in judge.rubrics if items else ():
        verdicts = judge.judge(items, rubric, f"{description}, rubric {rubric}")
        for answer, verdict in zip(answers, verdicts, strict=True):
            history = examples[answer["example_id"]].history
            rows += _verdict_rows(answer, judge.name, rubric, verdict, history, num_queries)
    return rows


def _verdict_rows(
    answer: Row, reader: str, rubric: Rubric, verdict: Verdict, history: Sequence[Event], num_queries: int
) -> list[Row]:
    """An unparseable answer is not relevant, whatever the judge says; an abstention is null, never a 0."""
    if verdict.status != "ok":
        return [_row(answer, reader, f"relevant_{rubric}", None)]
    usable = answer["problem"] is None
    rows = [
        _row(answer, reader, f"relevant_{rubric}", float(usable and verdict.sentence_relevant)),
        _row(answer, reader, f"sentence_score_{rubric}", verdict.sentence_score),
    ]
    labels = None
    if verdict.words is not None:
        labels = [RELEVANT if word.relevant else IRRELEVANT for word in verdict.words]
        relevant = labels.count(RELEVANT)
        share = relevant / len(labels) if usable and labels else 0.0
        rows.append({**_row(answer, reader, f"words_{rubric}", share), "labels": labels})
        rows.append(_row(answer, reader, f"relevant_words_{rubric}", float(relevant)))
    asked = asked_values(answer, verdict.sentence_relevant, labels, history, num_queries)
    return rows + [_row(answer, reader, f"{name}_{rubric}", value) for name, value in asked.items()]


def asked_values(
    answer: Row, relevant: bool, labels: Sequence[int] | None, history: Sequence[Event], num_queries: int
) -> dict[str, float]:
    """asked_relevant and, with verdicts on the words, asked_words of an answer (`tppo.core.asked`)."""
    parsed = parse_response(answer["response"], answer["finished"], num_queries)
    found = {"asked_relevant": relevant * asked_written(parsed, history, num_queries)}
    if labels is not None:
        found["asked_words"] = asked_share(parsed, [label == RELEVANT for label in labels], history, num_queries)
    return found


def with_asked(answers: pd.DataFrame, readings: pd.DataFrame, prepare: Path, num_queries: int) -> pd.DataFrame:
    """Readings with asked_relevant and asked_words of the judges that an older version asked, by the verdicts on words
    and answers that are there: what would have been written then. Readings that hold them are returned as they are.

    Args:
        answers: of one evaluation, and everything that was read of them.
    """
    judged = [f"relevant_{rubric}" for rubric in RUBRICS]
    done = set(readings.loc[readings["measure"].str.startswith("asked_relevant_"), "reader"])
    old = readings[readings["measure"].isin(judged) & readings["value"].notna() & ~readings["reader"].isin(done)]
    if old.empty:
        return readings
    key = ["example_id", "model", "seed"]
    answer_of = {tuple(row[name] for name in key): row for row in answers.to_dict("records")}
    of_words = readings[readings["labels"].notna()].set_index(["reader", "measure", *key])["labels"].to_dict()
    wanted = set(old["example_id"])
    histories = {e.example_id: e.history for e in load_examples(prepare) if e.example_id in wanted}
    rows = []
    for row in old.to_dict("records"):
        rubric, own = row["measure"].removeprefix("relevant_"), tuple(row[name] for name in key)
        labels = of_words.get((row["reader"], f"words_{rubric}", *own))
        found = asked_values(answer_of[own], bool(row["value"]), labels, histories[row["example_id"]], num_queries)
        rows += [
            {**row, "measure": f"{name}_{rubric}", "value": value, "labels": None} for name, value in found.items()
        ]
    return pd.concat([readings, pd.DataFrame(rows, columns=readings.columns)], ignore_index=True)


def text_readings(examples: Mapping[str, Example], answers: Sequence[Row], encoder: Any = None) -> list[Row]:
    """Everything that comparing texts says of each answer.

    Args:
        encoder: of the embedding similarity (`tppo.judge.embedding.Encoder`), which is not measured without it, nor
            where it cannot read a query.
    """
    vectors = {}
    if encoder:
        texts = {query for row in answers for query in row["queries"]}
        texts |= {target for row in answers for target in examples[row["example_id"]].targets}
        distinct = sorted(texts)
        vectors = dict(zip(distinct, embed_texts(encoder, distinct), strict=True))
        unread = {text for text, marks in zip(distinct, encoder.legibility.unread(distinct), strict=True) if any(marks)}
    rows = []
    for row in answers:
        example, usable = examples[row["example_id"]], row["problem"] is None
        found: dict[str, float | None] = {
            "unparseable": float(not usable),
            "response_tokens": row["response_tokens"],
            "word_count": float(len(row["words"])),
            **truth_metrics(row["queries"], example.targets, usable),
            **form_metrics(row["queries"], example.history),
        }
        if encoder and unread.isdisjoint([*row["queries"], *example.targets]):  # else its cosines would be guesses
            written, true = (np.array([vectors[text] for text in part]) for part in (row["queries"], example.targets))
            found |= similarity_metrics(written, true, usable)
        rows += [_row(row, TEXT, name, value) for name, value in found.items() if value is not None]
    return rows


def truth_readings(
    truth: Truth, examples: Mapping[str, Example], answers: Sequence[Row], num_queries: int
) -> list[Row]:
    """What the synthetic log knows of each answer."""
    rows = []
    for row in answers:
        example = examples[row["example_id"]]
        known = truth.shares(example, row["response"], num_queries)
        for name, value in zip(("known_queries", "known_words"), known, strict=True):
            rows.append(_row(row, LOG, name, value if row["problem"] is None else 0.0))
        parsed = parse_response(row["response"], row["finished"], num_queries)
        marks = truth.words(example, row["response"])[1]
        rows.append(_row(row, LOG, "asked_known_words", asked_share(parsed, marks, example.history, num_queries)))
    return rows


def vote_readings(
    judge: LLMJudge, rubric: Rubric, examples: Sequence[Example], answers: Mapping[str, Mapping[str, Row]]
) -> list[Row]:
    """The votes between every two models on these examples: vote_<rubric> 1 a, 0 tie, -1 b, null abstained;
    flipped_<rubric> 1 when the two orders disagreed; preference_<rubric> the probability that a is better, of a judge
    asked for it. A pair that needed no question has neither of the last two.

    Args:
        answers: by model and example.
    """
    asked = [
        (example, answers[a][example.example_id], answers[b][example.example_id])
        for a, b in voted_pairs(answers)
        for example in examples
        if example.example_id in answers[a] and example.example_id in answers[b]
    ]
    contests = [Contest(example.history, example.targets, readable(a), readable(b)) for example, a, b in asked]
    rows = []
    for (_, a, b), found in zip(asked, vote(judge, contests, rubric, "votes"), strict=True):
        side = {"a": 1.0, "tie": 0.0, "b": -1.0, None: None}[found.winner]
        values = {"flipped": found.flipped, "preference": found.preference}
        said = {"vote": side, **{name: float(value) for name, value in values.items() if value is not None}}
        rows += [{**_row(a, judge.name, f"{name}_{rubric}", value), "than": b["model"]} for name, value in said.items()]
    return rows


def _row(answer: Row, reader: str, measure: str, value: float | None) -> Row:
    own = {name: answer[name] for name in ("example_id", "user_id", "split", "model", "seed")}
    return {**own, "than": None, "reader": reader, "measure": measure, "value": value, "labels": None}


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """The stage `read_<reader>`: writes readings.parquet.

    Raises:
        UserError: nothing to read, an evaluation that is not finished or lacks its model, evaluations of different
            examples, or a judge that is the first one again.
    """
    (reading,) = recipe.evaluate.readings
    if reading.reader == "distance":
        rows = _distance_rows(recipe, run, reading.examples, folder / PARTS)
    else:
        rows = _read_answers(recipe, run, reading)
    write_table(folder / "readings.parquet", rows, READINGS)
    facts = reading_facts(rows)
    console.print(f"{reading.reader}: {facts}", markup=False, soft_wrap=True)
    console.print(f"written to {folder / 'readings.parquet'}; `tppo report` shows it beside the others", soft_wrap=True)
    return facts


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_readings(recipe.evaluate, recipe.judge)
    if any(reading.reader in ("llm", "vote") for reading in recipe.evaluate.readings):
        LLMJudge(recipe.judge)


def _read_answers(recipe: Recipe, run: RunFolder, reading: Reading) -> list[Row]:
    """What a judge says of finished answers, or the votes between them."""
    prepare, given = run.require("prepare"), run.answers()
    answers = answers_of(given) if given else by_model(load_answers(run.require("evaluate")))
    seed, redone = recipe.data_seed, run.redone(f"read_{reading.reader}")
    examples = answered_examples(answers, prepare, reading.examples, seed)
    if reading.reader == "vote":
        if not model_pairs(answers):
            raise UserError(
                f"vote compares two of {list(MODEL_ORDER)}, but there are answers of {list(answers)}: give "
                "`model: folder` of a finished evaluation for each in evaluate.answers"
            )
        return vote_readings(LLMJudge(recipe.judge, redone), recipe.reward.rubric, examples, answers)
    first = first_judges(list(given.values()) or [run.require("evaluate")])
    kind, train = cast(JudgeKind, reading.reader), train_examples(prepare, "reward", recipe.parts, seed)
    judge = choose_second_judge(kind, first, recipe.label, recipe.judge, train, seed, redone)
    # All answers to a history in a row: a server keeps what such prompts begin with.
    read = [rows[e.example_id] for e in examples for rows in answers.values() if e.example_id in rows]
    known = {e.example_id: e for e in examples}
    return judge_readings(judge, known, read, "second judge", recipe.task.num_queries)


def _distance_rows(recipe: Recipe, run: RunFolder, limit: int, parts: Path) -> list[Row]:
    if not recipe.algorithms:
        raise UserError(f"distance measures {recipe.algorithms}: name an algorithm (algorithms)")
    prepare, seed = run.require("prepare"), recipe.data_seed
    by_split: dict[str, list[Example]] = {
        split: choose_examples(recipe.evaluate, prepare, split, seed) for split in recipe.evaluate.splits
    }
    examples = asked_about(by_split, limit, seed)
    rows = []
    sft = run.require("sft") / "model"
    policies: dict[str, Path] = {name: run.require(rl_stage(name)) / "model" for name in recipe.algorithms}

    def load(folder: Path) -> Policy:
        return Policy.load(folder, recipe.task, recipe.rl.precision, recipe.sample.batch_size)

    for model, found in distances(policies, sft, examples, load, recipe.seed, parts):
        for example, (tokens, ratio) in zip(examples, found, strict=True):
            answer = {**vars(example), "model": model, "seed": recipe.seed}
            measures = {"sampled_tokens": float(tokens), "kl_from_sft": ratio}
            rows += [_row(answer, DISTANCE, name, value) for name, value in measures.items()]
    return rows


def first_judges(folders: Sequence[Path]) -> set[str]:
    """The names of the judges of finished evaluations."""
    return {json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["judge"] for folder in folders}


def choose_second_judge(
    kind: JudgeKind,
    first: set[str],
    label: Label,
    judge: JudgeSettings,
    train: Sequence[Example],
    seed: int,
    retry_before: float = 0.0,
) -> Judge:
    """Another judge than the first ones; see `make_judge`.

    Raises:
        UserError: it is a first judge again.
    """
    second, _ = make_judge(kind, label, judge, train, seed, retry_before)
    if second.name in first:
        raise UserError(
            f"evaluate.readings: {kind} is {second.name}, the first judge: it would only agree with itself; "
            "name another reader, or give evaluate.judge another one"
        )
    return second


def reading_facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What was read, for the manifest."""
    abstained = [row["measure"] for row in rows if row["value"] is None]
    facts = {
        "reader": sorted({row["reader"] for row in rows}),
        "examples": len({row["example_id"] for row in rows}),
        "rows": len(rows),
        "abstained": {name: abstained.count(name) for name in sorted(set(abstained))},
    }
    for measure in ("flipped_targets", "flipped_history", "kl_from_sft"):
        values: dict[str, list[float]] = {}
        for row in rows:
            if row["measure"] == measure:
                values.setdefault(row["model"], []).append(row["value"])
        if values:
            facts[measure] = {model: float(np.mean(found)) for model, found in values.items()}
    return facts
