"""Formats that people have, and what goes wrong in them: nothing is swallowed, guessed or quoted."""

import gzip
import io
import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.core.config import Columns, Prepare
from tppo.logs.readers import BadRow, RawRow, list_files, read_log, read_rows
from tppo.logs.staging import Missing, clean_row

CSV = "user_id,time,kind,text\n"
HOUR = "2024-01-20 10:"


def read(content: bytes | str, format: str, columns: Columns | None = None, **options: Any) -> list[RawRow | BadRow]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_rows(Path("log"), io.BytesIO(data), format, columns or Columns(), **options))


def read_parquet(path: Path, table: pa.Table, columns: Columns | None = None) -> list[RawRow | BadRow]:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    with path.open("rb") as raw:
        return list(read_rows(path, raw, "parquet", columns or Columns()))


class TestCsv:
    def test_a_pair_of_stray_quotes_swallows_no_row(self) -> None:
        rows = read(
            CSV + f'a,{HOUR}00:00,search,"6 inch\nprivate,{HOUR}01:00,search,12"\nc,{HOUR}02:00,search,after\n', "csv"
        )
        assert rows == [
            BadRow(2, "malformed"),
            RawRow(3, "private", f"{HOUR}01:00", "search", '12"'),
            RawRow(4, "c", f"{HOUR}02:00", "search", "after"),
        ]

    @pytest.mark.parametrize("between", [0, 1, 3])
    @pytest.mark.parametrize("kind", ["kind", ""])
    def test_nor_rows_between_them(self, between: int, kind: str) -> None:
        head = CSV if kind else "user_id,time,text\n"
        row = "u{},2024-01-20 10:00:00," + ("search," if kind else "")
        lines = (
            [row.format(0) + '"open'] + [row.format(i + 1) + "q" for i in range(between)] + [row.format(9) + 'shut"']
        )
        rows = read(head + "\n".join(lines), "csv", Columns(kind=kind))
        assert rows[0] == BadRow(2, "malformed")
        assert [row.text for row in rows[1:] if isinstance(row, RawRow)] == ["q"] * between + ['shut"']

    @pytest.mark.parametrize(
        ("kind", "second"),
        [
            ("kind", '{},2024-01-09 12:01:00,12"'),  # a column short
            ("kind", '{},search,12"'),
            ("kind", '{},soon,glance,12"'),
            ("kind", '{},soon,glance,12",more'),
            ("", '{},,12"'),
            ("", '{},01/09/2024,12"'),
        ],
    )
    def test_a_row_with_faults_is_not_swallowed_either(self, kind: str, second: str) -> None:
        head = CSV if kind else "user_id,time,text\n"
        first = f"a,{HOUR}00:00," + ("search," if kind else "")
        rows = read(head + f'{first}"6 inch\n{second.format("secretuser2")}\n{first}q\n', "csv", Columns(kind=kind))
        assert [row.line for row in rows] == [2, 3, 4]
        assert rows[0] == BadRow(2, "malformed")
        assert not any("secretuser2" in row.text for row in rows if isinstance(row, RawRow))

    @pytest.mark.parametrize(
        ("field", "text"),
        [
            ('"a\nsearch"', "a\nsearch"),
            ('"a\n2024-01-20"', "a\n2024-01-20"),
            ('"a\nb"', "a\nb"),
            ('"a\nb, c"', "a\nb, c"),
            ('"a ""b""\n\n, c"', 'a "b"\n\n, c'),
            ("it ended\\", "it ended\\"),
            ('"path c:\\"', "path c:\\"),
            ('27" tv', '27" tv'),
            ("rock 'n' roll", "rock 'n' roll"),
        ],
    )
    def test_what_is_whole_is_read(self, field: str, text: str) -> None:
        for size in (30, 1 << 16):
            raw = io.BytesIO(f"{CSV}u,{HOUR}00:00,search,{field}\nv,{HOUR}01:00,search,q\n".encode())
            rows = [row for block in read_log(Path("log"), raw, "csv", Columns(), size=size) for row in block.rows()]
            assert [row.text for row in rows if isinstance(row, RawRow)] == [text, "q"]
            assert rows[0].line == 2
            assert rows[1].line == 3 + field.count("\n")

    @pytest.mark.parametrize("field", ['"say \\"hi\\" now"', '"new york" hotels', '"a" "b"'])
    def test_broken_quoting_costs_its_own_row(self, field: str) -> None:
        rows = read(f"{CSV}u,{HOUR}00:00,search,{field}\nv,{HOUR}01:00,search,q\n", "csv")
        assert rows == [BadRow(2, "malformed"), RawRow(3, "v", f"{HOUR}01:00", "search", "q")]

    @given(
        st.lists(st.sampled_from(['u,t,search,"', '"', "q", 'x"', ",", '""', f"v,{HOUR}00:00,search,r", "\n", "\n"])),
        st.integers(25, 90),
    )
    def test_blocks_of_any_size_have_the_same_rows(self, parts: list[str], size: int) -> None:
        data = (CSV + "".join(parts)).encode()
        rows = {
            size: [r for b in read_log(Path("log"), io.BytesIO(data), "csv", Columns(), size=size) for r in b.rows()]
            for size in (size, 1 << 20)
        }
        assert rows[size] == rows[1 << 20]


