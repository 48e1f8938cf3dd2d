"""A whole run folder with made-up numbers and texts: all the report reads, nothing that needs a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tppo.core.config import Evaluate, Prepare, Recipe, Rubric
from tppo.core.files import write_json
from tppo.core.run import RunFolder
from tppo.core.stages import BASELINES
from tppo.core.tables import EXAMPLES, Example, write_table
from tppo.core.text import Event
from tppo.evaluate.answers import ANSWERS, Answers, answer_rows
from tppo.evaluate.compare import Metrics, build_metrics
from tppo.evaluate.readings import READINGS, judge_readings, text_readings
from tppo.judge.verdict import JudgeItem, Verdict, WordVerdict, split_response
from tppo.reward.gate import build_report

TOPICS = {
    topic: words.split()
    for topic, words in (
        (
            "garden",
            "tomato seedlings raised bed compost drip irrigation mulch pruning roses trellis greenhouse",
        ),
        ("travel", "cheap flights lisbon hotel tram pass packing list travel insurance museum tickets"),
        ("music", "acoustic guitar chords beginner lessons strings tuner capo songbook fingerpicking amp"),
        ("kitchen", "cast iron skillet sourdough starter bread flour oven thermometer recipe knife"),
    )
}
# How often a model stays on the user's topic: what separates the models in the made-up run.
SKILL = {"sft": 0.4, "dpo": 0.45, "ppo": 0.5, "ppo_sum": 0.58, "tppo": 0.66, "frequent_next": 0.3, "nearest": 0.9}


COUNTS = {
    "responses": 120,
    "responses_relevant": 40,
    "words": 900,
    "words_relevant": 220,
    "abstained": 2,
    "examples_probed": 60,
    "users_probed": 30,
}
JUDGE = {"judge": "word-overlap-v1", "judge_labelled_training": True}
Row = dict[str, Any]


class WordOverlapJudge:
    """A judge with a rule a reader can work out by hand: a word is relevant when a reference text holds it, a
    response when at least half of its words are."""

    name = "word-overlap-v1"
    rubrics: tuple[Rubric, ...] = ("targets", "history")

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        return [self._one(item, rubric) for item in items]

    def _one(self, item: JudgeItem, rubric: Rubric) -> Verdict:
        texts = item.targets if rubric == "targets" else [event.text for event in item.history]
        known = {word for text in texts for word in text.split()}
        words = [WordVerdict(float(w.text in known), w.text in known) for w in split_response(item.response).words]
        share = sum(word.relevant for word in words) / len(words) if words else 0.0
        return Verdict(words, share, share >= 0.5, "ok", None)


def make_examples(users: int, per_user: int = 2, split: str = "eval1", seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    names = list(TOPICS)
    examples = []
    for user in range(users):
        words = TOPICS[names[user % len(names)]]
        for window in range(per_user):
            pairs = [f"{a} {b}" for a in words for b in words if a != b]
            queries = [str(query) for query in generator.choice(pairs, 7, replace=False)]
            history = [Event("search", query) for query in queries[:4]]
            history.insert(2, Event("click", " ".join(generator.choice(words, 3, replace=False))))
            targets = queries[4:]
            examples.append(
                Example(
                    f"{split}-{user}-{window}",
                    f"{split}-u{user}",
                    split,
                    history,
                    targets,
                    datetime(2026, 3, 1),
                )
            )
    return examples


def write_answer(example: Example, skill: float, generator: np.random.Generator) -> str:
    """Three queries, each on the user's topic with probability `skill`."""
    own = sorted({word for text in example.targets for word in text.split()})
    other = TOPICS[list(TOPICS)[generator.integers(len(TOPICS))]]
    queries = []
    for _ in range(3 if generator.random() > 0.15 else 2):
        words = own if generator.random() < skill else other
        queries.append(" ".join(generator.choice(words, generator.integers(2, 4), replace=False)))
    return "\n".join(queries)


