"""Resumable state of an RL run: a folder that appears whole or not at all, and proves that it is whole.

Everything random in an update depends on (seed, update) alone, so weights, optimizer moments, the adaptive KL
coefficient, the probe's sums, the kept policies and the number of updates done are the whole state.

A checkpoint is written under another name, every file is fsynced, their sha256 are written last, and then the folder
is renamed. Whatever fails or is killed on the way leaves the older checkpoints as they were. (Accelerate's `save_state`
pickles the optimizer, and neither fsyncs nor renames.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tppo.core.common import UserError, console
from tppo.core.config import RL_DISPLAY
from tppo.core.files import sha256_file, write_json
from tppo.core.run import without_retired
from tppo.rl.guards import KeptPolicy
from tppo.rl.policy import load_training_state, training_state
from tppo.rl.trainer import TokenPPOTrainer

_PREFIX = "checkpoint-"
_TEMPORARY = "tmp-"
_CHECKSUMS = "checksums.json"
_MAY_CHANGE = ("updates", "save_every", "keep_checkpoints", "tracker_project", *RL_DISPLAY)
"""Settings, of today or of before, that do not change what an update does."""


def save_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> Path:
    """Write `folder/checkpoint-<updates>` and remove all but the newest `keep_checkpoints`.

    Raises:
        OSError: it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{trainer.update}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    tensors = training_state(trainer.policy, trainer.optimizer)
    tensors |= {name: kept.weights for name, kept in trainer.kept.items()}
    for name, named_tensors in tensors.items():
        _save_tensors(temporary / f"{name}.safetensors", named_tensors)
    state = {
        "update": trainer.update,
        "kl_coef": trainer.kl_coef,
        "seed": trainer.seed,
        "config": asdict(trainer.config),
        "kept": {name: {"update": kept.update, "value": kept.value} for name, kept in trainer.kept.items()},
    }
    write_json(temporary / "state.json", state)
    write_json(temporary / _CHECKSUMS, {path.name: sha256_file(path) for path in sorted(temporary.iterdir())})
    fsync(temporary)
    if final.exists():  # a damaged one that was skipped
        _doom(final)
    temporary.rename(final)
    fsync(folder)
    remove_checkpoints(folder, keep=trainer.config.keep_checkpoints)
    return final


def load_newest_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> bool:
    """Restore the newest undamaged checkpoint of `folder` into the trainer; False when there is none.

    Raises:
        UserError: it was made with other settings, or for another model.
    """
    for path in _newest_first(folder):
        problem = _damage(path)
        if problem is None:
            _restore(trainer, path)
            return True
        console.print(f"skipping the damaged checkpoint {path}: {problem}", soft_wrap=True)
    return False


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left: half a checkpoint, half a saved model."""
    for pattern in (f"{_TEMPORARY}*", ".model-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def remove_checkpoints(folder: Path, keep: int = 0) -> None:
    """Delete all but the newest ones, and leftovers."""
    for path in _newest_first(folder)[keep:]:
        _doom(path)
    remove_leftovers(folder)


def fsync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))


def _doom(checkpoint: Path) -> None:
    """Make a checkpoint a leftover: so half a deleted one is never taken for a whole."""
    checkpoint.rename(checkpoint.with_name(f"{_TEMPORARY}old-{checkpoint.name}"))


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        checksums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            if sha256_file(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # Written by Rust, whose I/O errors carry the number in their text only.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 5, str(error), str(path)) from error
    fsync(path)


def _restore(trainer: TokenPPOTrainer, path: Path) -> None:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    now = {"seed": trainer.seed, **asdict(trainer.config)}
    then = {"seed": state["seed"], **without_retired({"rl": state["config"]})["rl"]}
    changed = [
        f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
        for name in now | then
        if name not in _MAY_CHANGE and now.get(name) != then.get(name)
    ]
    if changed:
        raise UserError(f"{path} was made with other settings ({'; '.join(changed)}): give them, or another folder")
    saved = {name: load_file(path / f"{name}.safetensors") for name in ("policy", "optimizer")}
    live = training_state(trainer.policy, trainer.optimizer)
    shapes, expected = ({n: t.shape for n, t in state["policy"].items()} for state in (saved, live))
    if shapes != expected:
        raise UserError(f"{path} belongs to another model than the policy: give another folder, or delete it")
    load_training_state(trainer.policy, trainer.optimizer, saved)
    for name, facts in state["kept"].items():
        trainer.kept[name] = KeptPolicy(**facts, weights=load_file(path / f"{name}.safetensors"))
    trainer.kl_coef = state["kl_coef"]
    trainer.update = state["update"]
