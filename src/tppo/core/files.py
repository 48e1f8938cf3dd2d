"""Files that appear whole or not at all, and where what outlives a run is kept."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tppo.core.common import UserError

PARTS, CHECKPOINTS = "parts", "checkpoints"
"""Folders of an unfinished stage."""
UNFINISHED = (PARTS, CHECKPOINTS, ".model-????????", ".token-????????", ".sentence-????????")
"""All that a stage may leave in its folder when it is killed, and that a finished one does not need: the last three are
half-saved models (`tppo.core.models.save_model`)."""


def cache_dir() -> Path:
    """Folder for what outlives a run (converted models, the hash key): $TPPO_CACHE, or ~/.cache/tppo."""
    return Path(os.environ.get("TPPO_CACHE") or Path.home() / ".cache" / "tppo")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


ALWAYS_HASHED = 4 * 2**20
"""Bytes of a file that is cheaper to read than to reason about."""


def file_mark(path: Path) -> dict[str, Any]:
    """What tells later whether a file is still the same: size, times and hash."""
    return {**_stamp(path), "sha256": sha256_file(path)}


def has_mark(path: Path, mark: dict[str, Any]) -> bool:
    """Whether a file still has the content it had when it was marked.

    The content decides, never a time alone. A large file that was not touched since is not read again: a change of its
    content changes its ctime, too, whatever is done to its mtime.
    """
    if not path.is_file():
        return False
    now = _stamp(path)
    if now["size"] != mark.get("size", now["size"]):
        return False
    if now["size"] <= ALWAYS_HASHED:
        return sha256_file(path) == mark["sha256"]
    return all(mark.get(name) == value for name, value in now.items()) or _hash_as_of(path, **now) == mark["sha256"]


@lru_cache(maxsize=256)
def _hash_as_of(path: Path, **stamp: int) -> str:
    """The hash of a large file, read once for as long as nothing touches it."""
    return sha256_file(path)


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def peak_memory_mib() -> int:
    """The most memory that this process has held."""
    if sys.platform == "win32":
        import psutil  # here: elsewhere the system's own call is enough

        return psutil.Process().memory_info().peak_wset >> 20
    import resource  # here: there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10  # macOS counts bytes, the others KiB


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as it is, so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a missing file has none."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not valid JSON ({error}): redo the stage that wrote it"
            ) from None
    return rows


def walk_data(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder of a data set (links followed, each folder once), all names in it, and those of its data files: what
    has `_` or `.` first is no data, and nothing below it is."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        names = [*folders, *files]
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder around it would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] not in "_.")
        yield Path(parent), names, [name for name in files if name[0] not in "_."]
