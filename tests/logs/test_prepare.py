"""The stage on real files: accounting, windows against a plain-Python oracle, splits, privacy, errors."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.logs.conftest import KEY
from tppo.core.common import UserError
from tppo.core.config import Prepare, Recipe, Synthetic, Task
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import EXAMPLES, REJECTS, Example, load_examples, read_table
from tppo.logs import prepare, synthetic
from tppo.logs.clean import hash_user, user_draw
from tppo.logs.readers import REASONS, RawRow

AOL = "AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n"
TSV = "user_id\ttime\tkind\ttext\n"


@pytest.fixture(scope="module")
def small_log(make_log) -> Path:
    return make_log(40, 40)


def recipe_for(folder: Path, *sources: Path, task: Task | None = None, **options: Any) -> Recipe:
    defaults = {"reward_eval_share": 0.25, "eval1_share": 0.25, "eval2_share": 0.25, "eval2_time_share": 0.4}
    section = Prepare(source=[str(path) for path in sources], **(defaults | options))
    return Recipe(run_dir=str(folder / "run"), prepare=section, task=task or Task())


def run_prepare(recipe: Recipe) -> tuple[dict[str, Any], list[Example], list[dict[str, Any]]]:
    run_stage(recipe, "prepare", prepare.run)
    run = RunFolder(recipe)
    folder = run.require("prepare")
    manifest = run.manifest("prepare")
    assert manifest is not None
    assert sorted(path.name for path in folder.iterdir()) == [
        "examples.parquet",
        "manifest.json",
        "rejects.parquet",
        "started.json",
    ]
    rejects = read_table(folder / "rejects.parquet", REJECTS).to_pylist()
    return manifest["facts"], load_examples(folder), rejects


def run_rows(folder: Path, content: str | bytes, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts and rejects of a log too small for splits: the work before the splits are checked."""
    path = folder / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = recipe_for(folder, path, **options)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_check_splits", lambda facts, settings: None)
        facts = prepare.run(recipe, RunFolder(recipe), out)
    return facts, pq.read_table(out / "rejects.parquet").to_pylist()


def oracle(path: Path, settings: Prepare, task: Task, seed: int = 0) -> dict[str, tuple[Any, ...]]:
    """Examples by the definitions in tppo.logs.examples, written as plain loops."""
    rows: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    points: dict[int, float] = {}
    for number, line in enumerate(path.read_text().splitlines()[1:], start=2):
        fields = line.split("\t")
        if len(fields) != 4:
            continue
        cleaned = prepare.clean_row(RawRow(number, *fields), KEY.encode(), settings.max_text_chars)
        reason, _, when, kind, text, _ = cleaned
        if reason is None:
            user = hash_user(KEY.encode(), fields[0])
            rows[user].append((when, number, kind, text))
            points[user] = user_draw(seed, fields[0])[0] / 2**64
    events: dict[int, list[tuple[Any, ...]]] = {}
    for user, found in rows.items():
        sequence, seen, since, query = [], set(), set(), None
        for when, _, kind, text in sorted(found):
            if (when, kind, text) in seen:
                continue
            seen.add((when, kind, text))
            if kind == "search" and text != query:
                query, since = text, set()
            if (kind, text) not in since:
                since.add((kind, text))
                sequence.append((when, kind, text))
        events[user] = sequence
    times = sorted(when for sequence in events.values() for when, _, _ in sequence)
    hours = sorted({when.replace(minute=0, second=0) for when in times})
    cut = next(h for h in hours if sum(t >= h for t in times) <= settings.eval2_time_share * len(times))
    searchers = defaultdict(set)
    for user, sequence in events.items():
        for _, kind, text in sequence:
            if kind == "search":
                searchers[text].add(user)
    expected = {}
    for user, sequence in events.items():
        point = points[user]
        shares = (settings.reward_eval_share, settings.eval1_share, settings.eval2_share)
        names = ("reward_eval", "eval1", "eval2")
        split = next((name for i, name in enumerate(names) if point < sum(shares[: i + 1])), "train")
        new, known = [], set()
        for at, (when, kind, text) in enumerate(sequence):
            if kind == "search" and text not in known:
                known.add(text)
                if (split == "eval2") == (when >= cut) and len(searchers[text]) >= settings.min_users_per_target:
                    new.append((at, when, text))
        for back in range(settings.windows_per_user):
            end = len(new) - back * settings.window_stride
            if end < task.num_queries:
                break
            targets = new[end - task.num_queries : end]
            at, when, _ = targets[0]
            if at >= settings.min_history:
                history = [(kind, text) for _, kind, text in sequence[max(0, at - task.history_events) : at]]
                expected[f"{user:016x}-{back}"] = (
                    f"{user:016x}",
                    split,
                    history,
                    [t for *_, t in targets],
                    when,
                )
    return expected


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ({}, Task()),
        ({"min_users_per_target": 2, "windows_per_user": 3}, Task(num_queries=2)),
        (
            {"window_stride": 1, "min_history": 8, "windows_per_user": 50},
            Task(num_queries=4, history_events=5),
        ),
    ],
)
def test_examples_match_the_definitions(tmp_path, small_log, options, task) -> None:
    recipe = recipe_for(tmp_path, small_log, task=task, **options)
    facts, examples, rejects = run_prepare(recipe)
    found = {
        e.example_id: (e.user_id, e.split, [(v.kind, v.text) for v in e.history], e.targets, e.target_time)
        for e in examples
    }
    assert found == oracle(small_log, recipe.prepare, task)
    assert len(found) == len(examples) == sum(facts["examples"].values()) > 20
    lines = len(small_log.read_text().splitlines()) - 1
    assert facts["rows_read"] == lines == facts["rows_kept"] + len(rejects)
    assert sum(facts["rejected"].values()) == len(rejects) == facts["rows_rejected"]


