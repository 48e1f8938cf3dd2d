"""The reward stage: labels -> a token-level reward model and its sentence-level rival.

Both see the same rows in the same order from the same encoder; number of passes, learning rate and class balance are
the same unless the rival is given its own (`reward.sentence_*`); both keep the checkpoint with the best AUC on held-out
users. Writes token/, sentence/ (model folders) and metrics.jsonl: rows {model, step, epoch, split, ...}, split `train`
per optimiser step and `reward_eval` per evaluation. An unfinished attempt is done anew: it is a matter of minutes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tppo.config import Recipe, Reward
from tppo.errors import UserError
from tppo.models import load_encoder_path
from tppo.progress import console
from tppo.reward.align import IRRELEVANT, RELEVANT
from tppo.reward.card import label_facts, suggested_length
from tppo.reward.data import Item, LabelledResponse, load_constructed, load_labelled, make_items
from tppo.reward.evaluate import sentence_check, sentence_scores
from tppo.reward.fit import Log, fit, settings_for
from tppo.reward.models import RewardModel, SentenceRewardModel, TokenRewardModel
from tppo.run import RunFolder
from tppo.seeding import seed_everything

KINDS: tuple[type[RewardModel], ...] = (TokenRewardModel, SentenceRewardModel)


class Labels(NamedTuple):
    """Judged responses."""

    train: list[LabelledResponse]
    """Sampled ones to learn from."""
    held_out: list[LabelledResponse]
    """Sampled ones of held-out users."""
    abstained: dict[str, int]
    """How many the judge abstained on, by split, and of the constructed ones."""
    constructed: list[LabelledResponse]
    """Constructed ones to learn from (`label.constructed`)."""


class Trained(NamedTuple):
    """A reward model as its best checkpoint, and what is to be said of it."""

    model: RewardModel
    train_items: list[Item]
    """The sampled responses it has learnt from, encoded."""
    facts: dict[str, Any]
    """best (held-out metrics), steps, planned_steps, sentence_auc, score_std, collapsed, why, histories_truncated,
    seconds."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train both reward models on the labels; returns facts for the manifest."""
    settings = recipe.reward
    labels = load_labels(recipe, run)
    for kind in KINDS:
        shutil.rmtree(folder / kind.kind, ignore_errors=True)
    facts: dict[str, Any] = {
        "abstained": labels.abstained,
        "train": _describe(labels.train),
        "constructed": _describe(labels.constructed),
        "reward_eval": _describe(labels.held_out),
    }
    described = {**label_facts(run), **{name: facts[name] for name in ("train", "constructed", "reward_eval")}}
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for kind in KINDS:

            def log(row: dict[str, Any], name: str = kind.kind) -> None:
                file.write(json.dumps({"model": name, **row}) + "\n")
                file.flush()

            trained = train_model(kind, labels, settings, recipe.seed, log)
            sl = suggested_length(labels.train, trained.train_items, recipe.task.num_queries)
            trained.model.save(
                folder / kind.kind, rubric=settings.rubric, metrics=trained.facts["best"], sl=sl, **described
            )
            facts[kind.kind] = trained.facts
            if trained.facts["collapsed"] is not False:
                _warn(kind, trained.facts)
    return facts


def load_labels(recipe: Recipe, run: RunFolder) -> Labels:
    """Labels of a run's finished label stage for `reward.rubric`.

    Raises:
        UserError: settings that make no sense, a stage that is not finished, or labels that cannot be learnt from.
    """
    settings = recipe.reward
    check_settings(settings)
    label, prepare = run.require("label"), run.require("prepare")
    train_rows, train_abstained = load_labelled(label, prepare, settings.rubric, "train")
    eval_rows, eval_abstained = load_labelled(label, prepare, settings.rubric, "reward_eval")
    constructed, constructed_abstained = load_constructed(label, prepare, settings.rubric)
    abstained = {"train": train_abstained, "reward_eval": eval_abstained, "constructed": constructed_abstained}
    labels = Labels(train_rows, eval_rows, abstained, constructed)
    check_labels(labels, label / "labels.parquet", settings)
    return labels


