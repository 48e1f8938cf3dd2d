"""Settings of before against settings of today.

A stage's manifest holds the settings it was made with. Since then settings may have become constants (`RETIRED`), be
asked for in another way (`REPLACED`), or be new: a new one has the value that does what was done before there was any,
which is its default unless `ADDED` says otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, cast

from tppo.core.config import ADDED, REPLACED, RETIRED, WITHOUT_EFFECT, Evaluate, Reader, Reading, Recipe
from tppo.core.stages import split_stage, stage_config, without_settings


def changed_settings(stage: str, old: dict[str, Any], recipe: Recipe, used: str | None = None) -> list[str]:
    """Settings of a stage that differ from those of `recipe`, as "name: old -> new".

    Args:
        old: those that the stage was started with.
        used: the precision that it was made in. `auto` agrees with whatever was chosen, on whichever machine.
    """
    known = without_retired(_completed(old, of_before(stage)))
    return _differences(known, plain(stage_config(stage, recipe)), used=used)


def of_before(stage: str) -> dict[str, Any]:
    """Of every setting of a stage, the value that does what was done before there was the setting."""
    name, variant = split_stage(stage)
    readings = [Reading(cast(Reader, variant))] if name == "read" else []
    default = plain(stage_config(stage, Recipe(evaluate=Evaluate(readings=readings))))
    for setting, value in ADDED.items():
        *path, key = setting.split(".")
        section: Any = default
        for step in path:
            section = section.get(step) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section:
            section[key] = plain(value)
    return default


def without_retired(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by section, as files of before hold them, without those that are constants today, where they had that
    value, and without what changes no result."""
    gone = {
        place
        for place, constant in RETIRED.items()
        for section, _, name in [place.partition(".")]
        if isinstance(values := config.get(section), dict) and name in values and values[name] == constant
    }
    return without_settings(config, {*gone, *WITHOUT_EFFECT})


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe, as a file holds it."""
    return plain(asdict(recipe))


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _completed(old: Any, before: Any) -> Any:
    """`old` with what only `before` has, section by section."""
    if not isinstance(old, dict) or not isinstance(before, dict):
        return old
    return before | {name: _completed(value, before.get(name)) for name, value in old.items()}


def _differences(old: Any, new: Any, prefix: str = "", *, used: str | None = None) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key, used=used)
        ]
    if prefix.rpartition(".")[2] == "precision" and (new == "auto" or (old == "auto" and new == used)):
        return []
    # A stage may note a setting of another section under the name it had in its own.
    return [] if old == new else [f"{REPLACED.get(prefix, prefix)}: {old!r} -> {new!r}"]