def test_splits_share_no_user_and_eval2_is_later(tmp_path, small_log) -> None:
    facts, examples, _ = run_prepare(recipe_for(tmp_path, small_log))
    users = defaultdict(set)
    for example in examples:
        users[example.user_id].add(example.split)
    assert all(len(splits) == 1 for splits in users.values())
    late = [e.target_time for e in examples if e.split == "eval2"]
    early = [e.target_time for e in examples if e.split != "eval2"]
    assert max(early) < min(late)
    assert str(max(early)) < facts["time_cut"] <= str(min(late))
    for example in examples:
        searches = {event.text for event in example.history if event.kind == "search"}
        assert len(set(example.targets)) == 3
        assert not searches & set(example.targets)


def test_same_log_same_examples_and_another_key_other_users(tmp_path, small_log, monkeypatch) -> None:
    tables = []
    for name, key in (("a", KEY), ("b", KEY), ("c", KEY[::-1])):
        monkeypatch.setenv("TPPO_HASH_KEY", key)
        recipe = recipe_for(tmp_path / name, small_log, threads=1 if name == "a" else 2)
        run_prepare(recipe)
        tables.append(pq.read_table(RunFolder(recipe).path("prepare") / "examples.parquet"))
    assert tables[0].equals(tables[1])
    assert not set(tables[0]["user_id"].to_pylist()) & set(tables[2]["user_id"].to_pylist())
    for written, documented in zip(tables[0].schema, EXAMPLES, strict=True):
        assert (written.name, written.nullable) == (documented.name, documented.nullable)
        assert written.metadata[b"doc"] == documented.metadata[b"doc"]


def test_neither_key_nor_user_id_is_written(tmp_path, small_log) -> None:
    recipe = recipe_for(tmp_path, small_log)
    run_prepare(recipe)
    for path in RunFolder(recipe).root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content = json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
            assert KEY.encode() not in content
            assert b"user0000" not in content


