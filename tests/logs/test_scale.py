"""Buckets, processes and stops change nothing; splits hang on seed and user id."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.logs.conftest import KEY
from tests.logs.test_prepare import TSV, oracle, recipe_for, run_rows
from tppo.core.common import UserError
from tppo.core.config import Prepare, Recipe, Task
from tppo.core.run import RunFolder
from tppo.core.tables import load_examples
from tppo.logs import examples, prepare, staging


@pytest.fixture(scope="module")
def log(make_log) -> Path:
    return make_log(30, 24)


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Four or so buckets and as many blocks."""
    monkeypatch.setattr(prepare, "_check_splits", lambda facts, settings: None)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 1)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 12_000)
    monkeypatch.setattr(staging, "BLOCK_BYTES", 12_000)


def prepared(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Facts but for times, examples, rejects."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = prepare.run(recipe, RunFolder(recipe), folder)
    facts = {name: value for name, value in facts.items() if not name.endswith(("seconds", "second"))}
    return facts, load_examples(folder), pq.read_table(folder / "rejects.parquet").to_pylist()


@pytest.mark.parametrize("least_users", [1, 2])
def test_buckets_change_nothing_but_the_order(tmp_path, log, small_parts, least_users: int) -> None:
    recipe = recipe_for(tmp_path, log, threads=1, min_users_per_target=least_users)
    facts, found, rejects = prepared(recipe, tmp_path / "many")
    expected = oracle(log, recipe.prepare, Task())
    assert {e.example_id: (e.user_id, e.split, e.targets) for e in found} == {
        name: (user, split, targets) for name, (user, split, _, targets, _) in expected.items()
    }
    assert len(found) == len(expected)
    prepare.SMALL_BYTES = 1 << 20  # the fixture sets it back
    one = prepared(recipe, tmp_path / "one")
    assert (facts, rejects) == (one[0], one[2])
    assert sorted(found, key=lambda e: e.example_id) == sorted(one[1], key=lambda e: e.example_id)


def test_processes_change_nothing(tmp_path, log, small_parts) -> None:
    one = prepared(recipe_for(tmp_path, log, threads=1), tmp_path / "one")
    assert prepared(recipe_for(tmp_path, log, threads=2), tmp_path / "two") == one
    assert not (tmp_path / "two" / "scratch").exists()


def test_what_was_done_before_a_stop_is_not_done_again(tmp_path, log, small_parts, monkeypatch) -> None:
    recipe = recipe_for(tmp_path, log, threads=1)
    expected = prepared(recipe, tmp_path / "whole")
    done: list[str] = []

    def stopping(work: Any, name: str, after: int) -> Any:
        def job(*arguments: Any) -> Any:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(name)
            return work(*arguments)

        return job

    write_chunk, build_events, build_windows = staging._write_chunk, examples.build_events, examples.build_windows

    def run(after: int) -> Any:
        done.clear()
        monkeypatch.setattr(staging, "_write_chunk", stopping(write_chunk, "chunk", after))
        monkeypatch.setattr(examples, "build_events", stopping(build_events, "events", after))
        monkeypatch.setattr(examples, "build_windows", stopping(build_windows, "windows", after))
        return prepared(recipe, tmp_path / "stopped")

    total = 0
    for after in (1, 3, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(after)
        total += len(done)
    assert run(-1) == expected
    counts = {name: done.count(name) for name in ("chunk", "events", "windows")}
    parts = total + len(done)
    done.clear()
    prepared(recipe, tmp_path / "again")
    assert parts == len(done), "some part was made twice"
    assert counts["windows"] > 0


def test_another_log_or_key_is_read_anew(tmp_path, log, small_parts, monkeypatch) -> None:
    copy = tmp_path / "log.tsv"
    copy.write_bytes(log.read_bytes())
    recipe = recipe_for(tmp_path, copy, threads=1)
    build_windows = examples.build_windows
    for change in ("log", "key"):
        monkeypatch.setattr(examples, "build_windows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(recipe, tmp_path / "out")
        assert (tmp_path / "out" / "scratch" / "rows" / "read.json").exists()
        monkeypatch.setattr(examples, "build_windows", build_windows)
        if change == "log":
            copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-200]))
        else:
            monkeypatch.setenv("TPPO_HASH_KEY", KEY[::-1])
        assert prepared(recipe, tmp_path / "out") == prepared(recipe, tmp_path / f"new {change}")