def made_up_rows(
    examples: list[Example], model: str, seed: int = 1, answer_seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Rows of answers.parquet and of readings.parquet."""
    generator = np.random.default_rng(seed)
    count = len(examples)
    if model == "targets":
        answers = ["\n".join(e.targets) for e in examples]
    elif model == "other_user":
        answers = ["\n".join(examples[(i + 2) % count].targets) for i in range(count)]
    else:
        answers = [write_answer(example, SKILL[model], generator) for example in examples]
    by_model = model in SKILL and model not in BASELINES
    finished = [not by_model or bool(generator.random() > 0.05) for _ in examples]
    tokens = [3 * len(answer.split()) if by_model else None for answer in answers]
    found = Answers(answers, finished, tokens)
    rows = answer_rows(found, examples, model=model, seed=answer_seed, num_queries=3)
    return rows, read(examples, rows)


def read(examples: Sequence[Example], answers: list[Row], num_queries: int = 3) -> list[Row]:
    """What the judge with the rule, and the texts alone, say of answers."""
    known = {example.example_id: example for example in examples}
    return judge_readings(WordOverlapJudge(), known, answers, "judging", num_queries) + text_readings(known, answers)


def metrics_of(answers: list[Row], readings: list[Row], recipe: Recipe) -> Metrics:
    """metrics.json of made-up rows."""
    frames = (
        pa.Table.from_pylist(rows, schema=s).to_pandas() for rows, s in ((answers, ANSWERS), (readings, READINGS))
    )
    settings = {"judge": WordOverlapJudge.name, "rubric": recipe.reward.rubric}
    return Metrics({**build_metrics(*frames, **settings), **JUDGE})


def write_evaluation(folder: Path, parts: Sequence[tuple[list[Row], list[Row]]], recipe: Recipe) -> None:
    """The files of a finished evaluate stage."""
    answers, readings = ([row for part in parts for row in part[place]] for place in (0, 1))
    write_table(folder / "answers.parquet", answers, ANSWERS)
    write_table(folder / "readings.parquet", readings, READINGS)
    write_json(folder / "metrics.json", metrics_of(answers, readings, recipe).data)


def make_recipe(root: Path, algorithms: Sequence[str] = ("tppo", "ppo", "ppo_sum"), **evaluate: Any) -> Recipe:
    return Recipe(
        run_dir=str(root),
        algorithms=list(algorithms),
        prepare=Prepare(source=["log.tsv"]),
        evaluate=Evaluate(**evaluate),
    )


def make_run(
    root: Path,
    algorithms: Sequence[str] = ("tppo", "ppo", "ppo_sum"),
    users: int = 40,
    extra: Sequence[Example] = (),
) -> tuple[Recipe, RunFolder]:
    """Every stage up to `evaluate`, finished, with manifests written by the run folder itself."""
    recipe = make_recipe(root, algorithms)
    run = RunFolder(recipe)
    examples = [*extra, *make_examples(users), *make_examples(users, split="eval2", seed=7)]
    with run.stage("prepare") as (folder, facts):
        write_table(folder / "examples.parquet", [example_row(e) for e in examples], EXAMPLES)
        facts.update({"rows": 12000, "rejects": {"empty text": 12, "bad time": 3}, "users": 4 * users})
    with run.stage("sft") as (folder, facts):
        rows = [{"step": i, "loss": 2.4 + 4 * math.exp(-i / 40), "learning_rate": 1e-4} for i in range(0, 250, 5)]
        rows += [{"step": i, "eval_loss": 2.6 + 3.7 * math.exp(-i / 40)} for i in range(50, 251, 50)]
        _write_jsonl(folder / "metrics.jsonl", rows)
    with run.stage("sample") as (folder, facts):
        facts["responses"] = 1200
    with run.stage("label") as (folder, facts):
        facts.update(
            {"judge": "word-overlap-v1", "labels": 2400, "thresholds": {"targets": {"word": 0.61, "sentence": 0.442}}}
        )
    with run.stage("reward") as (folder, facts):
        _write_jsonl(folder / "metrics.jsonl", _reward_rows())
        facts["token"] = {"best": {"auc": 0.912}}
    with run.stage("check_reward") as (folder, facts):
        report = build_report({"token": _measured("token", 0.91), "sentence": _measured("sentence", 0.66)}, COUNTS,
                              recipe.check_reward)  # fmt: skip
        write_json(folder / "check.json", {"rubric": "targets", "judge": "word-overlap-v1", **report})
        facts["reasons"] = {name: found["reasons"] for name, found in report["models"].items()}
    for number, algorithm in enumerate(algorithms):
        with run.stage(f"rl_{algorithm}") as (folder, facts):
            if algorithm == "dpo":
                _write_jsonl(folder / "metrics.jsonl", _dpo_rows())
                continue
            _write_jsonl(folder / "metrics.jsonl", _rl_rows(algorithm, number))
            _write_jsonl(folder / "samples.jsonl", _token_rows(examples, algorithm))
    with run.stage("evaluate") as (folder, facts):
        parts = []
        for split in ("eval1", "eval2"):
            chosen = [e for e in examples if e.split == split]
            for seed, model in enumerate(("sft", *algorithms, "frequent_next", "nearest", "targets", "other_user")):
                parts.append(made_up_rows(chosen, model, seed))
        write_evaluation(folder, parts, recipe)
    return recipe, run


def example_row(example: Example) -> dict[str, Any]:
    return {**vars(example), "history": [vars(event) for event in example.history]}


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _reward_rows() -> list[dict[str, Any]]:
    rows = []
    for model, top in (("token", 0.92), ("sentence", 0.81)):
        for step in range(0, 130, 16):
            rise = 1 - math.exp(-step / 30)
            row = {"model": model, "step": step, "epoch": step / 32, "split": "reward_eval"}
            row |= {
                "loss": 0.7 - 0.35 * rise,
                "auc": 0.5 + (top - 0.5) * rise,
                "sentence_auc": 0.5 + (top - 0.55) * rise,
            }
            if model == "token":
                row["weighted_auc"] = row["auc"] + 0.02 * rise
            rows += [
                {
                    "model": model,
                    "step": step,
                    "epoch": step / 32,
                    "split": "train",
                    "loss": 0.7 - 0.4 * rise,
                },
                row,
            ]
    return rows


def _measured(kind: str, auc: float) -> dict[str, Any]:
    """What `tppo.reward.gate.measure` gives; a weak rival fails its AUC, and a copied history beats both."""

    def estimate(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05, "examples": 60, "users": 30}

    own = {"token_auc": auc, "weighted_auc": auc + 0.03, "token_f1": 0.6, "token_ece": 0.06} if kind == "token" else {}
    scores = {"real": 0.44, "shuffled": 0.12, "noise": 0.09, "repeated": 0.31, "copied": 0.63, "empty": 0.0}
    beats = {"shuffled": 0.81, "noise": 0.87, "repeated": 0.58, "copied": 0.27}
    return {
        "metrics": {**own, "sentence_auc": auc, "sentence_ece": 0.07},
        "length": {"reward": -0.11, "labels": -0.05, "distance": 0.06, **({"sum": 0.3} if own else {})},
        "probes": {probe: estimate(value) for probe, value in scores.items()},
        "beats": {probe: {**estimate(value), "ties": 0.0} for probe, value in beats.items()},
        "histories_truncated": 0,
    }


def _rl_rows(algorithm: str, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    speed = {"tppo": 1.0, "ppo_sum": 0.75, "ppo": 0.55}[algorithm]
    rows = []
    for update in range(1, 31):
        rise, noise = 1 - math.exp(-update * speed / 14), generator.normal(0, 0.03, 4)
        rows.append(
            {
                "update": update,
                "reward_mean": -4 + 9 * rise + 4 * noise[0],
                "reward_std": 3 - 1.4 * rise,
                "token_reward_mean": -0.3 + 0.8 * rise,
                "sentence_reward_mean": 0.2 + 0.5 * rise + noise[1],
                "token_relevance": 0.3 + 0.45 * rise + noise[2],
                "kl": 6 * speed * rise * update / 20,
                "entropy": 2.6 - 0.9 * rise,
                "response_length": 17 - 3 * rise + 4 * noise[3],
                "queries": 2.7 + 0.2 * rise,
                "unparseable": 0.08 * (1 - rise),
                "clip_fraction": 0.04 + 0.02 * noise[0],
                "explained_variance": 0.5 * rise,
                "policy_loss": -0.02 + 0.1 * noise[1],
                "value_loss": 4 * (1 - 0.7 * rise),
                "loss": 0.4 * (1 - rise),
                "grad_norm": 1.0,
                "learning_rate": 1e-5,
                "seconds": 40.0,
            }
        )
    return rows


def _dpo_rows() -> list[dict[str, Any]]:
    rows = []
    for step in range(1, 41):
        margin = 0.03 * (step - 1)
        measures = {
            "loss": math.log1p(math.exp(-margin)),
            "reward_margin": margin,
            "reward_accuracy": 0.5 + 0.4 * (1 - math.exp(-step / 10)),
            "chosen_reward": 0.4 * margin,
            "rejected_reward": -0.6 * margin,
        }
        rows.append({"step": step, **measures, "learning_rate": 5e-6})
        if step % 20 == 0:
            rows.append({"step": step, **{f"eval_{name}": 0.9 * value for name, value in measures.items()}})
    return rows


def _token_rows(examples: list[Example], algorithm: str) -> list[dict[str, Any]]:
    generator = np.random.default_rng(3)
    rows = []
    for update in (1, 30):
        for example in examples[:3]:
            texts = [piece for query in example.targets for word in query.split() for piece in (" " + word,)]
            rewards = generator.normal(0.2, 0.6, len(texts)) if algorithm == "tppo" else np.zeros(len(texts))
            tokens = [[text, round(float(r), 4), 2 if r > 0 else 1] for text, r in zip(texts, rewards, strict=True)]
            tokens.insert(2, ["\n", 0.0, None])
            tokens.append(["", 0.0 if algorithm == "tppo" else 2.5, 0])
            rows.append({"update": update, "prompt": "p", "response": "r", "tokens": tokens,
                         "reward": sum(t[1] for t in tokens)})  # fmt: skip
    return rows