def test_cr_line_ends_are_read_and_a_wrong_header_is_not_quoted() -> None:
    text = "user_id\ttime\tkind\ttext\ru\t2024-01-20\tsearch\tprivate words\rv\t2024-01-21\tsearch\tq\r"
    assert [row.line for row in read(text, "tsv")] == [2, 3]
    for content, format in (
        ("user_id\tprivate words\ttext\n", "tsv"),
        ("private,words,text\n", "csv"),
        ('"private\n', "csv"),
        ("u1\tprivate\t2024-01-20\t\t\n", "aol"),
        ("user_id\x0bprivate\x0btext\n", "tsv"),
        (json.dumps([{"text": "private words"}]), "jsonl"),
        (b"PAR1 private words", "parquet"),
        (gzip.compress(b"private")[:-9], "tsv"),
    ):
        with pytest.raises(UserError) as error:
            read(content, format)
        assert "private" not in str(error.value)
        assert "prepare." in str(error.value) or "jq" in str(error.value) or "get the file again" in str(error.value)


@pytest.mark.parametrize(
    ("format", "head", "row"),
    [
        ("tsv", "user_id\ttime\tkind\ttext\n", "private{}\t2024-01-20 10:00:00\tsearch\tq"),
        ("csv", CSV, 'private{},2024-01-20 10:00:00,search,"q"'),
        ("aol", "AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n", "private{}\tq\t2006-03-01 07:17:12\t\t"),
        ("jsonl", "", '{{"user_id": "private{}", "time": "2024-01-20", "kind": "search", "text": "q"}}'),
    ],
)
def test_rows_joined_by_cr_alone_are_refused(format: str, head: str, row: str) -> None:
    rows = [row.format(number) for number in range(6)]
    first = 3 + head.count("\n")
    for tail in ("\r".join(rows[2:]), "\r".join(rows[2:]) + "\n"):
        with pytest.raises(UserError, match=f"line {first} is several rows with CR between them.*tr ") as error:
            read(head + "\n".join(rows[:2]) + "\n" + tail, format)
        assert "private" not in str(error.value)
    assert len(read(head + "\r\n".join(rows) + "\r\r\n", format)) == 6
    assert len(read(head + rows[0] + "\n" + rows[1].replace("q", "q\rr") + "\n", format)) == 2


def test_times_of_one_file_are_of_one_kind() -> None:
    line = '{{"user_id": "u", "time": {}, "kind": "search", "text": "q"}}\n'
    for first, format in ((1700000000, "epoch_s"), (1700000000123, "epoch_ms"), ('"1700000000123456"', "epoch_us")):
        (block,) = read_log(Path("log"), io.BytesIO(line.format(first).encode()), "jsonl", Columns())
        assert block.layout.time_format == format
    content = line.format('"soon"') + line.format('"2024-01-20"') + line.format(1700000000)
    (block,) = read_log(Path("log"), io.BytesIO(content.encode()), "jsonl", Columns())
    assert block.layout.time_format == "iso"
    (block,) = read_log(Path("log"), io.BytesIO(content.encode()), "jsonl", Columns(time_format="epoch_ms"))
    assert block.layout.time_format == "epoch_ms"


def test_half_a_character_is_no_text() -> None:
    for text, reason in (("\\ud800 q", "bad_utf8"), ("\\ud83d\\ude00 q", None)):
        line = '{"user_id": "\\ud800", "time": "2024-01-20", "kind": "search", "text": "TEXT"}'
        (row,) = read(line.replace("TEXT", text), "jsonl")
        assert clean_row(row, b"key", 99)[0] == reason


