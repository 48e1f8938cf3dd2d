"""Progress where there is no terminal: a line every few seconds, with the time left."""

from __future__ import annotations

import re
import time

from tppo.core import common


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_long_work_says_how_far_it_is_and_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(common, "LINE_SECONDS", 0.05)
    for _ in common.track(range(20), "counting [sheep]"):
        time.sleep(0.02)
    first, *lines = said(capsys)
    assert first == "counting [sheep] (20)"
    assert 3 <= len(lines) <= 10
    assert all(re.fullmatch(r"counting \[sheep\]: \d+ of 20, \d+ s left", line) for line in lines)
    counts = [int(line.split()[2]) for line in lines]
    assert counts == sorted(counts)


def test_short_work_says_one_line(capsys):
    assert list(common.track(range(3), "short")) == [0, 1, 2]
    assert said(capsys) == ["short (3)"]


def test_work_of_unknown_length(monkeypatch, capsys):
    monkeypatch.setattr(common, "LINE_SECONDS", 0.0)
    list(common.track(iter("ab"), "reading"))
    assert said(capsys) == ["reading (?)", "reading: 1 of ?", "reading: 2 of ?"]


def test_a_bar_that_is_updated_says_lines_too(monkeypatch, capsys):
    monkeypatch.setattr(common, "LINE_SECONDS", 0.0)
    with common.progress_bar() as bar:
        task = bar.add_task("steps", total=4)
        bar.update(task, completed=3, description="steps loss 1.20")
    with common.progress_bar(lines=False) as bar:
        bar.update(bar.add_task("quiet", total=1), completed=1)
    assert [line.split(",")[0] for line in said(capsys)] == ["steps loss 1.20: 3 of 4"]
