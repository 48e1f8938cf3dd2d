"""Resumable state of an RL run (files: `tppo.core.checkpoint`).

Everything random in an update depends on (seed, update) alone, so weights, optimizer moments, the adaptive KL
coefficient, the probe's sums, the kept policies and the number of updates done are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tppo.core import checkpoint
from tppo.core.changes import of_before, without_retired
from tppo.core.checkpoint import newest_checkpoint, read_state, read_tensors, write_checkpoint
from tppo.core.common import UserError
from tppo.core.config import RL_DISPLAY
from tppo.core.files import write_json
from tppo.core.models import SAVED
from tppo.rl.guards import KeptPolicy
from tppo.rl.policy import load_training_state, training_state
from tppo.rl.trainer import TokenPPOTrainer

RUN = "run.json"
"""What the run in a folder is: seed, settings, prompts, start weights."""
_SAMPLED = 256
"""Numbers of each weight matrix that tell one start model from another."""
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
        **run_identity(trainer),
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
    """Delete what a killed writer left: half a checkpoint, half a saved model. Whatever else has such a name stays."""
    checkpoint.remove_leftovers(folder)
    for path in folder.glob(".model-*"):
        if path.is_dir() and ((path / SAVED).exists() or not any(path.iterdir())):
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


def size_until(path: Path, update: int) -> int:
    """Bytes of the rows of the first `update` updates in a jsonl file; a line that a kill cut off is not one of them.

    Raises:
        UserError: rows that the checkpoint counts on are missing, or a row is none of ours.
    """
    last, size = 0, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line) if line.endswith(b"\n") else {"update": update + 1}
        except ValueError:  # no JSON, or no UTF-8
            break
        row_update = row.get("update") if isinstance(row, dict) else None
        if type(row_update) is not int or row_update < last:
            raise UserError(f"{path} holds a row after update {last} that no run has written: move the file elsewhere")
        if row_update > update:
            break
        last, size = row_update, size + len(line)
    if last != update:
        raise UserError(
            f"{path} ends at update {last}, but the checkpoint beside it is of update {update}: "
            f"delete {path.parent} to train anew"
        )
    return size


def cut_rows_after(path: Path, update: int) -> None:
    """Cut a jsonl file back to the rows of the first `update` updates: those after a checkpoint are made again.

    A line that a kill cut off is dropped with them. The file is shortened in place, so a kill here does no harm.

    Raises:
        UserError: as `size_until`; nothing is cut then.
    """
    size = size_until(path, update)
    if path.exists():
        os.truncate(path, size)


def claim(trainer: TokenPPOTrainer, folder: Path) -> None:
    """Make a folder this run's, or see that it is: before anything in it is written or cut.

    Raises:
        UserError: another run, or something else that this run would write over, is there.
    """
    if foreign := checkpoint.foreign(folder):
        raise UserError(f"{foreign[0]} is no checkpoint of this package: move it elsewhere, or give another folder")
    mark = folder / RUN
    if mark.exists():
        try:
            then = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{mark} is damaged ({error}): give another folder") from None
        _check_same_run(trainer, then, folder)
        return
    rows = [path for name in ("metrics.jsonl", "samples.jsonl") if (path := folder / name).exists()]
    if not checkpoint.newest_first(folder) and any(path.stat().st_size for path in rows):
        raise UserError(
            f"{rows[0]} is of another run, of which there is no checkpoint: give another folder, or move it"
        )
    if not checkpoint.newest_first(folder):  # else its checkpoints say what it is
        write_json(mark, run_identity(trainer))


def run_identity(trainer: TokenPPOTrainer) -> dict[str, Any]:
    """What makes a run another one, as JSON: its seed and settings, its prompts, limits and start weights."""
    prompts = hashlib.sha256()
    for prompt in trainer.prompts:
        prompts.update(np.asarray([len(prompt), *prompt], dtype=np.int64).tobytes())
    start = {"prompts": prompts.hexdigest(), "max_response_tokens": trainer.max_response_tokens}
    return {
        "seed": trainer.seed,
        "config": asdict(trainer.config),
        "start": {**start, "start_weights": _start_weights(trainer)},
    }


@torch.no_grad()
def _start_weights(trainer: TokenPPOTrainer) -> str:
    """A digest of the frozen model that training started from: names, shapes, and some numbers of every tensor, which
    another training, another seed or another model all change."""
    # With LoRA there is no reference: the policy's own frozen weights are it.
    lora = trainer.reference is None
    model = trainer.policy if trainer.reference is None else trainer.reference
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not (lora and weight.requires_grad):
            flat = weight.reshape(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().numpy()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def _check_same_run(trainer: TokenPPOTrainer, record: dict[str, Any], path: Path) -> None:
    """Raise UserError when a record of `run_identity` is another run's than this trainer's."""
    before = of_before("rl_tppo")["rl"]
    now, then = (
        {"seed": r["seed"], **before, **without_retired({"rl": r["config"]})["rl"], **r.get("start", {})}
        for r in (run_identity(trainer), record)
    )
    # What a checkpoint of before does not say of its start is not compared.
    names = [name for name in now | then if name not in _MAY_CHANGE and (name in then or name not in _START)]
    changed = [
        _START.get(name) or f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
        for name in names
        if now.get(name) != then.get(name)
    ]
    if changed:
        raise UserError(f"{path} was made with other settings ({'; '.join(changed)}): give them, or another folder")


_START = {"prompts": "other prompts", "start_weights": "other start weights", "max_response_tokens": ""}
"""Of `run_identity`, beside the settings, and what to say of a difference."""


def _restore(trainer: TokenPPOTrainer, path: Path) -> None:
    state = read_state(path)
    _check_same_run(trainer, {name: state[name] for name in ("seed", "config")}, path)
    saved = {name: read_tensors(path, name) for name in ("policy", "optimizer")}
    live = training_state(trainer.policy, trainer.optimizer)
    shapes, expected = ({n: t.shape for n, t in state["policy"].items()} for state in (saved, live))
    if shapes != expected:
        raise UserError(f"{path} belongs to another model than the policy: give another folder, or delete it")
    _check_same_run(trainer, state, path)
    load_training_state(trainer.policy, trainer.optimizer, saved)
    for name, facts in state["kept"].items():
        trainer.kept[name] = KeptPolicy(**facts, weights=read_tensors(path, name))
    trainer.kl_coef = state["kl_coef"]
    trainer.update = state["update"]