def test_a_key_that_stands_twice_is_a_guess() -> None:
    for twice in ('"user_id": "v", ', '"user": {"id": 1, "id": 2}, '):
        line = '{"user_id": "u", TWICE"time": "2024-01-20", "kind": "search", "text": "q"}'
        rows = read(line.replace("TWICE", twice) + "\n" + line.replace("TWICE", ""), "jsonl")
        assert rows == [BadRow(1, "malformed"), RawRow(2, "u", "2024-01-20", "search", "q")]


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        *((user, "missing_value") for user in ("NaT", "nat", '""', "''", "#NULL!", "\uff2e\uff35\uff2c\uff2c")),
        *((user, "missing_value") for user in ("\ufeffnull", "nu\u200bll", "nu\u200dll\u2060", "\u200b", "\xadN/A")),
        *((user, "shared_user") for user in ("0.0", "00", "Not Set", "missing", "\uff10", "gue\u200cst", "\uff0d1")),
        *((user, None) for user in ("000", "nullx", "\uff11", "u1")),
    ],
)
def test_ids_that_stand_for_none(user: str, reason: str | None) -> None:
    row = RawRow(1, user, "2024-01-20", "search", "missing")
    assert clean_row(row, b"key", 99, Missing.of(Prepare()))[0] == reason


def test_fields_of_nested_json() -> None:
    columns = Columns(user_id="user.id", text="q.text.raw", kind="")
    record = {"user": {"id": 7}, "time": "t", "q": {"text": {"raw": "a"}}}
    rows = read("\n".join(map(json.dumps, (record, {**record, "q": "a"}))), "jsonl", columns)
    assert rows == [RawRow(1, "7", "t", "search", "a"), BadRow(2, "missing_value")]


