"""The check_reward stage: does each reward model know its job? Measured before RL is let loose on it.

On users held out from training (split reward_eval), for the token-level reward model and its rival alike:

1. the labelled responses: AUC, F1 and calibration, by the functions that chose the checkpoint (`train.evaluate`).
   That choice was made on these very rows, so these numbers lean a little to the good side;
2. rank correlation of the reward with the response's length, beside that of the judge's labels;
3. probes (`tppo.judge.probes`): how often the user's real next queries score above responses that should not win.

A response's score is what the model says of the whole: the mean relevance of its tokens
(`metrics.response_relevance`), or the rival's probability. Writes check.json (every number), README.md (the same to
read), and the facts {passed, reasons} that `tppo.reward.gate.require_passed` goes by.

Nothing depends on batch or order beyond rounding; all draws are seeded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr

from tppo.config import CheckReward, Recipe, Rubric
from tppo.errors import UserError
from tppo.evaluate.stats import UserBootstrap, win_tie_lose
from tppo.judge.probes import PROBES, log_words, make_probes
from tppo.reward.align import RELEVANT
from tppo.reward.check_text import print_check, to_markdown
from tppo.reward.data import LabelledResponse, Pair, load_labelled, make_items
from tppo.reward.evaluate import evaluate, mean_relevances, sentence_scores
from tppo.reward.gate import Evidence, assess, reasons
from tppo.reward.models import RewardModel, TokenRewardModel, softmax
from tppo.reward.train import KINDS
from tppo.rl.rewards import class_rewards, reward_values
from tppo.run import RunFolder, write_json, write_text
from tppo.seeding import draw, stream_seed
from tppo.tables import Example, load_examples
from tppo.text import Event

HELD_OUT = "reward_eval"
MEASURES = (
    *("token_auc", "weighted_auc", "token_f1", "token_ece"),
    *("sentence_auc", "sentence_f1", "sentence_ece"),
)
AGAINST = ("shuffled", "noise", "repeated", "copied")
TIE = 0.05
"""Scores (from 0 to 1) closer than this are a tie: where real queries and a probe are both as good as worthless, which
of two numbers near 0 is the larger is nothing that RL could live on."""


@dataclass(frozen=True)
class HeldOut:
    """What the models are measured on: judged responses, and probed examples with one response per probe."""

    rows: list[LabelledResponse]
    examples: list[Example]
    probes: dict[str, list[str | None]]
    relevant_word_share: float
    """Of the training labels: the base rate that the summed reward is centred on."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Measure both reward models; the stage finishes whether they pass or not."""
    settings = recipe.check_reward
    check_settings(settings)
    reward_folder = run.require("reward")
    models = {kind.kind: kind.load(reward_folder / kind.kind) for kind in KINDS}
    rubric = _rubric(models, reward_folder)
    held_out, abstained = load_held_out(recipe, run, rubric)
    bootstrap = UserBootstrap(
        [example.user_id for example in held_out.examples],
        settings.bootstrap_samples,
        stream_seed(recipe.seed, "check_reward"),
    )
    counts = {**_counts(held_out), "abstained": abstained}
    measured = {name: measure(model, held_out, bootstrap, recipe) for name, model in models.items()}
    report = {"rubric": rubric, "judge": run.facts("label")["judge"], **build_report(measured, counts, settings)}
    write_json(folder / "check.json", report)
    write_text(folder / "README.md", to_markdown(report))
    print_check(report)
    return {
        "passed": report["passed"],
        "reasons": {name: found["reasons"] for name, found in report["models"].items()},
        "cautions": {name: found["cautions"] for name, found in report["models"].items()},
        "counts": counts,
    }


def check_settings(settings: CheckReward) -> None:
    """Raise UserError for a number out of range."""
    if settings.bootstrap_samples < 100:
        raise UserError(f"check_reward.bootstrap_samples={settings.bootstrap_samples}: give at least 100")


def build_report(measured: dict[str, dict[str, Any]], counts: dict[str, int], settings: CheckReward) -> dict[str, Any]:
    """Measurements (what `measure` gives, by model) and the verdict on them: {passed, counts, models}."""
    models = {}
    for name, found in measured.items():
        checks = assess(name, _evidence(found, counts), settings)
        models[name] = {
            **found,
            "checks": [check.as_dict() for check in checks],
            "reasons": reasons(checks),
            "cautions": cautions(found["beats"]),
        }
    return {"passed": not any(found["reasons"] for found in models.values()), "counts": counts, "models": models}


def load_held_out(recipe: Recipe, run: RunFolder, rubric: Rubric) -> tuple[HeldOut, int]:
    """Judged responses and probed examples of the held-out users, and how many rows the judge abstained on."""
    prepare = run.require("prepare")
    rows, abstained = load_labelled(run.require("label"), prepare, rubric, HELD_OUT)
    everyone = load_examples(prepare)
    examples = [example for example in everyone if example.split == HELD_OUT]
    if not rows or not examples:
        raise UserError(
            f"{run.root} has {len(examples)} examples and {len(rows)} judged responses of split {HELD_OUT} for rubric "
            f"'{rubric}': raise prepare.reward_eval_share or sample.reward_eval_examples"
        )
    examples = draw(examples, recipe.check_reward.max_examples or None, recipe.seed, "check_reward", "examples")
    seed = stream_seed(recipe.seed, "check_reward", "probes")
    probes = make_probes(examples, log_words(everyone), rubric, recipe.task.num_queries, seed)
    trained_on = run.facts("reward")["train"]
    return HeldOut(rows, examples, probes, trained_on["words_relevant"] / trained_on["words"]), abstained


