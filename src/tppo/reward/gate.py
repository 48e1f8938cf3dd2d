"""The check_reward stage, the gate before RL: does each reward model know its job?

Measured on users held out from training (split reward_eval), for the token-level reward model and its rival alike:

1. the labelled responses: AUC, F1 and calibration, by the function that chose the checkpoint (`metrics.evaluate`).
   That choice was made on these very rows, so these numbers lean a little to the good side;
2. rank correlation of the reward with the response's length, beside that of the judge's labels;
3. probes (`tppo.judge.probes`): how often the user's real next queries score above responses that should not win.

A response's score is what the model says of the whole: the mean relevance of its tokens
(`metrics.response_relevance`), or the rival's probability.

The measurements are held against the thresholds of `CheckReward`. A requirement that cannot be told (too few rows, a
number that is not defined) is not met: silence is no pass. Writes check.json (every number), README.md (the same to
read), and the facts {passed, reasons} that `require_passed` lets RL start by.

Nothing depends on batch or order beyond rounding; all draws are seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import spearmanr

from tppo.core.common import UserError, console, stream_seed
from tppo.core.config import RL, CheckReward, Recipe, Reward, Rubric
from tppo.core.files import write_json, write_text
from tppo.core.run import RunFolder
from tppo.core.show import Cell, Table, digits, interval, number
from tppo.core.stats import IntervalEstimate, UserBootstrap, estimate, win_tie_lose
from tppo.core.tables import Example, drawn_examples, load_examples
from tppo.core.text import Event
from tppo.judge.probes import PROBES, log_words, make_probes
from tppo.reward.align import RELEVANT
from tppo.reward.data import LabelledResponse, Pair, load_labelled, make_items
from tppo.reward.metrics import class_rewards, evaluate, mean_relevances, reward_values, sentence_scores
from tppo.reward.models import RewardModel, TokenRewardModel
from tppo.reward.train import KINDS

Status = Literal["passed", "failed", "cannot be told", "not required"]
TITLES = {"token": "token-level reward model", "sentence": "sentence-level reward model"}
REQUIREMENTS = {
    "token_auc": ("token AUC", "min_token_auc"),
    "sentence_auc": ("sentence AUC", "min_sentence_auc"),
    "token_ece": ("calibration error of words (ECE)", "max_ece"),
    "sentence_ece": ("calibration error of responses (ECE)", "max_ece"),
    "length": ("rank correlation with length, distance from the labels'", "max_length_correlation"),
    "shuffled": ("real above another user's queries", "min_real_over_shuffled"),
    "noise": ("real above random words", "min_real_over_noise"),
    "repeated": ("real above one word repeated", "min_real_over_repeated"),
    "copied": ("real above a copied history", "min_real_over_copied"),
}
"""Name of a measurement -> how it is called and the setting that limits it."""
NOT_ASKED = {"token": ("sentence_ece",), "sentence": ("token_auc", "token_ece")}
"""Each model is held to the calibration of what it pays with: words in one, responses in the other."""
AGAINST = ("shuffled", "noise", "repeated", "copied")
"""Probes that the user's real next queries should win against."""
MEASURES = ("token_auc", "weighted_auc", "token_f1", "token_ece", "sentence_auc", "sentence_f1", "sentence_ece")
HELD_OUT = "reward_eval"
MIN_RESPONSES = 30
"""Fewest held-out responses, and probed examples, to judge from; fewer cannot tell, which counts as failed: an AUC of
30 responses has a standard error of about 0.1, as large as what the gate tells apart."""
MIN_CLASS_COUNT = 5
"""Fewest held-out words, and responses, of each label (relevant, irrelevant) for an AUC; fewer cannot tell."""
BOOTSTRAP_SAMPLES = 1000
"""Resamples of users for the 95% intervals, which are shown; the thresholds are for the values."""
TIE = 0.05
"""Scores (from 0 to 1) closer than this are a tie: where real queries and a probe are both as good as worthless, which
of two numbers near 0 is the larger is nothing that RL could live on."""
_MOST = 2.0  # no calibration error and no distance of correlations is larger