class TestParquet:
    @pytest.mark.parametrize("unit", ["ms", "us", "ns"])
    def test_a_time_out_of_range_is_one_bad_time(self, tmp_path, unit: str) -> None:
        times = pa.array([0, 2**62, None], pa.int64()).cast(pa.timestamp(unit))
        table = pa.table({"user_id": ["a", "b", "c"], "time": times, "text": ["x", "y", "z"]})
        rows = read_parquet(tmp_path / "log", table, Columns(kind=""))
        assert rows[0] == RawRow(1, "a", datetime(1970, 1, 1), "search", "x")
        assert isinstance(rows[1], RawRow)
        assert rows[1].time == "out of range" or unit == "ns"
        assert rows[2] == BadRow(3, "missing_value")

    def test_int96_times_do_not_wrap(self, tmp_path) -> None:
        times = pa.array([datetime(2024, 1, 20), datetime(2600, 1, 1)], pa.timestamp("us"))
        table = pa.table({"user_id": ["a", "b"], "time": times, "text": ["x", "y"]})
        pq.write_table(table, tmp_path / "log", use_deprecated_int96_timestamps=True)
        with (tmp_path / "log").open("rb") as raw:
            rows = list(read_rows(tmp_path / "log", raw, "parquet", Columns(kind="")))
        assert [row.time for row in rows] == [datetime(2024, 1, 20), datetime(2600, 1, 1)]

    @pytest.mark.parametrize(
        ("user", "expected"),
        [
            (pa.array([7], pa.uint64()), "7"),
            (pa.array([Decimal(7)], pa.decimal128(20, 0)), "7"),
            (pa.array([b"u"], pa.binary()), "u"),
            (pa.array(["u"], pa.large_string()), "u"),
            (pa.array(["u"], pa.string_view()), "u"),
            (pa.array(["u"]).dictionary_encode(), "u"),
            (pa.array([b"\xff"], pa.binary()), "bad_utf8"),
            (pa.nulls(1), "missing_value"),
        ],
    )
    @pytest.mark.parametrize(
        ("time", "when"),
        [
            (pa.array([date(2024, 1, 20)], pa.date32()), "2024-01-20"),
            (pa.array([date(2024, 1, 20)], pa.date64()), "2024-01-20"),
            (pa.array([1700000000], pa.int64()), "1700000000"),
            (pa.array([1.7e9], pa.float64()), "1700000000.000000"),
            (pa.array(["2024-01-20"]), "2024-01-20"),
        ],
    )
    def test_types(self, tmp_path, user: pa.Array, expected: str, time: pa.Array, when: str) -> None:
        table = pa.table({"user_id": user, "time": time, "kind": ["search"], "text": ["q"]})
        (row,) = read_parquet(tmp_path / "log", table)
        assert row == (RawRow(1, expected, when, "search", "q") if len(expected) == 1 else BadRow(1, expected))

    @pytest.mark.parametrize("kind", [pa.struct([("a", pa.string())]), pa.list_(pa.string()), pa.bool_(), pa.float64()])
    def test_other_types_are_refused(self, tmp_path, kind: pa.DataType) -> None:
        table = pa.table({"user_id": ["u"], "time": ["t"], "kind": ["search"], "text": pa.nulls(1, kind)})
        with pytest.raises(UserError, match=r"column text is .*cast it"):
            read_parquet(tmp_path / "log", table)

    def test_times_without_zone_have_the_zone_that_is_given(self, tmp_path) -> None:
        times = pa.array([datetime(2024, 7, 20, 10)], pa.timestamp("ms"))
        table = pa.table({"user_id": ["u"], "time": times, "text": ["q"]})
        (row,) = read_parquet(tmp_path / "log", table, Columns(kind="", time_zone="Europe/Berlin"))
        assert row.time == "2024-07-20T10:00:00"
        zoned = table.set_column(1, "time", times.cast(pa.timestamp("ms", "UTC")))
        (row,) = read_parquet(tmp_path / "log", zoned, Columns(kind="", time_zone="Europe/Berlin"))
        assert row.time == datetime(2024, 7, 20, 10)

    def test_a_partitioned_folder_is_one_log(self, tmp_path) -> None:
        for day in ("2024-01-02", "2024-01-01"):
            for number in (1, 0):
                file = tmp_path / "log" / f"time={day}" / "kind=search" / f"part-{number}.parquet"
                read_parquet(
                    file, pa.table({"user_id": [f"{day} {number}"], "text": ["q"], "time": [day], "kind": ["x"]})
                )
                pq.write_table(pa.table({"user_id": [f"{day} {number}"], "text": ["q"]}), file)
        (tmp_path / "log" / "_SUCCESS").touch()
        (tmp_path / "log" / ".part-0.parquet.crc").write_text("x")
        files = list_files([str(tmp_path / "log")], "parquet")
        rows = []
        for path in files:
            with path.open("rb") as raw:
                rows += list(read_rows(path, raw, "parquet", Columns()))
        assert [row.user for row in rows] == ["2024-01-01 0", "2024-01-01 1", "2024-01-02 0", "2024-01-02 1"]
        assert {(row.time, row.kind) for row in rows[:2]} == {("2024-01-01", "search")}
        # A partition that lies elsewhere, and a link that leads back.
        (tmp_path / "log" / "time=2024-01-02").rename(tmp_path / "elsewhere")
        (tmp_path / "log" / "time=2024-01-02").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "log" / "loop").symlink_to(tmp_path / "log")
        assert list(list_files([str(tmp_path / "log")], "parquet")) == list(files)
        for name in ("_delta_log", ".hoodie"):
            (tmp_path / "elsewhere" / name).mkdir()
            with pytest.raises(UserError, match=f"{name}.*present rows as plain Parquet"):
                list_files([str(tmp_path / "log")], "parquet")
            (tmp_path / "elsewhere" / name).rmdir()
        (tmp_path / "log" / "more.csv").write_text("x")
        with pytest.raises(UserError, match=r"1 file\(s\) that are not named .parquet.*more.csv"):
            list_files([str(tmp_path / "log")], "parquet")
        with pytest.raises(UserError, match="is a folder"):
            list_files([str(tmp_path / "log")], "csv")


@pytest.mark.parametrize(
    ("source", "is_column"),
    [
        *(("log", True), ("log/kind=*", True), ("log/**/*.parquet", True)),
        *(("log/kind=search", False), ("log/kind=search/a.parquet", False), ("log/kind=search/*.parquet", False)),
    ],
)
def test_only_folders_below_the_source_hold_columns(tmp_path, source: str, is_column: bool) -> None:
    folder = tmp_path / "text=private"
    path = folder / "log" / "kind=search" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": ["u"], "time": ["2024-01-20"], "other": ["q"]}), path)
    ((found, given),) = list_files([str(folder / source)], "parquet").items()
    for columns in (Columns(), Columns(text="other")):
        with found.open("rb") as raw:
            blocks = read_log(found, raw, "parquet", columns, given=given)
            if is_column and columns.text == "other":
                assert [row.kind for block in blocks for row in block.rows()] == ["search"]
            else:
                with pytest.raises(UserError, match="text" if columns.text == "text" else "kind"):
                    list(blocks)


