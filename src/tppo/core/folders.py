"""Whose a stage's folder is, and whether what a stage wrote is still there.

A folder is a stage's when it holds what the stage leaves there first (started.json) or last (manifest.json). In such a
folder the stage's are the files that its manifest lists; of an unfinished one those whose names it is known to write
(`Stage.writes`) and that were not there before. Nothing else is ever deleted: a command that would have to stops first,
and names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from tppo.core.common import UserError
from tppo.core.files import file_mark, has_mark
from tppo.core.stages import LEFTOVERS, STAGES, split_stage

MANIFEST, STARTED = "manifest.json", "started.json"
FORMAT = 2
"""Of both; 1 had no number, no notes of what is outside, and no times of outputs."""
SHOWN = 3
"""Files that a message names."""


def read_record(path: Path) -> dict[str, Any] | None:
    """A manifest, or what a stage noted when it started; None where there is none.

    Raises:
        UserError: it is damaged, or of a newer version of the package.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        number = record.get("format", 1) if isinstance(record, dict) else 1
        if not isinstance(number, int) or number > FORMAT:
            raise UserError(
                f"{path} has format {number!r}, this tppo reads up to {FORMAT}: it was written by a newer version; "
                "update tppo, or give another --run_dir"
            )
        if not (problem := _misshapen(record)):
            return record
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        problem = str(error)
    raise UserError(
        f"{path} is damaged ({problem}): put the file back, or give `--redo {path.parent.name}` to make the stage anew"
    )


def _misshapen(record: Any) -> str:
    """What is not as a stage writes it in a manifest or started.json; empty when nothing is. What is missing is for
    those to say who need it: older versions wrote less."""
    if not isinstance(record, dict):
        return "it is no JSON object"
    if record.get("config") == {}:
        return "config is empty"
    notes, numerics = record.get("outside", {}), record.get("numerics")
    files = [note["files"] for note in notes.values() if "files" in note] if _is_table(notes, dict) else []
    whole = {
        **{name: isinstance(record.get(name, {}), dict) for name in ("config", "facts")},
        **{name: _is_table(record.get(name, {}), str) for name in ("inputs", "outputs")},
        "stamps": _is_table(record.get("stamps", {}), dict),
        "outside": _is_table(notes, dict)
        and all(_is_table(marks, dict) and all("sha256" in mark for mark in marks.values()) for marks in files),
        "numerics": numerics is None or (_is_table(numerics, str) and "precision" in numerics),
        "foreign": isinstance(names := record.get("foreign", []), list) and all(isinstance(n, str) for n in names),
    }
    return next((f"{name} is not what a stage writes there" for name, right in whole.items() if not right), "")


def _is_table(value: Any, kind: type) -> bool:
    """Whether a value is a JSON object whose values are all of one kind."""
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def files_of(folder: Path) -> Iterator[Path]:
    """Files and links anywhere in a folder, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())


def unknown_names(folder: Path, stage: str) -> list[str]:
    """Names in the folder of an unfinished stage that it is not known to write."""
    known = (MANIFEST, STARTED, *LEFTOVERS, *STAGES[split_stage(stage)[0]].writes)
    known = (*known, *_halves(known))
    return [path.name for path in sorted(folder.iterdir()) if not any(fnmatch(path.name, pattern) for pattern in known)]


def check_ours(folder: Path, stage: str) -> None:
    """Refuse to use a folder for a stage that somebody else has put there.

    Raises:
        UserError: it is a file, or a folder that holds something but no mark of a stage.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    # A stage that was killed before its first file was whole has left this much of it.
    held = folder.is_dir() and any(path.name != f"{STARTED}.tmp" for path in folder.iterdir())
    if not folder.is_dir() or (held and not _marked(folder)):
        raise UserError(
            f"{folder} is where stage '{stage}' writes, but no stage has made what is there: move it elsewhere, or "
            "give another --run_dir"
        )


def check_removable(folder: Path, stage: str) -> None:
    """Refuse to delete what a stage has not made.

    Raises:
        UserError: names the files.
    """
    check_ours(folder, stage)
    others = _not_ours(folder, stage) if folder.exists() else []
    if others:
        listed = ", ".join(str(path) for path in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UserError(
            f"stage '{stage}' has not made {listed}{more}, and deletes nothing else: move it elsewhere, then give the "
            "same command again"
        )


def remove(folder: Path, stage: str) -> None:
    """Delete what a stage has made. The manifest goes first and the mark of a started stage last, so that a stop on
    the way leaves an unfinished stage.

    Raises:
        UserError: there is something else in the folder; nothing is deleted then.
    """
    check_removable(folder, stage)
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STARTED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink():
        folder.rmdir()


def outputs(folder: Path, foreign: list[str]) -> dict[str, dict[str, Any]]:
    """What a stage has made, by path in its folder; half a file that a kill left (`*.tmp`) is nothing.

    Args:
        foreign: names in the folder that are somebody else's.
    """
    found = {path.relative_to(folder): path for path in files_of(folder) if path.is_file()}
    return {
        relative.as_posix(): file_mark(path)
        for relative, path in found.items()
        if str(relative) not in (MANIFEST, STARTED) and path.suffix != ".tmp" and relative.parts[0] not in foreign
    }


def check_outputs(folder: Path, name: str, way_out: str) -> None:
    """Refuse what is not as its stage wrote it any more.

    Args:
        name: of the stage, for the message.

    Raises:
        UserError: names the first file that is gone or has changed.
    """
    manifest = read_record(folder / MANIFEST) or {}
    stamps = manifest.get("stamps", {})
    for relative, digest in manifest.get("outputs", {}).items():
        path = folder / relative
        if not has_mark(path, {**stamps.get(relative, {}), "sha256": digest}):
            what = "has changed since stage" if path.is_file() else "is gone, which stage"
            raise UserError(f"{path} {what} '{name}' wrote it: put the file back, or {way_out}")


def _marked(folder: Path) -> bool:
    """Whether a stage has begun here. A damaged mark is one: what is around it decides."""
    for name in (MANIFEST, STARTED):
        if (folder / name).is_file():
            try:
                record = json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                return True
            if isinstance(record, dict) and "config" in record:
                return True
    return False


def _halves(names: Iterable[str]) -> set[str]:
    """Names of what a kill leaves of files, by either way in which they are written (`name.json.tmp`, `name.tmp`)."""
    return {half for name in names for half in (f"{name}.tmp", str(PurePosixPath(name).with_suffix(".tmp")))}


def _not_ours(folder: Path, stage: str) -> list[Path]:
    try:
        manifest, started = (read_record(folder / name) for name in (MANIFEST, STARTED))
    except UserError:
        manifest = started = None  # damaged: by names alone
    if manifest is not None and "outputs" in manifest:
        known = {MANIFEST, STARTED, *manifest["outputs"]}
        known |= _halves([*known, *STAGES[split_stage(stage)[0]].writes])
        # A folder with nothing in it is in no manifest: its name decides.
        empty = [path for name in unknown_names(folder, stage) if not any(files_of(path := folder / name))]
        others = [path for path in files_of(folder) if path.relative_to(folder).as_posix() not in known]
        return [*others, *(path for path in empty if path.is_dir() and not path.is_symlink())]
    foreign = {*unknown_names(folder, stage), *(started or {}).get("foreign", [])}
    return [folder / name for name in sorted(foreign) if (folder / name).exists()]
