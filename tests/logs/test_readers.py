"""Readers on real files: every format, and every kind of bad input."""

import gzip
import json
import tracemalloc
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.core.config import Columns
from tppo.logs.readers import MAX_LINE_BYTES, REASONS, BadRow, RawRow, list_files, read_rows

AOL = b"AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n"
TSV = b"user_id\ttime\tkind\ttext\n"
CSV = b"user_id,time,kind,text\n"


def read(path: Path, format: str, columns: Columns | None = None) -> list[RawRow | BadRow]:
    with path.open("rb") as raw:
        return list(read_rows(path, raw, format, columns or Columns()))


def read_bytes(folder: Path, content: bytes, format: str, columns: Columns | None = None) -> list[RawRow | BadRow]:
    path = folder / "log"
    path.write_bytes(content)
    return read(path, format, columns)


def test_aol(tmp_path) -> None:
    rows = read_bytes(
        tmp_path,
        AOL + b"1\tfoo bar\t2006-03-01 07:17:12\t\thttp://www.x.com\n1\tfoo\t2006-03-01 07:17:13\t1\thttp://y.org\r\n"
        b"2\tq\t2006-03-01 00:00:00\t\t\n2\tq\t2006-03-01 00:00:00\n2\tq\n\n",
        "aol",
    )
    assert rows == [
        RawRow(2, "1", "2006-03-01 07:17:12", "search", "foo bar", "http://www.x.com"),
        RawRow(3, "1", "2006-03-01 07:17:13", "search", "foo", "http://y.org"),
        RawRow(4, "2", "2006-03-01 00:00:00", "search", "q", None),
        RawRow(5, "2", "2006-03-01 00:00:00", "search", "q", None),
        BadRow(6, "wrong_columns"),
        BadRow(7, "blank_line"),
    ]


def test_bad_lines_cost_one_row_each(tmp_path) -> None:
    good = b"u\t2026-01-01\tsearch\tq\n"
    rows = read_bytes(
        tmp_path, TSV + b"a\0b\n" + good + b"\xff\xfe\n" + b"x" * 70_000 + b"\n" + good + b"\n\xc3", "tsv"
    )
    assert [(row.line, getattr(row, "reason", "")) for row in rows] == [
        (2, "nul_byte"),
        (3, ""),
        (4, "bad_utf8"),
        (5, "too_long_line"),
        (6, ""),
        (7, "blank_line"),
        (8, "bad_utf8"),
    ]


def test_longest_line(tmp_path) -> None:
    start = b"u\t2026-01-01\tsearch\t"
    fits = start + b"x" * (MAX_LINE_BYTES - len(start) - 1) + b"\n"
    rows = read_bytes(tmp_path, TSV + fits + b"x" + fits + fits, "tsv")
    assert [isinstance(row, RawRow) for row in rows] == [True, False, True]


