"""The blind sheet: labelled responses without their labels, for people to label again.

Two files in `<run_dir>/agreement/`:

- sheet.csv, what a person fills in: one row per word of a response and one for the whole response, in columns that
  docs/judging.md explains; of these only `label` is to be changed (1 relevant, 0 not relevant, empty not answered).
  UTF-8 with a byte-order mark (or Excel takes it for Latin-1), commas, one line per row.
- sheet.json, the key: hash of the labels file, seed, rubric, and which response is which item.

Neither holds a label, a score, a judge's name or the model that wrote the response.

Every text stands in [brackets], which are no part of it. A cell that begins with = + - @ or a tab would be run
as a formula by a spreadsheet (OWASP, CSV Injection), and 1/2 or 007 would become a date or a 7. OWASP's leading
apostrophe is eaten by some spreadsheets and kept by others; brackets are kept by all, so what comes back is what
went out. A sheet that comes back with any other change is refused, never repaired.

The page asks one response at a time, by click or key, and writes into the same file, whole, after every answer:
closing the page or killing the server loses nothing, and the next start goes on with the first response not finished.
Loopback only: a sheet holds people's searches.

A person (a filled sheet) and a judge (labels.parquet) become the same thing, a rater: for every response the answers
to its words and to the whole of it.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tppo.core.common import UserError, console, rng
from tppo.core.config import Agreement, Rubric
from tppo.core.files import sha256_file, write_json, write_text
from tppo.core.tables import LABELS, Example, read_table
from tppo.core.text import Word, render_history
from tppo.core.web import LOOPBACK_NAMES, address_of, listen, render_page, run_server, secure
from tppo.judge.verdict import IRRELEVANT, RELEVANT, split_response

SHEET, KEY = "sheet.csv", "sheet.json"
COLUMNS = ("item", "question", "i", "text", "label", "response", "against")
_LABEL = COLUMNS.index("label")
_BOM = "\ufeff"
_RESTORE = (
    "only the column 'label' may be changed. Put the exported row back, or check that this sheet and the key come "
    "from the same export"
)
_LABELS = {"0": 0, "1": 1, "": None}
_LABEL_OF_CLASS = {IRRELEVANT: 0, RELEVANT: 1}
Label = Annotated[int, Field(strict=True, ge=0, le=1)]
Answer = int | str
"""1 relevant, 0 not, or why there is no answer, which is never read as 0: `abstained` (a judge), `not_judged` (a judge
of whole responses only: sentence template), `unanswered` (a person left the question empty)."""
ResponseKey = tuple[str, int]
"""example_id and sample: which response."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SheetItem(_Record):
    """A response of the sheet. `against`: the texts it is to be compared with, one per query or event."""

    example_id: str
    sample: int
    response: str
    against: list[str]

    @property
    def key(self) -> ResponseKey:
        return self.example_id, self.sample

    @property
    def words(self) -> list[Word]:
        return split_response(self.response).words


class SheetKey(_Record):
    """sheet.json. `items` is in the order of the sheet."""

    version: Literal[1]
    rubric: Rubric
    seed: int
    labels: str
    labels_sha256: str
    items: list[SheetItem]


class ItemAnswers(_Record):
    """A person's answers about one response; None: not answered."""

    words: list[Label | None]
    sentence: Label | None


