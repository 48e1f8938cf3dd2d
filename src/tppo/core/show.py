"""How results are shown: numbers as text, and one kind of table for the console, for Markdown and for a page.

A number that was not measured is written "not measured", never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import rich.table
from markupsafe import Markup, escape
from rich.box import SIMPLE
from rich.markup import escape as plain

from tppo.core.common import console
from tppo.core.stats import IntervalEstimate

NOT_MEASURED = "not measured"
_COLOURS = {"good": "green", "bad": "red"}


def number(value: float | None, unit: str = "number") -> str:
    """ "62.1" for a rate (per cent) and "12.34" for a number."""
    if value is None:
        return NOT_MEASURED
    return f"{100 * value:.1f}" if unit == "rate" else f"{value:.2f}"


def signed_number(value: float | None, unit: str = "number") -> str:
    """As `number` with a sign; a zero has none."""
    if value is None:
        return NOT_MEASURED
    text = f"{100 * value:+.1f}" if unit == "rate" else f"{value:+.2f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def digits(value: float | None) -> str:
    """ "0.123"."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def p_text(p: float | None) -> str:
    """ "0.012", or "< 0.001"."""
    return "< 0.001" if p is not None and p < 0.001 else digits(p)


def interval(estimate: IntervalEstimate, unit: str = "number", signed: bool = False) -> str:
    """ "[55.0, 68.2]", or an empty string when there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    sign = signed_number if signed else number
    return f"[{sign(estimate.low, unit)}, {sign(estimate.high, unit)}]"


def with_interval(estimate: IntervalEstimate, unit: str = "number", signed: bool = False) -> str:
    """ "62.1 [55.0, 68.2]"."""
    sign = signed_number if signed else number
    return f"{sign(estimate.value, unit)} {interval(estimate, unit, signed)}".strip()


class Cell(NamedTuple):
    """What stands in a table: a text, smaller what belongs to it (an interval), and what is said of it, in a tone."""

    text: str = ""
    detail: str = ""
    said: str = ""
    tone: str = ""
    """good, bad, flat or none."""

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"{self.text} {self.detail}".strip(), self.said)))


@dataclass(frozen=True)
class Table:
    """A table of texts. The first cell of a row is its head; no text in it is trusted, but for `Markup`."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    id: str = ""
    """Anchor on a page."""
    docs: Sequence[str] = ()
    """What each column means, shown when its head is pointed at."""
    series: Sequence[str] = ()
    """Of each row the series (a model) whose colour it has on a page."""
    quiet: Sequence[str] = ()
    """Series whose rows are there for comparison only."""

    def markdown(self) -> str:
        """As GitHub draws it, under its title and note; a bar in a text is escaped."""
        lines = [f"## {self.title}", ""] if self.title else []
        lines += [self.note, ""] if self.note else []
        if not self.rows:
            return "\n".join([*lines, NOT_MEASURED, ""])
        lines += [_line(self.heads), "|---" * len(self.heads) + "|"]
        return "\n".join([*lines, *(_line(row) for row in self.rows), ""])

    def html(self) -> Markup:
        """The table alone, escaped, in the classes of report.html."""
        docs = [*self.docs, *[""] * (len(self.heads) - len(self.docs))]
        heads = Markup("").join(
            Markup('<th scope="col"{}{}>{}</th>').format(
                Markup(' class="n"') if place else "", Markup(' title="{}"').format(doc) if doc else "", head
            )
            for place, (head, doc) in enumerate(zip(self.heads, docs, strict=True))
        )
        rows = Markup("\n").join(self._html_row(place, row) for place, row in enumerate(self.rows))
        return Markup(
            '<div class="scroll"><table>\n<thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>'
        ).format(heads, rows)

    def _html_row(self, place: int, row: Sequence[Cell | str]) -> Markup:
        series = self.series[place] if self.series else ""
        dot = Markup('<i class="dot {}"></i>').format(series) if series else ""
        quiet = Markup(' class="reference"') if series and series in self.quiet else ""
        head = Markup('<th scope="row">{}{}</th>').format(dot, _html_cell(row[0]))
        cells = Markup("").join(Markup('<td class="n">{}</td>').format(_html_cell(cell)) for cell in row[1:])
        return Markup("<tr{}>{}{}</tr>").format(quiet, head, cells)

    def print(self) -> None:
        """On the console, without details; good and bad in colour."""
        table = rich.table.Table(title=self.title or None, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for place, head in enumerate(self.heads):
            table.add_column(plain(head), justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*(_rich_cell(cell) for cell in row))
        console.print(table)


def _line(cells: Sequence[Cell | str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _html_cell(cell: Cell | str) -> Markup:
    if isinstance(cell, str):
        return escape(cell)
    text = Markup('<span class="unmeasured">{}</span>').format(cell.text) if cell.text == NOT_MEASURED else cell.text
    detail = Markup("<small>{}</small>").format(cell.detail) if cell.detail else ""
    said = Markup('<small class="said {}">{}</small>').format(cell.tone, cell.said) if cell.said else ""
    return escape(text) + detail + said


def _rich_cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return plain(cell)
    text, colour = plain(f"{cell.text} {cell.said}".strip()), _COLOURS.get(cell.tone)
    return f"[{colour}]{text}[/]" if colour else text
