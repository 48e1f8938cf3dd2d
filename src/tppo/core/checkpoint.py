"""A checkpoint: a folder that appears whole or not at all, and proves that it is whole.

It is written under another name, every file is fsynced, their sha256 are written last, and then the folder is
renamed. Whatever fails or is killed on the way leaves the older checkpoints as they were. Tensors are safetensors and
the rest is JSON: nothing is unpickled. (Accelerate's `save_state` pickles the optimizer, and neither fsyncs nor
renames.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tppo.core.common import console
from tppo.core.files import sha256_file, write_json

_PREFIX = "checkpoint-"
_TEMPORARY = "tmp-"
_CHECKSUMS = "checksums.json"
_FILES = re.compile(r"[a-z_]+\.safetensors|(state|checksums)\.json(\.tmp)?")
"""Of a checkpoint, whole or half: a folder with any other file in it is somebody else's."""


def write_checkpoint(
    folder: Path, number: int, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/checkpoint-<number>` and remove all but the newest `keep`.

    Args:
        tensors: by name of their file.
        state: everything else, as JSON.

    Raises:
        OSError: it cannot be written; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{number}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    for name, named_tensors in tensors.items():
        _save_tensors(temporary / f"{name}.safetensors", named_tensors)
    write_json(temporary / "state.json", state)
    write_json(temporary / _CHECKSUMS, {path.name: sha256_file(path) for path in sorted(temporary.iterdir())})
    fsync(temporary)
    if final.exists():  # a damaged one that was skipped
        _doom(final)
    temporary.rename(final)
    fsync(folder)
    remove_checkpoints(folder, keep=keep)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of `folder`; damaged ones are named."""
    for path in newest_first(folder):
        problem = _damage(path)
        if problem is None:
            return path
        console.print(f"skipping the damaged checkpoint {path}: {problem}", soft_wrap=True)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What is no tensor."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one file."""
    return load_file(checkpoint / f"{name}.safetensors")


def moments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's live tensors: moment m of the weight called w as `w|m`."""
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{names[parameter]}|{moment}": value
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_moments(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Bring back what `moments` gave; the optimizer keeps the tensors of `saved`."""
    optimizer.state.clear()
    for key, value in saved.items():
        name, _, moment = key.rpartition("|")
        optimizer.state[parameters[name]][moment] = value


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left: half a checkpoint. Whatever else has such a name stays."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if _number(path.name) is not None and _is_ours(path):
            shutil.rmtree(path)


def remove_checkpoints(folder: Path, keep: int = 0) -> None:
    """Delete all but the newest ones, and leftovers."""
    for path in newest_first(folder)[keep:]:
        _doom(path)
    remove_leftovers(folder)


def fsync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if _number(path.name) is not None and _is_ours(path)]
    return sorted(found, key=lambda path: -(_number(path.name) or 0))


def foreign(folder: Path) -> list[Path]:
    """What is called like a checkpoint, or like half of one, and is none."""
    return [path for path in folder.glob(f"*{_PREFIX}*") if _number(path.name) is not None and not _is_ours(path)]


def _number(name: str) -> int | None:
    """Of the checkpoint called `checkpoint-<number>`, or of half of it."""
    name = name.removeprefix(_TEMPORARY).removeprefix("old-")
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdecimal() else None


def _is_ours(path: Path) -> bool:
    """Whether a folder holds nothing but the files of a checkpoint."""
    return path.is_dir() and all(_FILES.fullmatch(child.name) for child in path.iterdir())


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