@dataclass(frozen=True)
class Evidence:
    """What a requirement is judged by: the number, its interval, and how much data it rests on."""

    value: float | None
    responses: int
    smallest_class: int | None = None
    """Rows of the rarer label, where the number needs both; else None."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """What the models are measured on: judged responses, and probed examples with one response per probe."""

    rows: list[LabelledResponse]
    examples: list[Example]
    probes: dict[str, list[str | None]]
    relevant_word_share: float
    """Of the training labels: the base rate that the summed reward is centred on."""


def require_passed(recipe: Recipe, run: RunFolder, config: RL) -> dict[str, Any]:
    """The verdict on the reward model that pays `config.algorithm`: {model, passed, reasons}.

    Raises:
        UserError: the check has not been made, was made of another reward stage, or failed and
            `check_reward.allow_failed` does not let RL start all the same.
    """
    folder = run.require_current("check_reward")
    model = "sentence" if config.algorithm == "ppo" and config.sentence_reward == "rival" else "token"
    why = run.facts("check_reward")["reasons"][model]
    told = f"the {TITLES[model]}, which pays {config.algorithm}, did not pass its check:\n  - " + "\n  - ".join(why)
    if why and not recipe.check_reward.allow_failed:
        raise UserError(
            f"{told}\nAll numbers: {folder / 'README.md'}. Make a better reward model (more labels: "
            "sample.train_examples; longer: reward.epochs; another reward.encoder or reward.rubric), hold out more "
            "rows where it cannot be told (sample.reward_eval_examples), or lower the named threshold and give "
            "`--redo check_reward`. `--check_reward.allow_failed true` starts RL all the same"
        )
    if why:
        console.print(f"check_reward.allow_failed: RL starts although {told}", markup=False)
    return {"model": model, "passed": not why, "reasons": why}


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Measure both reward models, of one rubric; the stage finishes whether they pass or not."""
    settings = recipe.check_reward
    reward_folder = run.require("reward")
    models = {kind.kind: kind.load(reward_folder / kind.kind) for kind in KINDS}
    rubrics = {name: model.info.get("rubric") for name, model in models.items()}
    rubric: Any = rubrics["token"]
    if rubric not in get_args(Rubric) or rubrics["sentence"] != rubric:
        raise UserError(
            f"{reward_folder}: the reward.json of both models must name the same rubric, and they say {rubrics}"
        )
    held_out, abstained = load_held_out(run, rubric, settings.max_examples, recipe.task.num_queries, recipe.seed)
    users = [example.user_id for example in held_out.examples]
    bootstrap = UserBootstrap(users, BOOTSTRAP_SAMPLES, stream_seed(recipe.seed, "check_reward"))
    counts = {**_counts(held_out), "abstained": abstained}
    measured = {name: measure(model, held_out, bootstrap, recipe.reward) for name, model in models.items()}
    report = {"rubric": rubric, "judge": run.facts("label")["judge"], **build_report(measured, counts, settings)}
    write_json(folder / "check.json", report)
    write_text(folder / "README.md", to_markdown(report))
    console.print(QUESTION)
    requirement_table(report).print()
    for line in (*verdict_lines(report), *caution_lines(report)):
        console.print(line, markup=False)
    return {
        "passed": report["passed"],
        **{part: {name: found[part] for name, found in report["models"].items()} for part in ("reasons", "cautions")},
        "counts": counts,
    }


def load_held_out(
    run: RunFolder, rubric: Rubric, max_examples: int, num_queries: int, seed: int
) -> tuple[HeldOut, int]:
    """Judged responses and probed examples of the held-out users, and how many rows the judge abstained on.

    Args:
        max_examples: examples that are probed; 0 means all.
        num_queries: queries in a response of one repeated word.
    """
    prepare = run.require("prepare")
    rows, abstained = load_labelled(run.require("label"), prepare, rubric, HELD_OUT)
    examples = list(drawn_examples(prepare, HELD_OUT, max_examples or None, seed, "check_reward", "examples"))
    if not rows or not examples:
        raise UserError(
            f"{run.root} has {len(examples)} examples and {len(rows)} judged responses of split {HELD_OUT} for rubric "
            f"'{rubric}': raise prepare.reward_eval_share or sample.reward_eval_examples"
        )
    seed = stream_seed(seed, "check_reward", "probes")
    probes = make_probes(examples, log_words(load_examples(prepare)), rubric, num_queries, seed)
    trained_on = run.facts("reward")["train"]
    return HeldOut(rows, examples, probes, trained_on["words_relevant"] / trained_on["words"]), abstained


