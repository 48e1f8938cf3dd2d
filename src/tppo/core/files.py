"""Files that appear whole or not at all, and where what outlives a run is kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tppo.core.common import UserError


def cache_dir() -> Path:
    """Folder for what outlives a run (converted models, the hash key): $TPPO_CACHE, or ~/.cache/tppo."""
    return Path(os.environ.get("TPPO_CACHE") or Path.home() / ".cache" / "tppo")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
