"""The blind sheet: what is on it, what comes back, and everything that is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.agreement_run import RESPONSES, fill
from tppo.core.common import UserError
from tppo.judge.sheet import (
    COLUMNS,
    ItemAnswers,
    SheetItem,
    SheetKey,
    blank_answers,
    export_sheet,
    read_key,
    read_person,
    read_sheet,
    write_sheet,
)

FORMULA_STARTS = "=+-@\t\r\n\0＝＋－＠'\""


def key_of(responses: list[str], against: list[str] | None = None) -> SheetKey:
    items = [
        SheetItem(example_id=f"e{n}", sample=0, response=response, against=against or ["=1+1", "rose  pruning"])
        for n, response in enumerate(responses)
    ]
    return SheetKey(version=1, rubric="targets", seed=0, labels="labels.parquet", labels_sha256="0" * 64, items=items)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_sheet(tmp_path / "agreement", key_of(RESPONSES))
    return tmp_path / "agreement"


def parse(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def test_a_row_per_word_and_one_per_response(folder: Path):
    rows = parse(folder / "sheet.csv")
    assert tuple(rows[0]) == COLUMNS
    assert {row["label"] for row in rows} == {""}
    for n, item in enumerate(read_key(folder).items):
        mine = [row for row in rows if row["item"] == str(n + 1)]
        assert [row["text"] for row in mine[:-1]] == [f"[{word}]" for word in RESPONSES[n].split()]
        assert [row["i"] for row in mine] == [*map(str, range(len(item.words))), ""]
        assert (mine[-1]["question"], mine[-1]["text"]) == ("response", mine[-1]["response"])
        assert {row["against"] for row in mine} == {"[=1+1 | rose pruning]"}


def test_no_cell_starts_a_formula_or_looks_like_a_number_to_convert(folder: Path):
    for row in parse(folder / "sheet.csv"):
        for column in ("text", "response", "against"):
            assert row[column].startswith("[")
            assert row[column].endswith("]")
        assert row["item"].isdigit()
        assert row["i"] == "" or row["i"].isdigit()


def test_a_row_is_a_line(folder: Path):
    text = (folder / "sheet.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")
    assert text.count(b"\n") == text.count(b"\r\n") == len(parse(folder / "sheet.csv")) + 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from(FORMULA_STARTS), max_size=30), min_size=1,
                max_size=4), st.data())  # fmt: skip
def test_any_text_and_any_answers_come_back(tmp_path_factory: pytest.TempPathFactory, responses: list[str], data: Any):
    key = key_of(responses, against=responses)
    label = st.sampled_from([0, 1, None])
    answers = [
        ItemAnswers(words=[data.draw(label) for _ in item.words], sentence=data.draw(label)) for item in key.items
    ]
    path = tmp_path_factory.mktemp("any") / "sheet.csv"
    write_sheet(path, key, answers)
    assert read_sheet(path, key) == answers
    for row in csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")):
        assert not any(cell.startswith(tuple(FORMULA_STARTS)) for cell in row)


def test_the_key_and_the_words_survive(folder: Path):
    key = read_key(folder)
    assert key == key_of(RESPONSES)
    assert [" ".join(word.text for word in item.words) for item in key.items] == [
        " ".join(r.split()) for r in RESPONSES
    ]


def test_a_second_export_does_not_overwrite_answers(folder: Path):
    fill(folder, lambda *_: "1")
    before = (folder / "sheet.csv").read_bytes()
    with pytest.raises(UserError, match=r"sheet\.csv exists and may hold.*move or delete"):
        export_sheet(folder, key_of(RESPONSES))
    (folder / "sheet.csv").rename(folder / "anna.csv")
    with pytest.raises(UserError, match=r"sheet\.json exists"):
        export_sheet(folder, key_of(RESPONSES))
    assert (folder / "anna.csv").read_bytes() == before


def test_rows_may_be_sorted_and_blank_lines_end_a_file(folder: Path):
    path = fill(folder, lambda example_id, text, i: "1" if i == 0 else "0")
    filled = read_sheet(path, read_key(folder))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], *sorted(lines[1:]), "\n\n"]), encoding="utf-8")
    assert read_sheet(path, read_key(folder)) == filled


def test_answers_reach_the_rater(folder: Path):
    path = fill(folder, lambda example_id, text, i: {None: "1", 0: "0", 1: ""}.get(i, "1"))
    rater = read_person(path, read_key(folder))
    assert (rater.name, rater.kind) == ("sheet", "person")
    assert rater.judged["e4", 0].words == (0, "unanswered", 1, 1, 1)
    assert rater.judged["e4", 0].sentence == 1
    assert rater.judged["e7", 0].words == ()
    write_sheet(path, read_key(folder), blank_answers(read_key(folder)))
    assert read_person(path, read_key(folder)).judged["e4", 0].words == ("unanswered",) * 5


Rows = list[list[str]]


def drop(rows: Rows) -> None:
    del rows[3]


def double(rows: Rows) -> None:
    rows.insert(5, list(rows[4]))


def change(column: str, text: str) -> Callable[[Rows], None]:
    def edit(rows: Rows) -> None:
        rows[4][COLUMNS.index(column)] = text

    return edit


def rename_heading(rows: Rows) -> None:
    rows[0][4] = "Label"


def short(rows: Rows) -> None:
    rows[4].pop()


BAD_SHEETS = {
    "row missing": (drop, r"lacks 1 rows \(first: item 1, question word, i 2\): only the column 'label'"),
    "row doubled": (double, r"line 6 repeats line 5: delete one"),
    "word changed": (change("text", "[+2]"), r"line 5: column 'text' is not as exported"),
    "brackets gone": (change("text", "@SUM(A1)"), r"line 5: column 'text'"),
    "response changed": (change("response", "[x]"), r"line 5: column 'response'"),
    "reference changed": (change("against", "[x]"), r"line 5: column 'against'"),
    "foreign item": (change("item", "99"), r"line 5 \(columns item, question, i\) is no row of sheet\.json"),
    "foreign word": (change("i", "77"), r"line 5 .* is no row"),
    "label 2": (change("label", "2"), r"line 5: label '2' is not 1, 0 or empty"),
    "label 1.0": (change("label", "1.0"), r"line 5: label '1\.0'"),
    "label true": (change("label", "TRUE"), r"line 5: label 'TRUE'"),
    "label blank": (change("label", " "), r"line 5: label ' '"),
    "heading changed": (rename_heading, r"line 1 is not the heading item,question,i,text,label,response,against"),
    "column lost": (short, r"line 5 has 6 columns, not 7"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_SHEETS.values(), ids=BAD_SHEETS)
def test_edited_sheets_are_refused_with_the_line(folder: Path, edit: Callable[[Rows], None], message: str):
    path = fill(folder, lambda *_: "1")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    edit(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match=message) as caught:
        read_sheet(path, read_key(folder))
    assert str(path) in str(caught.value)
    assert "HYPERLINK" not in str(caught.value)  # nobody's searches in an error message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1 is not the heading"),
        (b"item;question;i;text;label;response;against\n", r"line 1 .* another separator than the comma"),
        ("naïve".encode("latin-1"), r"is not UTF-8 \(byte 2\): save it as CSV UTF-8"),
        (b'"item","question\n', r"line 1 is not valid CSV"),
        (b"PK\x03\x04", r"line 1 is not the heading"),
    ],
)
def test_other_files_are_refused(folder: Path, content: bytes, message: str):
    path = folder / "other.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_sheet(path, read_key(folder))
    with pytest.raises(UserError, match=r"nowhere\.csv is not a file"):
        read_sheet(folder / "nowhere.csv", read_key(folder))


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda key: key.pop("seed"), "seed"),
        (lambda key: key.update(version=2), "version"),
        (lambda key: key["items"][1].update(sample="0"), r"items\.1\.sample"),
        (lambda key: key.update(more=1), "more"),
    ],
)
def test_a_broken_key_is_refused(folder: Path, edit: Callable[[dict[str, Any]], None], place: str):
    key = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))
    edit(key)
    (folder / "sheet.json").write_text(json.dumps(key), encoding="utf-8")
    with pytest.raises(UserError, match=rf"sheet\.json is not the key of a sheet \({place}: "):
        read_key(folder)
    (folder / "sheet.json").unlink()
    with pytest.raises(UserError, match=r"does not exist: export a sheet first"):
        read_key(folder)