def train_model(kind: type[RewardModel], labels: Labels, settings: Reward, seed: int, log: Log) -> Trained:
    """One reward model from the start encoder, seeded; `log` gets the rows of metrics.jsonl."""
    settings = settings_for(kind, settings)
    seed_everything(seed, "reward")
    start = time.monotonic()
    reward_model = kind.start(
        load_encoder_path(settings.encoder),
        settings.max_length,
        longformer_window=settings.attention_window if settings.to_longformer else None,
        global_attention=settings.global_attention,
        dropout=settings.dropout,
        layers=settings.encoder_layers,
    )
    if isinstance(reward_model, SentenceRewardModel):
        reward_model.use_pooling(settings.sentence_pooling)
    train_items = make_items(reward_model.tokenizer, labels.train, settings.max_length)
    constructed_items = make_items(reward_model.tokenizer, labels.constructed, settings.max_length)
    eval_items = make_items(reward_model.tokenizer, labels.held_out, settings.max_length)
    result = fit(reward_model, [*train_items, *constructed_items], eval_items, settings, seed, log)
    reward_model.info["encoder"] = settings.encoder
    check = sentence_check(
        sentence_scores(reward_model, [item.pair for item in eval_items]),
        np.array([item.label for item in eval_items]),
        [row.user_id for row in labels.held_out],
    )
    cut = sum(item.pair.dropped > 0 for item in [*train_items, *constructed_items, *eval_items])
    seconds = round(time.monotonic() - start, 1)
    facts = {**result._asdict(), **check, "histories_truncated": cut, "seconds": seconds}
    return Trained(reward_model, train_items, facts)


def _warn(kind: type[RewardModel], facts: dict[str, Any]) -> None:
    if facts["collapsed"]:
        console.print(
            f"[bold red]WARNING: the {kind.kind} reward model has collapsed[/]: {facts['why']}. Results of PPO on it "
            "say nothing about sentence-level rewards. Search its settings (benchmarks/reward_study.py search) or "
            "label more responses."
        )
    else:
        console.print(
            f"[bold yellow]Nobody can tell whether the {kind.kind} reward model has collapsed[/]: {facts['why']}"
        )


def check_settings(settings: Reward) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: names the setting.
    """
    for name, least in (
        ("epochs", 1),
        ("sentence_epochs", 1),
        ("batch_size", 1),
        ("evals_per_epoch", 1),
        ("patience", 0),
        ("encoder_layers", 0),
    ):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"reward.{name}={value} must be at least {least}")
    for name in ("class_ratio", "sentence_class_ratio"):
        value = getattr(settings, name)
        if value is not None and value < 1 and value != 0:
            raise UserError(f"reward.{name}={value} must be at least 1, or 0 (no balance)")
    if settings.dropout is not None and not 0 <= settings.dropout < 1:
        raise UserError(f"reward.dropout={settings.dropout} must be at least 0 and below 1, or null")
    for name in ("learning_rate", "sentence_learning_rate"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"reward.{name}={value} must be above 0")
    weights = settings.class_weights
    if len(weights) != 3 or min(weights) <= 0:
        raise UserError(f"reward.class_weights={weights} must be three positive numbers, for classes 0, 1 and 2")
    parts = (settings.local_weight, settings.global_weight)
    if min(parts) < 0 or max(parts) == 0:
        raise UserError(f"reward.local_weight and global_weight are {parts}: none may be negative, one positive")


def check_labels(labels: Labels, path: Path, settings: Reward) -> None:
    """Refuse to train on what cannot be learnt from.

    Raises:
        UserError: a split without rows, or training rows of one class only; names `path`, where they are from.
    """
    train = labels.train
    for split, rows in (("train", train), ("reward_eval", labels.held_out)):
        if not rows:
            raise UserError(
                f"{path} holds no judged response of split {split} for reward.rubric={settings.rubric}: "
                "draw more (sample.train_examples, sample.reward_eval_examples) and label them"
            )
    for level, seen in (
        ("word", {c == RELEVANT for row in train for c in row.classes}),
        ("response", {row.sentence_label == 1 for row in train}),
    ):
        if len(seen) < 2:
            only = "none at all" if not seen else "only relevant ones" if True in seen else "only irrelevant ones"
            raise UserError(
                f"{path}: of the {len(train)} training rows for reward.rubric={settings.rubric}, {level} "
                f"labels of both classes are needed and there are {only}. Draw more (sample.train_examples), "
                "train the policy longer (sft.max_examples), use the other reward.rubric, or lower "
                "label.null_quantile"
            )


def _describe(rows: Sequence[LabelledResponse]) -> dict[str, Any]:
    classes = [c for row in rows for c in row.classes]
    return {
        "responses": len(rows),
        "responses_relevant": sum(row.sentence_label for row in rows),
        "words": len(classes),
        "words_relevant": classes.count(RELEVANT),
        "words_irrelevant": classes.count(IRRELEVANT),
    }