def measure(model: RewardModel, held_out: HeldOut, bootstrap: UserBootstrap, recipe: Recipe) -> dict[str, Any]:
    """Every number on one reward model: {metrics, length, probes, beats, histories_truncated}."""
    items = make_items(model.tokenizer, held_out.rows, model.max_length)
    found = evaluate(model, items, recipe.reward)
    histories = [example.history for example in held_out.examples]
    scores = {
        probe: _score_some(model, histories, responses, f"{model.kind} reward model: {PROBES[probe]}")
        for probe, responses in held_out.probes.items()
    }
    beats = {}
    for probe in AGAINST:
        compared = win_tie_lose(bootstrap, scores["real"], scores[probe], TIE)
        net = compared.net
        beats[probe] = {
            # A tie counts half, as in an AUC: (1 + win - lose) / 2.
            **{key: None if part is None else (1 + part) / 2 for key, part in _interval(net.as_dict()).items()},
            "examples": net.examples,
            "users": net.users,
            "ties": compared.tie,
        }
    return {
        "metrics": {name: found[name] for name in MEASURES if name in found},
        "length": length_correlations(model, held_out, [item.pair for item in items]),
        "probes": {probe: bootstrap.mean(values).as_dict() for probe, values in scores.items()},
        "beats": beats,
        "histories_truncated": sum(item.pair.dropped > 0 for item in items),
    }


def _interval(estimate: dict[str, Any]) -> dict[str, float | None]:
    return {key: estimate[key] for key in ("value", "low", "high")}


def _score_some(
    model: RewardModel, histories: Sequence[Sequence[Event]], responses: Sequence[str | None], description: str
) -> list[float | None]:
    """Scores of the responses that there are; None for the others."""
    present = [i for i, response in enumerate(responses) if response is not None]
    pairs = model.encode([histories[i] for i in present], [cast(str, responses[i]) for i in present])
    scores: list[float | None] = [None] * len(responses)
    for i, score in zip(present, sentence_scores(model, pairs, description).tolist(), strict=True):
        scores[i] = score
    return scores


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
        probs = [torch.from_numpy(softmax(logits_TC))[None] for logits_TC in logits]
        sums = [class_rewards(probs_1TC, values, "expected").sum().item() for probs_1TC in probs]
        correlations["sum"] = _spearman(sums, length)
        labels = [row.classes.count(RELEVANT) / len(row.classes) if row.classes else 0.0 for row in rows]
    else:
        scores = sentence_scores(model, pairs)
    reward, gold = _spearman(scores.tolist(), length), _spearman(labels, length)
    distance = None if reward is None or gold is None else abs(reward - gold)
    return {"reward": reward, **correlations, "labels": gold, "distance": distance}


def _spearman(values: Sequence[float], lengths: Sequence[float]) -> float | None:
    """None where ranks say nothing: fewer than three rows, or all equal."""
    if len(values) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        # Rounded, so that what differs by floating-point noise only is a tie.
        found = float(spearmanr(np.round(values, 6), lengths).statistic)
    return None if np.isnan(found) else found


def cautions(beats: dict[str, dict[str, Any]]) -> list[str]:
    """What a policy may learn to exploit: probes that win against the real next queries more often than not."""
    return [
        f"{PROBES[probe]}: scores above the user's real next queries in {100 * (1 - found['value']):.0f}% of the "
        "examples, a tie counted half. RL may learn to write that: watch the copy and repeat rates of the evaluation"
        for probe, found in beats.items()
        if found["value"] is not None and found["value"] < 0.5
    ]


def _evidence(measured: dict[str, Any], counts: dict[str, int]) -> dict[str, Evidence]:
    """The measurements under the names of `gate.required`."""
    count = counts["responses"]
    relevant, words = counts["responses_relevant"], counts["words_relevant"]
    rarer = {
        "token_auc": min(words, counts["words"] - words),
        "sentence_auc": min(relevant, count - relevant),
    }
    evidence = {name: Evidence(value, count, rarer.get(name)) for name, value in measured["metrics"].items()}
    evidence["length"] = Evidence(measured["length"]["distance"], count)
    for probe, found in measured["beats"].items():
        evidence[probe] = Evidence(found["value"], found["examples"], None, found["low"], found["high"])
    return evidence


def _counts(held_out: HeldOut) -> dict[str, int]:
    return {
        "responses": len(held_out.rows),
        "responses_relevant": sum(row.sentence_label for row in held_out.rows),
        "words": sum(len(row.classes) for row in held_out.rows),
        "words_relevant": sum(row.classes.count(RELEVANT) for row in held_out.rows),
        "examples_probed": len(held_out.examples),
        "users_probed": len({example.user_id for example in held_out.examples}),
    }


def _rubric(models: dict[str, RewardModel], folder: Path) -> Rubric:
    """The rubric both models learnt.

    Raises:
        UserError: they learnt different ones, or do not say.
    """
    found = {name: model.info.get("rubric") for name, model in models.items()}
    rubric = found["token"]
    if rubric not in ("targets", "history") or set(found.values()) != {rubric}:
        raise UserError(f"{folder}: the reward.json of both models must name the same rubric, and they say {found}")
    return rubric
