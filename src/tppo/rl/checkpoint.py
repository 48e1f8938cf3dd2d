"""Resumable state of an RL run: safetensors only, a folder that appears whole or not at all.

Everything random in an update depends on (seed, update) alone, so weights, optimiser moments and the number of
updates done are the whole state.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tppo.rl.trainer import TokenPPOTrainer

_PREFIX = "checkpoint-"


def _optimizer_tensors(trainer: TokenPPOTrainer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.policy.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }


def save_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> Path:
    """Write `folder/checkpoint-<updates>` and remove older ones."""
    final = folder / f"{_PREFIX}{trainer.update}"
    temporary = folder / f"tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Tied weights appear once among the parameters; state_dict would hold them twice.
    parameters = {name: parameter.detach() for name, parameter in trainer.policy.named_parameters()}
    save_file(parameters, temporary / "policy.safetensors")
    save_file(_optimizer_tensors(trainer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"update": trainer.update}), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    for other in folder.glob(f"{_PREFIX}*"):
        if other != final:
            shutil.rmtree(other)
    return final


def load_newest_checkpoint(trainer: TokenPPOTrainer, folder: Path) -> bool:
    """Restore the newest checkpoint of `folder` into the trainer; False when there is none."""
    found = sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))
    if not found:
        return False
    saved = load_file(found[-1] / "policy.safetensors")
    parameters = dict(trainer.policy.named_parameters())
    assert saved.keys() == parameters.keys(), "the checkpoint belongs to another model"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    trainer.optimizer.state.clear()
    for key, value in load_file(found[-1] / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("|")
        trainer.optimizer.state[parameters[name]][moment] = value
    trainer.update = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))["update"]
    return True


def keep_rows_until(path: Path, update: int) -> None:
    """Cut a jsonl file back to the rows of the first `update` updates (those after a checkpoint are redone)."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            break  # a line cut off by a kill is the last one
        if row["update"] <= update:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