def make_key(labels: Path, rubric: Rubric, count: int, seed: int, examples: Sequence[Example]) -> SheetKey:
    """Draw `count` labelled responses with the seed and put them in random order.

    Raises:
        UserError: fewer than `count` responses have a label; an example is missing.
    """
    judge = read_judge(labels, rubric)
    # Sorted, so that the draw depends on the responses and not on their order in the file.
    keys = sorted(key for key, judged in judge.judged.items() if judged.sentence in (0, 1))
    if not 0 < count <= len(keys):
        raise UserError(
            f"agreement.examples is {count}, but {labels} has {len(keys)} labelled responses of rubric '{rubric}': "
            f"give a number from 1 to {len(keys)}"
        )
    wanted = {example_id for example_id, _ in keys}
    by_id = {example.example_id: example for example in examples if example.example_id in wanted}
    items = []
    for place in rng(seed, "agreement", rubric).permutation(len(keys))[:count]:
        example_id, sample = keys[place]
        if example_id not in by_id:
            raise UserError(
                f"{labels} has labels of example {example_id}, which the run's prepare/examples.parquet lacks: give "
                "the --run_dir whose examples these labels belong to"
            )
        example, response = by_id[example_id], judge.judged[keys[place]].response
        against = example.targets if rubric == "targets" else [render_history([event]) for event in example.history]
        items.append(SheetItem(example_id=example_id, sample=sample, response=response, against=against))
    return SheetKey(version=1, rubric=rubric, seed=seed, labels=str(labels), labels_sha256=judge.sha256, items=items)


def export_sheet(folder: Path, key: SheetKey) -> Path:
    """Write the blank sheet and its key; returns the sheet's path.

    Raises:
        UserError: there is a sheet or a key already: it may hold answers.
    """
    for name in (SHEET, KEY):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} exists and may hold or explain people's answers: move or delete {folder} to export "
                "another sheet"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / KEY, key.model_dump())
    write_sheet(folder / SHEET, key, blank_answers(key))
    return folder / SHEET


def read_key(folder: Path) -> SheetKey:
    """The key of the run's sheet.

    Raises:
        UserError: no sheet was exported, or the key was edited.
    """
    path = folder / KEY
    if not path.exists():
        raise UserError(f"{path} does not exist: export a sheet first (`tppo agreement --agreement.action export`)")
    try:
        return SheetKey.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"{path} is not the key of a sheet ({place}: {first['msg']}): restore it, or move {folder} away and export "
            "a new sheet"
        ) from None


def blank_answers(key: SheetKey) -> list[ItemAnswers]:
    """Nothing answered yet."""
    return [ItemAnswers(words=[None] * len(item.words), sentence=None) for item in key.items]


def _rows(key: SheetKey, answers: Sequence[ItemAnswers]) -> list[tuple[str, ...]]:
    """The sheet's rows with `answers` (one per item) filled in: the words of a response, then the whole."""
    rows: list[tuple[str, ...]] = []
    for number, (item, given) in enumerate(zip(key.items, answers, strict=True), start=1):
        response = f"[{' | '.join(split_response(item.response).lines)}]"
        against = f"[{' | '.join(' '.join(text.split()) for text in item.against)}]"
        words = zip(item.words, given.words, strict=True)
        asked = [("word", str(i), f"[{word.text}]", label) for i, (word, label) in enumerate(words)]
        for question, i, text, label in [*asked, ("response", "", response, given.sentence)]:
            rows.append((str(number), question, i, text, "" if label is None else str(label), response, against))
    return rows