def test_ten_megabyte_line_is_not_held_in_memory(tmp_path) -> None:
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(TSV + b"x" * 10_000_000 + b"\nu\t2026-01-01\tsearch\tq\n"))
    tracemalloc.start()
    rows = read(path, "tsv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [BadRow(2, "too_long_line"), RawRow(3, "u", "2026-01-01", "search", "q")]
    assert peak < 2_000_000


def test_tsv_quotes_are_ordinary_and_columns_are_mapped(tmp_path) -> None:
    columns = Columns(user_id="who", time="when", kind="", text="what")
    rows = read_bytes(tmp_path, '\ufeffwhat\twho\twhen\textra\n"a b" c"\tu\tt\tz\n'.encode(), "tsv", columns)
    assert rows == [RawRow(2, "u", "t", "search", '"a b" c"')]


def test_csv_records_may_span_lines(tmp_path) -> None:
    rows = read_bytes(tmp_path, CSV + b'u,t,search,"a ""b"",\n\nc"\r\n\nu,t,click,x\nu,t,click\n', "csv")
    assert rows == [
        RawRow(2, "u", "t", "search", 'a "b",\n\nc'),
        BadRow(5, "blank_line"),
        RawRow(6, "u", "t", "click", "x"),
        BadRow(7, "wrong_columns"),
    ]


@pytest.mark.parametrize("end", [b"", b"x" * 60 + b"\n", b"y,t,search,z\n" * 10_000])
def test_csv_unclosed_quote_costs_one_row(tmp_path, end) -> None:
    rows = read_bytes(tmp_path, CSV + b'u,t,search,"open\nu,t,search,q\nv,t,search,r\n' + end, "csv")
    assert rows[:3] == [
        BadRow(2, "malformed"),
        RawRow(3, "u", "t", "search", "q"),
        RawRow(4, "v", "t", "search", "r"),
    ]
    assert [row.line for row in rows] == list(range(2, 2 + len(rows)))
    assert len(rows) == 3 + end.count(b"\n")


def test_csv_bad_line_inside_a_record(tmp_path) -> None:
    rows = read_bytes(tmp_path, CSV + b'u,t,search,"a\nb\0\nc"d\nu,t,search,q\n', "csv")
    assert [(row.line, getattr(row, "reason", "")) for row in rows] == [
        (2, "malformed"),
        (3, "nul_byte"),
        (4, "wrong_columns"),
        (5, ""),
    ]


def test_jsonl(tmp_path) -> None:
    good = {"user_id": 7, "time": "t", "kind": "visit", "text": "q"}
    values = [
        good,
        {**good, "text": None},
        {**good, "time": 1.5},
        {"user_id": "u"},
        [1],
        {**good, "user_id": True},
    ]
    lines = [json.dumps(value) for value in values] + [
        "{",
        "",
        "[" * 40_000,
        '{"user_id": ' + "9" * 5000 + "}",
    ]
    rows = read_bytes(tmp_path, "\n".join(lines).encode(), "jsonl")
    assert rows[0] == RawRow(1, "7", "t", "visit", "q")
    reasons = [
        "missing_value",
        "bad_time",
        "missing_value",
        "malformed",
        "missing_value",
        "malformed",
        "blank_line",
    ]
    assert rows[1:] == [
        BadRow(line, reason) for line, reason in enumerate([*reasons, "malformed", "malformed"], start=2)
    ]


def test_parquet(tmp_path) -> None:
    path = tmp_path / "log.parquet"
    times = pa.array([0, 1_000_000_001, None, 2**62], pa.timestamp("us", "America/New_York"))
    texts = pa.array([b"a", b"\xff", b"c", b"d"]).view(pa.string())
    table = pa.table(
        {
            "user_id": [1, 2, 3, 4],
            "time": times,
            "kind": pa.array(["search"] * 4).dictionary_encode(),
            "text": texts,
        }
    )
    pq.write_table(table, path)
    assert read(path, "parquet") == [
        RawRow(1, "1", datetime(1970, 1, 1), "search", "a"),
        BadRow(2, "bad_utf8"),
        BadRow(3, "missing_value"),
        RawRow(4, "4", "out of range", "search", "d"),
    ]
    pq.write_table(table.set_column(0, "user_id", pa.array([0.5] * 4)), path)
    with pytest.raises(UserError, match="column user_id is double"):
        read(path, "parquet")
    pq.write_table(table.drop_columns(["text"]), path)
    with pytest.raises(UserError, match=r"\['text'\]"):
        read(path, "parquet")
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(path, "parquet")


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (b"a\tb\n", "aol", "not the AOL header"),
        (TSV, "aol", "not the AOL header"),
        (b"user_id\ttime\n", "tsv", r"\['kind', 'text'\].*has \['user_id', 'time'\]"),
        (b"user_id\tuser_id\ttime\tkind\ttext\n", "tsv", "exactly once"),
        (b"secret name\tother\n", "tsv", "2 columns, none of them expected"),
        (TSV, "csv", "prepare.format"),
        (b'"a\n', "csv", "no CSV header"),
        ("user_id\ttime".encode("utf-16-le"), "tsv", "line 1 is no header.*prepare.encoding"),
        (b"", "tsv", "empty"),
        (b"", "jsonl", "empty"),
        (gzip.compress(b""), "aol", "empty"),
        (gzip.compress(TSV + b"u\tt\tsearch\tq\n" * 9)[:-12], "tsv", "damaged gzip data"),
        (gzip.compress(TSV)[:20] + b"\xff" * 50, "tsv", "damaged gzip data"),
    ],
)
def test_unusable_file_is_one_clear_error(tmp_path, content, format, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_bytes(tmp_path, content, format)
    assert str(tmp_path) in str(error.value)
    assert "secret" not in str(error.value)


def test_gzip_in_name_only(tmp_path) -> None:
    path = tmp_path / "log.gz"
    path.write_bytes(TSV)
    with pytest.raises(UserError, match="not gzip data"):
        read(path, "tsv")


def test_list_files(tmp_path) -> None:
    for name in ("b.gz", "a.gz"):
        (tmp_path / name).write_bytes(b"x")
    files = list_files([str(tmp_path / "a.gz"), str(tmp_path / "*.gz")])
    assert [path.name for path in files] == ["a.gz", "b.gz"]
    (tmp_path / "empty").touch()
    for source, message in [
        ("none", "does not exist"),
        ("*.csv", "does not exist"),
        ("", "folder"),
        ("empty", "empty"),
    ]:
        with pytest.raises(UserError, match=message):
            list_files([str(tmp_path / source)])
    with pytest.raises(UserError, match="no file"):
        list_files([])


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b'"', b"u,t,search,q", b'u,t,search,"q', b"\n", b"\r"])))
def test_any_bytes_are_read_line_by_line(tmp_path_factory, parts) -> None:
    folder = tmp_path_factory.getbasetemp()
    body = b"".join(parts)
    lines = body.count(b"\n") + (not body.endswith(b"\n") and body != b"")
    for header, format in ((AOL, "aol"), (TSV, "tsv"), (CSV, "csv")):
        rows = read_bytes(folder, header + body, format)
        numbers = [row.line for row in rows]
        assert all(row.reason in REASONS for row in rows if isinstance(row, BadRow))
        assert numbers == sorted(set(numbers))
        if format == "csv":
            assert len(numbers) <= lines
        else:
            assert numbers == list(range(2, lines + 2))