def test_aol_rows_and_events(tmp_path) -> None:
    rows = [
        "1\tRed  Shoes\t2006-03-01 07:00:00\t\thttp://www.a.com/x",  # a search and a click
        "1\tred shoes\t2006-03-01 07:00:00\t2\thttp://b.com",  # same search, another click
        "1\tred shoes\t2006-03-01 07:00:00\t2\thttp://b.com",  # duplicate
        "1\tred shoes\t2006-03-01 07:00:00\t\t",  # duplicate: the search is there already
        "1\tred shoes\t2006-03-01 07:05:00\t\t",  # repeat
        "1\tred shoes\t2006-03-01 07:06:00\t\thttp://b.com",  # repeat, the click too
        "1\tred shoes\t2006-03-01 07:07:00\t\thttp://c.com",  # a new click
        "1\tgoogle\t2006-03-01 07:08:00\t\thttp://google.com",  # navigational
        "1\t-\t2006-03-01 07:09:00\t\t",
        "1\tblue hat\t2006-03-01 07:10:00\t\thttp://x.com/?m=jane@mail.example",
        "1\tblue hat\t2006-03-01\t\t\textra",
        "1\tblue hat\tyesterday\t\t",
        "\tblue hat\t2006-03-01 07:10:00\t\t",
        "1\tblue hat\t2006-03-01 07:20:00\t\t",
        "1\tred shoes\t2006-03-01 07:30:00\t\t",  # back to an old query: kept
    ]
    facts, rejects = run_rows(tmp_path, AOL + "\n".join(rows), format="aol")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (4, "duplicate"),
        (5, "duplicate"),
        (6, "repeat"),
        (7, "repeat"),
        (9, "navigational"),
        (10, "no_text"),
        (11, "email"),
        (12, "wrong_columns"),
        (13, "bad_time"),
        (14, "missing_value"),
    ]
    assert facts["events"] == {"search": 3, "click": 3}
    assert (facts["rows_read"], facts["rows_kept"]) == (15, 5)
    assert facts["examples"] == {"train": 0, "reward_eval": 0, "eval1": 0, "eval2": 0}


def test_every_event_kind_and_time_zone(tmp_path) -> None:
    rows = ["Search\tq", "click\thttp://www.A.com/1", "purchase\tRed Shoe", "visit\tshop", "hover\tq"]
    content = TSV + "\n".join(f"u\t2026-01-01T0{i}:00:00+02:00\t{row}" for i, row in enumerate(rows))
    facts, rejects = run_rows(tmp_path, content)
    assert facts["events"] == {"click": 1, "purchase": 1, "search": 1, "visit": 1}
    assert str(facts["first_time"]) == "2025-12-31 22:00:00"
    assert [reject["reason"] for reject in rejects] == ["unknown_kind"]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_formats_give_the_same_examples(tmp_path, small_log, format) -> None:
    records = [line.split("\t") for line in small_log.read_text().splitlines()]
    records = [fields for fields in records if len(fields) == 4]
    path = tmp_path / f"log.{format}"
    if format == "csv":
        path.write_text("".join(",".join(f'"{field}"' for field in fields) + "\n" for fields in records))
    elif format == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(records[0], r, strict=True))) + "\n" for r in records[1:]))
    else:
        pq.write_table(pa.Table.from_pylist([dict(zip(records[0], r, strict=True)) for r in records[1:]]), path)
    _, expected, _ = run_prepare(recipe_for(tmp_path / "tsv", small_log))
    _, examples, _ = run_prepare(recipe_for(tmp_path / "other", path, format=format))
    assert examples == expected


def test_many_files_are_one_log(tmp_path, small_log) -> None:
    lines = small_log.read_text().splitlines(keepends=True)
    parts = [tmp_path / "1.tsv", tmp_path / "2.tsv"]
    parts[0].write_text("".join(lines[:501]))
    parts[1].write_text(lines[0] + "".join(lines[501:]))
    _, expected, _ = run_prepare(recipe_for(tmp_path / "one", small_log))
    facts, examples, rejects = run_prepare(recipe_for(tmp_path / "two", tmp_path / "*.tsv"))
    assert examples == expected
    assert facts["files"] == 2
    assert {reject["file"] for reject in rejects} == {str(path) for path in parts}