def test_splits_and_order_hang_on_the_seed_and_not_on_the_key(tmp_path, log, small_parts, monkeypatch) -> None:
    def shown(seed: int, key: str) -> tuple[list[Any], list[str]]:
        monkeypatch.setenv("TPPO_HASH_KEY", key)
        recipe = recipe_for(tmp_path, log, threads=1)
        recipe.seed = seed
        found = prepared(recipe, tmp_path / f"{seed} {key}")[1]
        return [(e.split, e.history, e.targets, e.target_time) for e in found], [e.user_id for e in found]

    first, other_key, other_seed = shown(0, KEY), shown(0, KEY[::-1]), shown(1, KEY)
    assert first[0] == other_key[0]
    assert not set(first[1]) & set(other_key[1])
    assert first[0] != other_seed[0]
    recipe = recipe_for(tmp_path, log, threads=1)
    recipe.seed, recipe.shared_seed = 1, 0
    assert [e.user_id for e in prepared(recipe, tmp_path / "shared")[1]] == first[1]


def test_a_user_with_most_of_the_rows_is_said(tmp_path, capsys) -> None:
    rows = [f"u{i}\t2026-01-01 0{h}:00:00\tsearch\tq{h}" for i in range(30) for h in range(2)]
    rows += [
        f"robot\t2026-01-0{d} {h:02}:{m:02}:00\tsearch\tq {d} {h} {m}"
        for d in (1, 2)
        for h in range(24)
        for m in range(10)
    ]
    facts, _ = run_rows(tmp_path, TSV + "\n".join(rows))
    assert (facts["heavy_users"], facts["heavy_users_rows"]) == (1, 480)
    assert facts["rows_kept"] == 540
    assert "caution: 1 user(s)" in capsys.readouterr().err


NULLS = [r"\N", "NULL", "null", "NaN", "nan", "None", "-", "(not set)", "undefined", "N/A", " NA ", "#N/A", "<NA>", ""]


def test_ids_that_are_none_or_of_several_people(tmp_path) -> None:
    shared = ["0", "-1", "00000000-0000-0000-0000-000000000000", "Anonymous"]
    users = [*NULLS, *shared, "000", "u", "nora"]
    rows = [f"{user}\t2026-01-01 00:00:{i:02}\tsearch\tq{i}" for i, user in enumerate(users)]
    facts, rejects = run_rows(tmp_path, TSV + "\n".join(rows))
    assert [reject["reason"] for reject in rejects] == ["missing_value"] * len(NULLS) + ["shared_user"] * 4
    assert facts["users"] == 3
    facts, _ = run_rows(tmp_path, TSV + "\n".join(rows), null_values=[], shared_users=[])
    assert facts["users"] == len(users) - 1


def test_texts_that_are_none(tmp_path) -> None:
    texts = [r"\N", "NULL", "NaN", "(not set)", "undefined", "N/A", "null", "(other)", "-", "none", "nan", "null point"]
    rows = [f"u\t2026-01-01 00:00:{i:02}\tsearch\t{text}" for i, text in enumerate(texts)]
    _, rejects = run_rows(tmp_path, TSV + "\n".join(rows))
    assert [reject["reason"] for reject in rejects] == ["missing_value"] * 8 + ["no_text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "utf-9"}, "prepare.encoding=utf-9"),
        ({"columns": "Berlin"}, "no zone Berlin"),
        ({"memory_limit": "40MB"}, "prepare.memory_limit=40MB.*prepare.threads=2"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(tmp_path, log, options, message) -> None:
    recipe = recipe_for(tmp_path, log)
    for name, value in options.items():
        if name == "columns":
            recipe.prepare.columns.time_zone = value
        else:
            setattr(recipe.prepare, name, value)
    with pytest.raises(UserError, match=message):
        prepared(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_bad_file_among_many_is_said_first(tmp_path, log) -> None:
    (tmp_path / "zzz.tsv").write_bytes(b"PK\x03\x04 not text")
    with pytest.raises(UserError, match=r"zzz.tsv is a ZIP archive"):
        prepared(recipe_for(tmp_path, log, tmp_path / "zzz.tsv"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_memory_and_processes_are_no_part_of_the_result() -> None:
    from tppo.core.stages import stage_config

    one = stage_config("prepare", Recipe())
    other = stage_config("prepare", Recipe(prepare=Prepare(memory_limit="8GB", threads=7)))
    assert one == other
    assert json.dumps(one)