UBI = [
    {"query_id": "q1", "client_id": "c", "user_query": "red shoes", "timestamp": "2024-01-20T10:00:00.000Z"},
    {
        "action_name": "click",
        "query_id": "q1",
        "client_id": "c",
        "timestamp": "2024-01-20T10:00:05Z",
        "event_attributes": {"object": {"object_id": "4711", "name": "Red Shoe, size 9"}, "position": {"ordinal": 1}},
    },
    {"action_name": "impression", "client_id": "c", "timestamp": "2024-01-20T10:00:05Z"},
    {"action_name": "click", "client_id": "c", "timestamp": "2024-01-20T10:00:06Z", "event_attributes": {}},
    {"_index": "ubi_queries", "_source": {"client_id": "d", "user_query": "blue hat", "timestamp": 1705744800000}},
    {"query_id": "q3", "user_query": "nobody", "timestamp": "2024-01-20T10:00:00Z"},
]
UBI_ROWS = [
    RawRow(1, "c", "2024-01-20T10:00:00.000Z", "search", "red shoes"),
    RawRow(2, "c", "2024-01-20T10:00:05Z", "click", "Red Shoe, size 9"),
    BadRow(3, "unknown_kind"),
    BadRow(4, "missing_value"),
    RawRow(5, "d", "1705744800000", "search", "blue hat"),
    BadRow(6, "missing_value"),
]


def ga4(name: str, items: list[dict[str, Any]] | None = None, **parameters: Any) -> dict[str, Any]:
    values = [{"key": "ga_session_id", "value": {"string_value": None, "int_value": 5}}]
    values += [{"key": k, "value": {"string_value": v, "int_value": None}} for k, v in parameters.items()]
    return {
        "event_name": name,
        "event_timestamp": 1705744800000000,
        "user_pseudo_id": "1.2",
        "event_params": values,
        "items": items or [],
    }


GA4 = [
    ga4("view_search_results", search_term="red shoes"),
    ga4("page_view", page_title="Shoes", page_location="https://shop.example/shoes"),
    ga4("select_item", [{"item_id": "1", "item_name": "Red Shoe"}]),
    ga4("purchase", [{"item_id": "1", "item_name": "Red Shoe"}, {"item_id": "2", "item_name": "Sock"}]),
    ga4("scroll"),
    ga4("search"),
]
GA4_ROWS = [
    RawRow(1, "1.2", "1705744800000000", "search", "red shoes"),
    RawRow(2, "1.2", "1705744800000000", "visit", "Shoes"),
    RawRow(3, "1.2", "1705744800000000", "click", "Red Shoe"),
    RawRow(4, "1.2", "1705744800000000", "purchase", "Red Shoe"),
    BadRow(5, "unknown_kind"),
    BadRow(6, "missing_value"),
]


@pytest.mark.parametrize(("format", "records", "rows"), [("ubi", UBI, UBI_ROWS), ("ga4", GA4, GA4_ROWS)])
def test_exports_of_analytics(tmp_path, format, records, rows) -> None:
    lines = "\n".join(map(json.dumps, records))
    assert read(lines, format) == rows
    assert read(lines.replace("1705744800000000", '"1705744800000000"'), format) == rows
    path = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(records, schema=schema_of(records)), path)
    with path.open("rb") as raw:
        found = list(read_rows(path, raw, format, Columns()))
    assert found == rows


@pytest.mark.parametrize("missing", ["event_name", "event_timestamp", "user_pseudo_id"])
def test_a_ga4_file_without_its_columns_is_refused(tmp_path, missing: str) -> None:
    path = tmp_path / "log.parquet"
    for table in (pa.Table.from_pylist([{**GA4[0]}]).drop_columns([missing]), pa.table({"private": ["a"]})):
        pq.write_table(table, path)
        with path.open("rb") as raw, pytest.raises(UserError, match=f"'{missing}'.*prepare.format") as error:
            list(read_rows(path, raw, "ga4", Columns()))
        assert "private" not in str(error.value)


def schema_of(records: list[dict[str, Any]]) -> pa.Schema:
    """The types of all records together (from_pylist takes the first's columns only)."""
    return pa.unify_schemas([pa.Table.from_pylist([record]).schema for record in records], promote_options="permissive")


def test_another_user_of_an_export() -> None:
    record = {**UBI[0], "session_id": "s"}
    (row,) = read(json.dumps(record), "ubi", Columns(user_id="session_id"))
    assert row.user == "s"
