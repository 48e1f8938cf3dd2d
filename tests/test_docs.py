"""What README and docs point at is there: files, and names of the package."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.published import BLOCK, made_anew, make_table, needed
from tppo.evaluate.compare import Metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


NAMING = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what there was, too


@pytest.mark.parametrize("page", [*NAMING, *sorted(ROOT.glob("src/**/*.py"))], ids=lambda page: page.stem)
def test_names_of_the_package_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = []
    for name in sorted(set(re.findall(r"`tppo((?:\.[A-Za-z_]\w*)+)`", text))):
        place, parts = importlib.import_module("tppo"), name[1:].split(".")
        for number, part in enumerate(parts):
            try:
                place = importlib.import_module("tppo." + ".".join(parts[: number + 1]))
            except ModuleNotFoundError:
                if not hasattr(place, part):
                    missing.append("tppo" + name)
                    break
                place = getattr(place, part)
    assert missing == []


PUBLISHED = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.stem)
def test_published_tables_are_those_of_their_numbers(page: Path):
    """Made by `python benchmarks/published.py PAGE`, which is also the way out when this fails."""
    text = page.read_text(encoding="utf-8")
    assert made_anew(text) == text
    assert len(BLOCK.findall(text)) == text.count("<!-- table:"), "a comment without a table below it"


def test_the_demo_is_published_so():
    assert ROOT / "docs/results/demo.md" in PUBLISHED


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, head and rule left out."""
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]] for table in found]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/results/*.md")), ids=lambda page: page.stem)
def test_no_table_of_wins_has_a_pair_twice(page: Path):
    """Rows by votes stood among those by scores, unmarked: one pair, one rubric, two results."""
    for rows in tables(page.read_text(encoding="utf-8")):
        pairs = Counter(tuple(row[:2]) for row in rows if re.search(r" vs | against ", row[0]))
        assert [pair for pair, count in pairs.items() if count > 1] == []


def test_only_what_a_page_shows_is_taken():
    row = {"scope": "eval1", "reader": "", "value": 0.5, "low": 0.4, "high": 0.6, "examples": 9, "users": 9}
    rows = [{**row, "model": model, "metric": name} for model in ("sft", "tppo") for name in ("hit", "token_f1")]
    differences = [
        {**row, "model": "tppo", "than": "sft", "metric": name, "p_corrected": 0.02} for name in ("hit", "overlap")
    ]
    metrics = {"headline": "hit", "rows": rows, "differences": differences, "recipe": "not taken", "wins": [{}]}
    asked = [
        {"scope": "eval1", "of": ["sft"], "measures": ["hit"]},
        {"scope": "eval1", "of": [["tppo", "sft"]], "measures": ["hit"]},
    ]
    taken = needed(metrics, asked)
    assert (taken["rows"], taken["differences"]) == (rows[:1], differences[:1])
    assert "recipe" not in taken
    cells, pairs = (make_table(Metrics(taken), one).rows for one in asked)
    assert cells == [["SFT", "50.0 [40.0, 60.0]"]]
    assert pairs == [["TPPO minus SFT", "+50.0 [+40.0, +60.0], p = 0.020"]]