def _counts(held_out: HeldOut) -> dict[str, int]:
    return {
        "responses": len(held_out.rows),
        "responses_relevant": sum(row.sentence_label for row in held_out.rows),
        "words": sum(len(row.classes) for row in held_out.rows),
        "words_relevant": sum(row.classes.count(RELEVANT) for row in held_out.rows),
        "examples_probed": len(held_out.examples),
        "users_probed": len({example.user_id for example in held_out.examples}),
    }


def measure(model: RewardModel, held_out: HeldOut, bootstrap: UserBootstrap, settings: Reward) -> dict[str, Any]:
    """Every number on one reward model: {metrics, length, probes, beats, histories_truncated}."""
    items = make_items(model.tokenizer, held_out.rows, model.max_length)
    found = evaluate(model, items, settings)
    histories = [example.history for example in held_out.examples]
    scores = {
        probe: _score_some(model, histories, responses, f"{model.kind} reward model: {PROBES[probe]}")
        for probe, responses in held_out.probes.items()
    }
    beats = {}
    for probe in AGAINST:
        compared = win_tie_lose(bootstrap, scores["real"], scores[probe], TIE)
        share = compared.net.as_dict()
        for part in ("value", "low", "high"):
            # Win minus lose -> win, a tie counted half as in an AUC.
            share[part] = None if share[part] is None else (1 + share[part]) / 2
        beats[probe] = {**share, "ties": compared.tie}
    return {
        "metrics": {name: found[name] for name in MEASURES if name in found},
        "length": length_correlations(model, held_out, items),
        "probes": {probe: bootstrap.mean(values).as_dict() for probe, values in scores.items()},
        "beats": beats,
        "histories_truncated": sum(item.dropped > 0 for item in items),
    }


def _score_some(
    model: RewardModel, histories: Sequence[Sequence[Event]], responses: Sequence[str | None], description: str
) -> list[float | None]:
    """Scores of the responses that there are; None for the others."""
    rows = zip(histories, responses, strict=True)
    present = [(history, response) for history, response in rows if response is not None]
    pairs = model.encode([history for history, _ in present], [response for _, response in present])
    scores = iter(sentence_scores(model, pairs, description).tolist())
    return [None if response is None else next(scores) for response in responses]


