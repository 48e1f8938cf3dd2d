"""What README and docs point at is there: files, and names of the package."""

import importlib
import re
from pathlib import Path

import pytest

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
