"""A setting that is newer than a run: `ADDED` says what was done before there was any, in every stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tppo.core import changes
from tppo.core.changes import changed_settings, of_before, resolved
from tppo.core.config import ADDED, REPLACED, Evaluate, Reading, Recipe
from tppo.core.stages import all_stages, stage_config

KNOWN = Path(__file__).with_name("settings.txt")
RECIPE = Recipe(
    algorithms=["tppo", "dpo"],
    evaluate=Evaluate(readings=[Reading(reader) for reader in ("llm", "embedding", "vote", "distance")]),  # type: ignore[arg-type]
)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; the keys of a dict setting are none."""
    found = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value and prefix.count(".") < 2
        found |= leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *path, key = name.split(".")
    section = config
    for step in path:
        section = section[step]
    del section[key]
    return config


CASES = [
    (stage, name)
    for stage in ("synthetic", *all_stages(RECIPE))
    for name in leaves(changes.plain(stage_config(stage, RECIPE)))
]


def test_every_setting_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(CASES) > 150
    for stage, name in CASES:
        now = changes.plain(stage_config(stage, RECIPE))
        value = leaves(now)[name]
        old = without(now, name)
        monkeypatch.setattr(changes, "ADDED", {name: value})
        assert changed_settings(stage, old, RECIPE) == [], (stage, name)
        monkeypatch.setattr(changes, "ADDED", {name: "as it was"})
        told = [] if name.endswith("precision") and value == "auto" else [
            f"{REPLACED.get(name, name)}: 'as it was' -> {value!r}"
        ]  # fmt: skip
        assert changed_settings(stage, old, RECIPE) == told, (stage, name)


def test_one_without_an_entry_has_done_what_its_default_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "ADDED", {})
    recipe = Recipe()
    old = without(changes.plain(stage_config("synthetic", recipe)), "synthetic.topics")
    assert changed_settings("synthetic", old, recipe) == []
    recipe.synthetic.topics = 3
    assert changed_settings("synthetic", old, recipe) == ["synthetic.topics: 12 -> 3"]
    assert of_before("synthetic")["synthetic"] == {"users": 400, "topics": 12}


def test_a_new_setting_declares_what_was_done_before_it() -> None:
    """settings.txt lists the settings of the first release. Do not add to it: give a new setting its entry in ADDED."""
    first = set(KNOWN.read_text(encoding="utf-8").split())
    names = set(leaves(resolved(Recipe())))
    undeclared = sorted(names - first - set(ADDED))
    assert not undeclared, f"say in tppo.core.config.ADDED what was done before there were {undeclared}"
    assert not set(ADDED) & first
    assert set(ADDED) <= names, "a setting that there is not"