def length_correlations(model: RewardModel, held_out: HeldOut, pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Spearman's correlations with the response's length in words, over the labelled responses, encoded as `pairs`.

    reward: what the model says of the response. labels: the judge's share of relevant words (token model) or its
    sentence label (rival). distance: between these two. sum: of the token rewards as RL sums them by default
    (`base_rate`, expected); the rival has none.
    """
    rows = held_out.rows
    length = [len(row.words) for row in rows]
    labels: list[float] = [row.sentence_label for row in rows]
    correlations: dict[str, float | None] = {}
    if isinstance(model, TokenRewardModel):
        logits = model.response_logits(pairs)
        scores = mean_relevances(logits)
        values = reward_values("base_rate", held_out.relevant_word_share)
        probs = [torch.from_numpy(softmax(logits_TC, axis=-1))[None] for logits_TC in logits]
        sums = [class_rewards(probs_1TC, values, "expected").sum().item() for probs_1TC in probs]
        correlations["sum"] = _spearman(sums, length)
        labels = [row.classes.count(RELEVANT) / len(row.classes) if row.classes else 0.0 for row in rows]
    else:
        scores = sentence_scores(model, pairs)
    reward, gold = _spearman(scores, length), _spearman(labels, length)
    distance = None if reward is None or gold is None else abs(reward - gold)
    return {"reward": reward, **correlations, "labels": gold, "distance": distance}


def _spearman(values: np.ndarray | Sequence[float], lengths: Sequence[float]) -> float | None:
    """None where ranks say nothing: fewer than three rows, or all equal."""
    values = np.round(values, 6)  # so that what differs by floating-point noise only is a tie
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(lengths) == 0:
        return None
    return float(spearmanr(values, lengths).statistic)


def build_report(measured: dict[str, dict[str, Any]], counts: dict[str, int], settings: CheckReward) -> dict[str, Any]:
    """Measurements (what `measure` gives, by model) and the verdict on them: {passed, counts, models}."""
    models = {}
    for name, found in measured.items():
        checks = assess(name, _evidence(found, counts), settings)
        models[name] = {
            **found,
            "checks": checks,
            "reasons": reasons(checks),
            "cautions": cautions(found["beats"]),
        }
    return {"passed": not any(found["reasons"] for found in models.values()), "counts": counts, "models": models}


def _evidence(measured: dict[str, Any], counts: dict[str, int]) -> dict[str, Evidence]:
    """The measurements under the names of `REQUIREMENTS`."""
    count = counts["responses"]
    relevant, words = counts["responses_relevant"], counts["words_relevant"]
    rarer = {"token_auc": min(words, counts["words"] - words), "sentence_auc": min(relevant, count - relevant)}
    evidence = {name: Evidence(value, count, rarer.get(name)) for name, value in measured["metrics"].items()}
    evidence["length"] = Evidence(measured["length"]["distance"], count)
    for probe, found in measured["beats"].items():
        evidence[probe] = Evidence(found["value"], found["examples"], None, found["low"], found["high"])
    return evidence


def assess(model: str, evidence: dict[str, Evidence], settings: CheckReward) -> list[dict[str, Any]]:
    """Hold the measurements of a reward model against what is required of it.

    Returns:
        One row per requirement: model, name, value, low, high, setting, limit, status, reason (why it is not met; None
        when it is, or when nothing is required), label.
    """
    checks = []
    for name, (label, setting) in REQUIREMENTS.items():
        if name in NOT_ASKED[model]:
            continue
        found, limit = evidence[name], getattr(settings, setting)
        status, why = _judge(found, setting, limit)
        checks.append(
            {
                **{"model": model, "name": name, "value": found.value, "low": found.low, "high": found.high},
                **{"setting": setting, "limit": limit, "status": status},
                **{"reason": f"{label}: {why}" if why else None, "label": label},
            }
        )
    return checks


def _judge(found: Evidence, setting: str, limit: float) -> tuple[Status, str | None]:
    at_least = setting.startswith("min_")
    if limit <= 0 if at_least else limit >= _MOST:
        return "not required", None
    few = found.responses < MIN_RESPONSES
    if few or (found.smallest_class is not None and found.smallest_class < MIN_CLASS_COUNT):
        rarer = "" if found.smallest_class is None else f", {found.smallest_class} rows of the rarer label"
        return "cannot be told", (
            f"cannot be told from {found.responses} held-out responses{rarer} "
            f"(it takes {MIN_RESPONSES}, and {MIN_CLASS_COUNT} of the rarer label)"
        )
    if found.value is None:
        return "cannot be told", "not defined, since all its rewards (or all lengths, or all labels) are equal"
    if found.value >= limit if at_least else found.value <= limit:
        return "passed", None
    asked = "at least" if at_least else "at most"
    return "failed", f"{found.value:.3f}, and check_reward.{setting} asks for {asked} {limit:g}"


def reasons(checks: Sequence[dict[str, Any]]) -> list[str]:
    """Why the gate is closed; empty when it is open."""
    return [check["reason"] for check in checks if check["reason"]]


def cautions(beats: dict[str, dict[str, Any]]) -> list[str]:
    """What a policy may learn to exploit: probes that win against the real next queries more often than not."""
    return [
        f"{PROBES[probe]}: scores above the user's real next queries in {100 * (1 - found['value']):.0f}% of the "
        "examples, a tie counted half. RL may learn to write that: watch the copy and repeat rates of the evaluation"
        for probe, found in beats.items()
        if found["value"] is not None and found["value"] < 0.5
    ]


# check.json in words, for the console, README.md and the run's report.

QUESTION = "Do the reward models know their job?"
TONES = {"passed": "good", "failed": "bad", "cannot be told": "bad"}
ASIDE = (
    ("metrics", "weighted_auc", "weighted AUC, three classes"),
    ("metrics", "token_f1", "F1 of words"),
    ("metrics", "sentence_f1", "F1 of responses"),
    ("length", "reward", "rank correlation with length: reward"),
    ("length", "labels", "rank correlation with length: the judge's labels"),
    ("length", "sum", "rank correlation with length: summed reward (`base_rate`)"),
)
NOTE = (
    "AUC: chance that a relevant word (or response) scores above an irrelevant one. Real above ...: share of examples "
    "in which the user's real next queries score higher for the same history, a tie (within 0.05) counted half. "
    "Brackets: 95%, bootstrap over users. The checkpoint was chosen by AUC on these held-out responses, so the AUCs "
    "lean a little to the good side."
)


def requirement_table(report: dict[str, Any]) -> Table:
    """What is asked of the models, and how they stand to it."""
    by_model = {model: {check["name"]: check for check in report["models"][model]["checks"]} for model in TITLES}
    rows: list[list[Cell | str]] = []
    for name, (label, _) in REQUIREMENTS.items():
        checks = [by_model[model].get(name) for model in TITLES]
        one = next(check for check in checks if check)
        sign = "≥" if one["setting"].startswith("min_") else "≤"
        asked = "-" if one["status"] == "not required" else f"{sign} {one['limit']:g}"
        rows.append([label, asked, *(_check_cell(check) if check else Cell() for check in checks)])
    return _table("Requirements", "Requirement", rows)


def _check_cell(check: dict[str, Any]) -> Cell:
    detail = interval(IntervalEstimate(check["value"], check["low"], check["high"]))
    said = "" if check["status"] == "not required" else check["status"]
    return Cell(digits(check["value"]), detail, said, TONES.get(said, ""))


def aside_table(report: dict[str, Any]) -> Table:
    """Numbers nothing is required of; an empty cell where a model has none."""
    rows: list[list[Cell | str]] = []
    for part, name, label in ASIDE:
        found = [report["models"][model][part] for model in TITLES]
        rows.append([label, "", *(digits(values[name]) if name in values else "" for values in found)])
    return _table("Other numbers", "Nothing required", rows)


def probe_table(report: dict[str, Any]) -> Table:
    """Mean score of each probe."""
    rows: list[list[Cell | str]] = []
    for probe, label in PROBES.items():
        found = [estimate(report["models"][model]["probes"][probe]) for model in TITLES]
        rows.append([label, "", *(Cell(number(score.value), interval(score)) for score in found)])
    return _table("Mean score of a response", "Mean score of a response", rows)


def _table(title: str, head: str, rows: Sequence[Sequence[Cell | str]]) -> Table:
    return Table([head, "Asked", "Token level", "Sentence level"], rows, title)


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """One sentence per model, with the reasons of a failure."""
    lines = []
    for model, title in TITLES.items():
        why = report["models"][model]["reasons"]
        lines.append(f"The {title} {'failed: ' + '; '.join(why) if why else 'passed'}.")
    return lines


def caution_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"{title.capitalize()}: {caution}."
        for model, title in TITLES.items()
        for caution in report["models"][model]["cautions"]
    ]


def data_line(report: dict[str, Any]) -> str:
    counts = report["counts"]
    return (
        f"Users held out from reward training; rubric `{report['rubric']}`, judge {report['judge']}. "
        f"{counts['responses']} judged responses ({counts['responses_relevant']} relevant) with {counts['words']} "
        f"words ({counts['words_relevant']} relevant), {counts['abstained']} abstentions left out; "
        f"{counts['examples_probed']} examples of {counts['users_probed']} users probed."
    )


def to_markdown(report: dict[str, Any]) -> str:
    """The check as a page of numbers, without any text of the log."""
    lines = [f"# {QUESTION}", "", *[f"- {line}" for line in verdict_lines(report)], ""]
    lines += [data_line(report), ""]
    if found := caution_lines(report):
        lines += ["Cautions:", *[f"- {line}" for line in found], ""]
    lines += [table(report).markdown() for table in (requirement_table, aside_table, probe_table)]
    return "\n".join([*lines, NOTE, ""])