def write_sheet(path: Path, key: SheetKey, answers: Sequence[ItemAnswers]) -> None:
    """Write the sheet with `answers` (one per item) filled in; the file appears whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *_rows(key, answers)])
    write_text(path, _BOM + text.getvalue())


def read_sheet(path: Path, key: SheetKey) -> list[ItemAnswers]:
    """A filled sheet's answers, one per item of the key. Rows may come in any order.

    Raises:
        UserError: missing, doubled, foreign or changed rows, or a label that is not 1, 0 or empty; names file,
            line and what to do. Nothing is repaired. No text of the sheet is quoted: it is somebody's searches.
    """
    expected = {row[:3]: row for row in _rows(key, blank_answers(key))}
    lines: dict[tuple[str, ...], int] = {}
    labels: dict[tuple[str, ...], int | None] = {}
    for line, cells in _csv_rows(path):
        where, question = f"{path} line {line}", cells[:3]
        if question not in expected:
            raise UserError(f"{where} (columns item, question, i) is no row of {KEY}: {_RESTORE}")
        if question in lines:
            raise UserError(f"{where} repeats line {lines[question]}: delete one of the two")
        for column, found, exported in zip(COLUMNS, cells, expected[question], strict=True):
            if column != "label" and found != exported:
                raise UserError(f"{where}: column '{column}' is not as exported: {_RESTORE}")
        if cells[_LABEL] not in _LABELS:
            raise UserError(f"{where}: label {cells[_LABEL]!r} is not 1, 0 or empty: correct it")
        lines[question], labels[question] = line, _LABELS[cells[_LABEL]]
    if missing := [question for question in expected if question not in lines]:
        item, kind, i = missing[0]
        raise UserError(
            f"{path} lacks {len(missing)} rows (first: item {item}, question {kind}{i and ', i ' + i}): {_RESTORE}"
        )
    return [
        ItemAnswers(
            words=[labels[str(number), "word", str(i)] for i in range(len(item.words))],
            sentence=labels[str(number), "response", ""],
        )
        for number, item in enumerate(key.items, start=1)
    ]


def _csv_rows(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Line numbers and cells of a sheet file, the heading checked and left out."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the answered sheets in --agreement.answers")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        # A line with nothing on it, not even commas, is no row to the csv module; the last line often is one.
        rows = [(reader.line_num, tuple(cells)) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV ({error}): {_RESTORE}") from None
    if not rows or rows[0][1] != COLUMNS:
        raise UserError(
            f"{path} line 1 is not the heading {','.join(COLUMNS)}: it is not an exported sheet, or was saved with "
            "another separator than the comma"
        )
    for line, cells in rows[1:]:
        if len(cells) != len(COLUMNS):
            raise UserError(f"{path} line {line} has {len(cells)} columns, not {len(COLUMNS)}: {_RESTORE}")
    return rows[1:]


@dataclass(frozen=True)
class Judged:
    """Answers about one response. `words` has one entry per word of `response`, in order."""

    response: str
    words: tuple[Answer, ...]
    sentence: Answer


@dataclass(frozen=True)
class Rater:
    """`source` is the file the answers come from, `judged` what it holds of one rubric."""

    name: str
    kind: Literal["judge", "person"]
    source: Path
    sha256: str
    judged: Mapping[ResponseKey, Judged]


def read_person(path: Path, key: SheetKey) -> Rater:
    """A filled sheet as a rater, named after its file."""
    judged = {}
    for item, given in zip(key.items, read_sheet(path, key), strict=True):
        *words, sentence = ("unanswered" if label is None else label for label in [*given.words, given.sentence])
        judged[item.key] = Judged(item.response, tuple(words), sentence)
    return Rater(path.stem, "person", path, sha256_file(path), judged)


def read_judge(path: Path, rubric: Rubric) -> Rater:
    """The labels of one rubric in a labels.parquet.

    Raises:
        UserError: no labels of this rubric; two labels of the same response; a row that contradicts itself.
    """
    rows = read_table(path, LABELS).to_pylist()
    names = {row["judge"] for row in rows if row["rubric"] == rubric}
    if not names:
        found = sorted({row["rubric"] for row in rows})
        raise UserError(f"{path} has no labels of rubric '{rubric}' (it has: {found}): set agreement.rubric")
    judged: dict[ResponseKey, Judged] = {}
    for number, row in enumerate(rows):
        if row["rubric"] != rubric:
            continue
        key = row["example_id"], row["sample"]
        where = f"{path} row {number} (example {key[0]}, sample {key[1]}, rubric {rubric})"
        if key in judged:
            raise UserError(f"{where} is a second label of this response: keep the labels of one judge in a file")
        judged[key] = _judged(row, where)
    return Rater(", ".join(sorted(names)), "judge", path, sha256_file(path), judged)


def _judged(row: dict[str, Any], where: str) -> Judged:
    words, given = [word.text for word in split_response(row["response"]).words], row["words"] or []
    if row["status"] == "abstained":
        return Judged(row["response"], ("abstained",) * len(words), "abstained")
    broken = None
    if row["status"] != "ok":
        broken = f"its status is {row['status']!r}, not ok or abstained"
    elif row["sentence_label"] not in (0, 1):
        broken = f"its sentence_label is {row['sentence_label']!r}, not 0 or 1"
    elif given and [(word["i"], word["word"]) for word in given] != list(enumerate(words)):
        broken = "its words are not those of its response"
    elif any(word["label"] not in _LABEL_OF_CLASS for word in given):
        broken = f"a word's label is neither {IRRELEVANT} nor {RELEVANT}"
    if broken:
        raise UserError(f"{where} is broken: {broken}. Make the labels anew with `tppo label`")
    # A judge with the sentence template writes no word labels, though the response has words.
    answers: list[Answer] = [_LABEL_OF_CLASS[word["label"]] for word in given]
    return Judged(row["response"], tuple(answers or ["not_judged"] * len(words)), row["sentence_label"])


def create_app(key: SheetKey, path: Path) -> FastAPI:
    """The application that fills in the sheet at `path`.

    The file is read again for every request, so a label typed into it meanwhile is kept. GET /v1/sheet returns
    the items with their answers, PUT /v1/items/{number} (from 0) replaces one item's answers. A sheet that no
    longer fits its key is answered with 409 and the reason.
    """
    app = FastAPI(title="tppo agreement", docs_url=None, redoc_url=None)  # the docs pages load scripts from elsewhere
    lock = threading.Lock()  # FastAPI runs the handlers in threads; an answer is read, changed and written as one
    facts = {"rubric": key.rubric, "file": path.name, "items": len(key.items)}
    page = render_page(Path(__file__).parent / "sheet.html", facts)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> str:
        return page

    @app.get("/v1/sheet")
    def sheet() -> dict[str, Any]:
        with lock:
            answers = read_sheet(path, key)
        items = []
        for item, given in zip(key.items, answers, strict=True):
            queries = split_response(item.response).query_words
            items.append({"against": item.against, "queries": queries, "answers": given.model_dump()})
        return {"items": items}

    @app.put("/v1/items/{number}")
    def save(number: int, given: ItemAnswers) -> dict[str, bool]:
        if not 0 <= number < len(key.items):
            raise HTTPException(404, f"there is no item {number}; the sheet has {len(key.items)}")
        if len(given.words) != len(key.items[number].words):
            raise HTTPException(422, f"item {number} has {len(key.items[number].words)} words, not {len(given.words)}")
        with lock:
            answers = read_sheet(path, key)
            answers[number] = given
            write_sheet(path, key, answers)
        return {"saved": True}

    @app.exception_handler(UserError)
    def spoilt(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=409)

    secure(app, LOOPBACK_NAMES)
    return app


def serve_sheet(folder: Path, settings: Agreement) -> None:
    """Serve the page for one person until interrupted.

    Answers go into the sheet named in `agreement.answers` (made blank if it does not exist), or the exported one.

    Raises:
        UserError: no sheet was exported; several sheets are named; the sheet is spoilt; the port is taken.
    """
    if len(settings.answers) > 1:
        raise UserError(f"agreement.answers names {len(settings.answers)} sheets, but a page fills in one: give one")
    key = read_key(folder)
    path = Path(settings.answers[0]) if settings.answers else folder / SHEET
    if not path.exists():
        write_sheet(path, key, blank_answers(key))
    read_sheet(path, key)
    with listen("127.0.0.1", settings.port, "agreement") as listener:
        console.print(f"answer on {address_of(listener)}, saved in {path} (Ctrl+C stops)", soft_wrap=True)
        run_server(create_app(key, path), listener)
