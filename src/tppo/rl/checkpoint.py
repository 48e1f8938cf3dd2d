"""Resumable state of an RL run (files: `tppo.core.checkpoint`).

Everything random in an update depends on (seed, update) alone, so weights, optimizer moments, the adaptive KL
coefficient, the probe's sums, the kept policies and the number of updates done are the whole state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tppo.core import checkpoint
from tppo.core.checkpoint import newest_checkpoint, read_state, read_tensors, write_checkpoint
from tppo.core.common import UserError
from tppo.core.config import RL_DISPLAY
from tppo.core.run import without_retired
from tppo.rl.guards import KeptPolicy
from tppo.rl.policy import load_training_state, training_state
from tppo.rl.trainer import TokenPPOTrainer

_MAY_CHANGE = ("updates", "save_every", "keep_checkpoints", "tracker_project", *RL_DISPLAY)
"""Settings, of today or of before, that do not change what an update does."""


def save_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> Path:
    """Write `folder/checkpoint-<updates>` and remove all but the newest `keep_checkpoints`.

    Raises:
        OSError: it cannot be written; older checkpoints are untouched.
    """
    tensors = training_state(trainer.policy, trainer.optimizer)
    tensors |= {name: kept.weights for name, kept in trainer.kept.items()}
    state = {
        "update": trainer.update,
        "kl_coef": trainer.kl_coef,
        "seed": trainer.seed,
        "config": asdict(trainer.config),
        "kept": {name: {"update": kept.update, "value": kept.value} for name, kept in trainer.kept.items()},
    }
    return write_checkpoint(folder, trainer.update, tensors, state, trainer.config.keep_checkpoints)


def load_newest_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> bool:
    """Restore the newest undamaged checkpoint of `folder` into the trainer; False when there is none.

    Raises:
        UserError: it was made with other settings, or for another model.
    """
    path = newest_checkpoint(folder)
    if path:
        _restore(trainer, path)
    return path is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left: half a checkpoint, half a saved model."""
    checkpoint.remove_leftovers(folder)
    for path in folder.glob(".model-*"):
        shutil.rmtree(path)


def remove_checkpoints(folder: Path, keep: int = 0) -> None:
    """Delete all but the newest ones, and leftovers."""
    checkpoint.remove_checkpoints(folder, keep)
    remove_leftovers(folder)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines and bring them to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def cut_rows_after(path: Path, update: int) -> None:
    """Cut a jsonl file back to the rows of the first `update` updates: those after a checkpoint are made again.

    A line that a kill cut off is dropped with them. The file is shortened in place, so a kill here does no harm.

    Raises:
        UserError: rows that the checkpoint counts on are missing.
    """
    last, size = 0, 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row_update = json.loads(line)["update"] if line.endswith(b"\n") else update + 1
            except ValueError:  # no JSON, or no UTF-8
                break
            if row_update > update:
                break
            last, size = row_update, size + len(line)
        os.truncate(path, size)
    if last != update:
        raise UserError(
            f"{path} ends at update {last}, but the checkpoint beside it is of update {update}: "
            f"delete {path.parent} to train anew"
        )


def _restore(trainer: TokenPPOTrainer, path: Path) -> None:
    state = read_state(path)
    now = {"seed": trainer.seed, **asdict(trainer.config)}
    then = {"seed": state["seed"], **without_retired({"rl": state["config"]})["rl"]}
    changed = [
        f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
        for name in now | then
        if name not in _MAY_CHANGE and now.get(name) != then.get(name)
    ]
    if changed:
        raise UserError(f"{path} was made with other settings ({'; '.join(changed)}): give them, or another folder")
    saved = {name: read_tensors(path, name) for name in ("policy", "optimizer")}
    live = training_state(trainer.policy, trainer.optimizer)
    shapes, expected = ({n: t.shape for n, t in state["policy"].items()} for state in (saved, live))
    if shapes != expected:
        raise UserError(f"{path} belongs to another model than the policy: give another folder, or delete it")
    load_training_state(trainer.policy, trainer.optimizer, saved)
    for name, facts in state["kept"].items():
        trainer.kept[name] = KeptPolicy(**facts, weights=read_tensors(path, name))
    trainer.kl_coef = state["kl_coef"]
    trainer.update = state["update"]