def test_spills_within_a_small_memory_limit(tmp_path, small_log) -> None:
    _, expected, _ = run_prepare(recipe_for(tmp_path / "a", small_log))
    _, examples, _ = run_prepare(recipe_for(tmp_path / "b", small_log, memory_limit="64MB", threads=1))
    assert examples == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_history": 0}, "prepare.min_history is 0"),
        ({"window_stride": 0}, "prepare.window_stride"),
        ({"eval1_share": 0.0}, "prepare.eval1_share is 0.0: it must lie between"),
        ({"eval1_share": 0.8}, "no user is left"),
        ({"memory_limit": "lots"}, "prepare.memory_limit=lots"),
        ({"memory_limit": "2MB"}, "prepare.memory_limit=2MB"),
        ({"format": "aol"}, "AOL header"),
        ({"min_users_per_target": 40}, "split train has no examples .* prepare.min_users_per_target"),
        ({"min_history": 500}, "prepare.min_history"),
        ({"reward_eval_share": 1e-9}, "split reward_eval has no examples .*raise prepare.reward_eval_share"),
        ({"eval2_time_share": 1e-9}, "split eval2 has no examples .*prepare.eval2_time_share"),
        ({"source": ["synthetic", "x"]}, "cannot be mixed"),
        ({"source": ["nowhere.tsv"]}, "nowhere.tsv does not exist"),
    ],
)
def test_mistakes_name_the_setting(tmp_path, small_log, options, message) -> None:
    recipe = recipe_for(tmp_path, small_log)
    for name, value in options.items():
        setattr(recipe.prepare, name, value)
    with pytest.raises(UserError, match=message):
        run_prepare(recipe)
    assert not (RunFolder(recipe).path("prepare") / "manifest.json").exists()
    assert not (RunFolder(recipe).path("prepare") / "scratch").exists()


def test_a_split_without_examples_says_what_was_rejected(tmp_path) -> None:
    # The file's first time decides of which kind its times are.
    rows = ["u\t1700000000000\tsearch\tred hat"] + [f"u{i}\t2024-01-20 10:00:00\tsearch\tq" for i in range(559)]
    path = tmp_path / "log.tsv"
    path.write_text(TSV + "\n".join(rows))
    with pytest.raises(UserError, match=r"no examples.* of 560 rows 559 were rejected \(bad_time 559\)"):
        run_prepare(recipe_for(tmp_path, path))


@pytest.mark.parametrize(("content", "message"), [(TSV, "no row at all"), (TSV + "u\tsoon\tsearch\tq\n", "bad_time 1")])
def test_nothing_usable(tmp_path, content, message) -> None:
    with pytest.raises(UserError, match=message):
        run_rows(tmp_path, content)
    assert (tmp_path / "out" / "rejects.parquet").exists()


def test_the_synthetic_log_is_a_source(tmp_path) -> None:
    recipe = Recipe(run_dir=str(tmp_path), synthetic=Synthetic(users=150))
    with pytest.raises(UserError, match="tppo synthetic"):
        run_stage(recipe, "prepare", prepare.run)
    run_stage(recipe, "synthetic", synthetic.run)
    facts, _, _ = run_prepare(recipe)
    assert facts["rows_read"] == RunFolder(recipe).manifest("synthetic")["facts"]["rows"]
    assert min(facts["examples"].values()) > 0
    assert set(facts["events"]) == {"search", "click", "purchase", "visit"}
    assert {"email", "phone", "card", "ssn", "navigational", "repeat", "bad_time"} <= set(facts["rejected"])
    assert facts["users_too_few_events"] > 0
    assert not run_stage(recipe, "prepare", prepare.run)


PIECES = st.sampled_from([b"u\t2026-01-01\tsearch\tsome query\n", b"\n", b"\0", b'"', b"1\t", b"2026-01-01", b"@"])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.binary(max_size=30) | PIECES, max_size=12),
    format=st.sampled_from(["tsv", "aol", "csv"]),
)
def test_any_bytes_read_equals_kept_plus_rejected(tmp_path, parts, format) -> None:
    header, good = {
        "tsv": (TSV, "u\t2026-01-01\tsearch\tq\n"),
        "csv": (TSV.replace("\t", ","), "u,2026-01-01,search,q\n"),
        "aol": (AOL, "u\tq\t2026-01-01\t\t\n"),
    }[format]
    body = b"".join(parts)
    facts, rejects = run_rows(tmp_path, (header + good).encode() + body, format=format)
    rows = 1 + body.count(b"\n") + (not body.endswith(b"\n") and body != b"")
    assert facts["rows_read"] == rows or (format == "csv" and facts["rows_read"] < rows)
    assert facts["rows_read"] == facts["rows_kept"] + len(rejects)
    assert len({reject["line"] for reject in rejects}) == len(rejects)
    assert {reject["reason"] for reject in rejects} <= set(REASONS)
