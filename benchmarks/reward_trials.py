"""Train reward models for a list of settings and seeds; a finished trial is a line of a JSONL file and is never trained
again. What `reward_study.py` stands on.

A trial is finished when the file holds a line with the same kind of model, the same settings that matter to it, the
same seed and the same labels, whichever study wrote it: the studies share trials. A line holds numbers only, no text.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tppo.core.common import console, rng
from tppo.core.config import Recipe, Reward
from tppo.core.files import read_jsonl, sha256_file
from tppo.core.run import MANIFEST, RunFolder
from tppo.reward.train import KINDS, Labels, check_labels, load_labels, settings_for, train_model

KIND = {kind.kind: kind for kind in KINDS}
RIVALS_NAME = {name: f"sentence_{name}" for name in ("learning_rate", "epochs", "class_ratio")}
"""What a setting of the token model is called for the rival."""
ONLY_TOKEN = ("local_weight", "global_weight", "class_weights", "global_estimator")
ONLY_RIVAL = ("sentence_pooling", "sentence_loss")


@dataclass(frozen=True)
class Data:
    """Labels, and what tells them from others."""

    labels: Labels
    identity: str


@dataclass(frozen=True)
class Trial:
    """One model to train: its kind, its settings under the token model's names (`own_settings`), a seed."""

    kind: str
    settings: Reward
    seed: int

    def identity(self) -> dict[str, Any]:
        """The settings that matter to this kind of model."""
        foreign = {*RIVALS_NAME.values(), *(ONLY_RIVAL if self.kind == "token" else ONLY_TOKEN)}
        return {name: value for name, value in asdict(self.settings).items() if name not in foreign}

    def key(self, data: Data) -> str:
        """Hash of all that the result depends on."""
        text = json.dumps([self.kind, self.identity(), self.seed, data.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def own_settings(kind: str, settings: Reward, **changes: Any) -> Reward:
    """The settings in force for this kind with these changes, all under the token model's names."""
    own = settings_for(KIND[kind], settings)
    return replace(own, sentence_learning_rate=None, sentence_epochs=None, sentence_class_ratio=None, **changes)


def as_flags(kind: str, changes: dict[str, Any]) -> str:
    """How a recipe is given these settings on the command line."""
    names = {name: RIVALS_NAME.get(name, name) if kind == "sentence" else name for name in changes}
    return " ".join(f"--reward.{names[name]} {value}" for name, value in changes.items())


def load_data(recipe: Recipe, max_rows: int | None) -> Data:
    """The labels of a run folder's finished label stage, at most `max_rows` random rows of each split and as large
    a share of the constructed responses as of the sampled ones.

    Raises:
        UserError: the stage is not finished, or its labels cannot be learnt from.
    """
    run = RunFolder(recipe)
    labels = load_labels(run, recipe.reward)
    if max_rows:
        draw = rng(recipe.seed, "max_rows")
        share = min(1.0, max_rows / len(labels.train))
        train, held_out, constructed = (
            [rows[i] for i in sorted(draw.permutation(len(rows))[:limit])]
            for rows, limit in (
                (labels.train, max_rows),
                (labels.held_out, max_rows),
                (labels.constructed, round(share * len(labels.constructed))),
            )
        )
        labels = labels._replace(train=train, held_out=held_out, constructed=constructed)
        check_labels(labels, run.path("label") / "labels.parquet", recipe.reward)
    made_by = [sha256_file(run.require(stage) / MANIFEST) for stage in ("prepare", "label")]
    return Data(labels, json.dumps([*made_by, max_rows]))


def run_trials(trials: Sequence[Trial], data: Data, path: Path, workers: int = 1) -> list[dict[str, Any]]:
    """The lines of these trials, in their order; what `path` does not hold yet is trained and appended to it.

    Args:
        workers: trials trained side by side, each in a process with its share of the threads. Matrices of a small
            encoder keep one core busier than they do two.
    """
    done = finished_trials(path)
    keys = [trial.key(data) for trial in trials]
    todo = {key: trial for key, trial in zip(keys, trials, strict=True) if key not in done}
    console.print(f"{len(set(keys))} trials, {len(set(keys)) - len(todo)} of them finished in {path}")
    for number, (key, row) in enumerate(_trained(todo, data.labels, workers), start=1):
        console.print(f"trial {number} of {len(todo)} finished: {row['kind']}, seed {row['seed']}")
        done[key] = {"key": key, **row}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return [done[key] for key in keys]


def _trained(todo: dict[str, Trial], labels: Labels, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and line of each trial as it finishes."""
    if workers == 1:
        for key, trial in todo.items():
            yield key, train_trial(trial, labels)
        return
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        running = {pool.submit(train_trial, trial, labels): key for key, trial in todo.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def train_trial(trial: Trial, labels: Labels) -> dict[str, Any]:
    """Train one model and forget it: its settings, the facts of the stage's manifest, its held-out curve."""
    curve: list[dict[str, Any]] = []

    def log(row: dict[str, Any]) -> None:
        if row["split"] == "reward_eval":
            curve.append({name: value for name, value in row.items() if name != "split"})

    _, _, facts = train_model(KIND[trial.kind], labels, trial.settings, trial.seed, log)
    gc.collect()  # the model hangs in reference cycles: free it before the next one is loaded
    return {"kind": trial.kind, "seed": trial.seed, "settings": trial.identity(), "facts": facts, "curve": curve}


def finished_trials(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of the file by key; a last line cut off by a kill is taken off the file."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
    return {row["key"]: row for row in read_jsonl(path)}
