"""The report on a made-up run: everything in it, nothing from outside, log text escaped."""

import json
import re
import shutil
import subprocess
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers import fake_run
from tppo.core import show
from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.stats import Estimate
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.evaluate.compare import Metrics, build_metrics
from tppo.evaluate.metrics import BY_NAME
from tppo.evaluate.readings import with_asked
from tppo.report import page, words

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    evil = Example("evil", "evil-user", "eval1", [Event("search", EVIL)], [EVIL, "b", "c"], datetime(2026, 1, 1))
    recipe, run = fake_run.make_run(tmp_path_factory.mktemp("report") / "run", users=8, extra=[evil])
    report_samples, page.SAMPLES = page.SAMPLES, 100
    try:
        assert run_stage(recipe, "report", page.run)
    finally:
        page.SAMPLES = report_samples
    return recipe, run


@pytest.fixture(scope="module")
def html(finished: tuple[Recipe, RunFolder]) -> str:
    return (finished[1].path("report") / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Ids, links, tags and external references of a page; fails on unbalanced tags."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.links.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.outside.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_without_scripts(html: str):
    page = Outline()
    page.feed(html)
    assert page.open == []
    assert page.outside == []
    assert not page.tags & {"script", "iframe", "object", "form"}
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "default-src 'none'" in html
    assert len(html) < 2_000_000


def test_log_text_is_escaped(html: str):
    assert "<script>" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;document.title" in html
    assert "{{ 7*7 }}" in html


def test_every_section_shows_its_numbers(finished: tuple[Recipe, RunFolder], html: str):
    metrics = page.load_metrics(finished[1].path("report"))
    for scope in metrics.scopes:
        for model in metrics.policies:
            for name in ("relevant_targets", "hit"):
                cell = metrics.cell(scope, model, name)
                assert f">{show.number(cell.value, 'rate')}<small>{show.interval(cell, 'rate')}" in html
    assert html.count("<svg") == 2 + 4 + 11 + 4 + 1 + 1
    assert "not found" not in html.lower().replace("were found", "")
    for text in (
        "0.442",
        "0.61",
        "rejects.bad time",
        "PPO (token sum)",
        "algorithms:",
        "unparseable: truncated",
    ):
        assert text in html
    assert "unparseable: nan" not in html
    assert "builtin" not in html
    assert "built-in" not in html


def test_the_reward_check_is_shown_with_its_verdict(html: str):
    section = html[html.index('id="reward-check"') : html.index('id="sft"')]
    assert "The token-level reward model passed." in section
    assert "failed: sentence AUC: 0.660, and check_reward.min_sentence_auc asks for at least 0.7." in section
    assert 'class="card bad"' in section
    assert "word for word: scores above the user&#39;s real next queries in 73% of the examples" in section
    row = re.search(r"real above another user&#39;s queries</th>(.*?)</tr>", section, re.DOTALL)
    assert row is not None
    assert "≥ 0.6" in row[1]
    assert row[1].count("0.810<small>[0.76, 0.86]</small>") == 2
    assert section.count("<svg") == 1
    assert "900 words (220 relevant), 2 abstentions left out" in section.replace("\n", " ")


def test_a_damaged_check_is_named(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["ppo"], users=2)
    (run.path("check_reward") / "check.json").write_text("{half")
    with pytest.raises(UserError, match=r"check\.json cannot be read .*--redo check_reward"):
        run_stage(recipe, "report", page.run)


def test_summary_holds_numbers_and_no_text_of_the_log(finished: tuple[Recipe, RunFolder]):
    summary = (finished[1].path("report") / "summary.md").read_text(encoding="utf-8")
    words = {word for topic in fake_run.TOPICS.values() for word in topic} - {"list"}
    assert not words & set(re.findall(r"[a-z]+", summary))
    assert "script" not in summary
    assert str(finished[1].root) not in summary
    assert "TPPO minus SFT" in summary
    columns = [line.count("|") for line in summary.splitlines() if line.startswith("|")]
    assert all(count >= 4 for count in columns)
    assert "| rl_tppo | " in summary
    assert "| TPPO, last | " in summary
    assert "| token | None | not measured | not measured |" in summary


def test_any_subset_of_algorithms_and_missing_curves(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["ppo"], users=4)
    (run.path("rl_ppo") / "metrics.jsonl").unlink()
    (run.path("rl_ppo") / "samples.jsonl").unlink()
    (run.path("reward") / "metrics.jsonl").unlink()
    (run.path("sft") / "metrics.jsonl").unlink()
    run_stage(recipe, "report", page.run)
    html = (run.path("report") / "report.html").read_text(encoding="utf-8")
    assert "PPO minus SFT" in html
    assert "TPPO" not in html.replace("TPPO_JUDGE_API_KEY", "")
    for text in ("No training curve of PPO", "No curves of the reward models", "No curve of the SFT stage"):
        assert text in html
    assert "Only 8 users were evaluated" in html


def test_dpo_shows_the_curves_it_has(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["tppo", "dpo"], users=4)
    run_stage(recipe, "report", page.run)
    html = (run.path("report") / "report.html").read_text(encoding="utf-8")
    for text in ("DPO minus SFT", "TPPO minus DPO", "Reward margin", "Share of pairs in the right order"):
        assert text in html
    # Two interval charts, reward and its spread, the shared ones of TPPO, the reward models' and their check's, SFT's,
    # and DPO's five.
    assert html.count("<svg") == 2 + 2 + 11 + 4 + 1 + 1 + 5
    assert "No training curve" not in html
    summary = (run.path("report") / "summary.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in summary.splitlines() if line.startswith(("| training", "| held out"))]
    assert [row[0] for row in rows] == ["| training, first", "| training, last", "| held out"]
    assert [row[2] for row in rows] == ["0.060", "1.110", "1.053"]
    assert "| DPO, last" not in summary, "DPO has no rollouts to average"


def test_dpo_alone_without_its_curves(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["dpo"], users=4)
    (run.path("rl_dpo") / "metrics.jsonl").unlink()
    run_stage(recipe, "report", page.run)
    html = (run.path("report") / "report.html").read_text(encoding="utf-8")
    assert "No training curve of DPO" in html
    assert "Reward margin" not in html
    assert "## RL" not in (run.path("report") / "summary.md").read_text(encoding="utf-8")


def test_a_broken_metrics_file_is_named(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["ppo"], users=2)
    path = run.path("rl_ppo") / "metrics.jsonl"
    path.write_text('{"update": 1}\n{broken\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        run_stage(recipe, "report", page.run)


def test_what_an_older_version_read_gets_the_measures_of_today(
    finished: tuple[Recipe, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """From its verdicts and word labels: the very values that would have been written then."""
    recipe, run = finished
    answers, readings = page.load_run(recipe, run)
    key = ["example_id", "model", "seed", "reader", "measure"]
    older = readings[~readings["measure"].str.startswith("asked")].sample(frac=1, random_state=0)
    count = recipe.task.num_queries
    again = with_asked(answers, older, run.require("prepare"), count)
    now, then = (frame.set_index(key)["value"].sort_index() for frame in (readings, again))
    pd.testing.assert_series_equal(now, then)
    assert with_asked(answers, readings, run.require("prepare"), count) is readings
    # A report that an older version wrote is shown as it is, by its own name.
    old = build_metrics(answers, older, judge=fake_run.JUDGE["judge"], rubric="targets")
    assert old["headline"] == "relevant_targets"
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text(json.dumps({**old, **fake_run.JUDGE}))
    (tmp_path / "report" / "manifest.json").write_text("{}")
    page.print_summary(RunFolder(Recipe(run_dir=str(tmp_path))))
    printed = " ".join(capsys.readouterr().err.split())
    assert "as the paper counts (writing less is free)" in printed
    assert "`--redo report` works them out" in printed


def test_print_summary_says_the_verdict(finished: tuple[Recipe, RunFolder], capsys: pytest.CaptureFixture[str]):
    page.print_summary(finished[1])
    printed = capsys.readouterr().err
    assert "TPPO" in printed
    assert "SFT" in printed
    assert "relevant %" in printed


def test_the_truth_of_a_synthetic_log_is_in_summary_and_claims(finished: tuple[Recipe, RunFolder]):
    """Made-up rows with a known truth; without one nothing of it is shown."""
    recipe, run = finished
    answers, readings = (frame.to_dict("records") for frame in page.load_run(recipe, run))
    assert not page.load_metrics(run.path("report")).knows_truth
    for row in answers:
        own = {name: row[name] for name in ("example_id", "user_id", "split", "model", "seed")}
        known = {"known_words": {"tppo": 0.75, "sft": 0.5}.get(row["model"], 0.25), "known_queries": 0.5}
        readings += [{**own, "than": None, "reader": "log", "measure": m, "value": v} for m, v in known.items()]
    frames = pd.DataFrame(answers), pd.DataFrame(readings)
    data = build_metrics(*frames, judge=fake_run.JUDGE["judge"], rubric="targets")
    metrics = Metrics({**fake_run.JUDGE, **data})
    assert metrics.knows_truth
    said = " ".join(words.lead(metrics, metrics.scopes[0]))
    assert re.search(
        r"TPPO minus SFT: truly relevant words \+25\.0 points \[\+2\d\.\d, \+2\d\.\d\] \(an improvement\)", said
    )
    summary = words.summary_markdown(metrics, [])
    assert "## True relevance, known of the synthetic log" in summary
    assert "True relevance" not in words.summary_markdown(page.load_metrics(run.path("report")), [])


def test_the_curve_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunFolder(Recipe(run_dir=str(tmp_path)))
    for model, slope in (("tppo", 0.01), ("ppo", 0.0)):
        (tmp_path / f"rl_{model}").mkdir()
        rows = [{"update": u, "token_relevance": 0.5 + slope * u, "known_words": 0.4 + slope * u} for u in range(1, 31)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"rl_{model}" / "metrics.jsonl").write_text(text)
    curve = page.terminal_curve(run, ["ppo", "tppo"])
    assert curve is not None
    assert "Truly relevant words, %" in curve
    assert "\x1b" not in curve, "no colours where there is no terminal"
    assert curve.count("T") > 20 < curve.count("P")
    assert max(map(len, curve.splitlines())) <= 80
    assert page.terminal_curve(run, []) is None
    (tmp_path / "rl_ppo" / "metrics.jsonl").write_text('{"update": 1, "token_relevance": 0.5}\n')
    assert page.terminal_curve(run, ["ppo", "tppo"]) is None, "too few updates for a curve"


def make_metrics(**cells: tuple[float, float, float]) -> Metrics:
    """Metrics of one scope where tppo minus sft has the given (value, low, high) per metric."""
    differences = [
        {"scope": "eval1", "model": "tppo", "than": "sft", "metric": name, "examples": 90, "users": 90}
        | dict(zip(("value", "low", "high"), numbers, strict=True))
        for name, numbers in cells.items()
    ]
    wins = [{"scope": "eval1", "model": "tppo", "than": "sft", "rubric": "targets", "by": "scores", "win": None}]
    row = {"scope": "eval1", "model": "sft", "metric": "asked_words_targets", "examples": 90, "users": 90}
    rows = [{**row, "value": 0.4, "low": 0.3, "high": 0.5}]
    return Metrics(
        {
            **fake_run.JUDGE,
            "headline": "asked_words_targets",
            "check": "asked_words_history",
            "scopes": ["eval1"],
            "models": ["sft", "tppo"],
            "rows": rows,
            "differences": differences,
            "wins": wins,
            "abstained": [],
        }
    )


@pytest.mark.parametrize(
    ("difference", "sentence", "shift"),
    [
        ((0.1, 0.05, 0.15), "TPPO is better than SFT.", "+10.0 points [+5.0, +15.0]"),
        ((-0.1, -0.15, -0.05), "TPPO is worse than SFT.", "−10.0 points [−15.0, −5.0]"),
        ((0.02, -0.05, 0.09), "TPPO shows no difference from SFT.", "+2.0 points [−5.0, +9.0]"),
    ],
)
def test_the_verdict_follows_the_interval(difference: tuple[float, float, float], sentence: str, shift: str):
    metrics = make_metrics(asked_words_targets=difference)
    sentences = words.lead(metrics, "eval1")
    assert sentences[0] == sentence
    assert "TPPO not measured" in sentences[-1]
    assert words.verdicts(metrics, "eval1")[0]["shift"] == shift


def test_cautions_name_what_relevance_hides():
    better, no, up = (0.1, 0.05, 0.15), (0.0, -0.1, 0.1), (0.2, 0.1, 0.3)
    down = (-0.5, -0.6, -0.4)
    metrics = make_metrics(
        asked_words_targets=better,
        hit=no,
        token_f1=no,
        copied_queries=up,
        queries_written=down,
        asked_words_history=down,
    )
    notes = " ".join(words.cautions(metrics, "eval1", {"tppo": 14.2}))
    for text in (
        "gain over SFT is the judge's",
        "repeats searches",
        "fewer queries",
        "14.2 nats",
        "loses in the check: words relevant",
    ):
        assert text in notes
    quiet = words.cautions(make_metrics(asked_words_targets=better, hit=better), "eval1", {"tppo": 2.0})
    assert len(quiet) == 2  # only what always holds: one training run, and the labeller judges


def test_numbers_in_words():
    assert show.number(None, "rate") == "not measured"
    assert show.number(0.0, "rate") == "0.0"
    assert show.signed_number(-0.0001, "rate") == "0.0"
    assert show.interval(Estimate(0.5, None, None, 1, 1), "rate") == ""
    assert "interval not measured" in words.shift(Estimate(0.5, None, None, 1, 1), BY_NAME["hit"])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine to open the page with")
def test_a_browser_shows_the_report(finished: tuple[Recipe, RunFolder], tmp_path: Path):
    page = finished[1].path("report") / "report.html"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path} --virtual-time-budget=2000"
    command = ["chromium", *flags.split(), "--dump-dom", page.resolve().as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>tppo report: run</title>" in dom
    assert dom.count("<svg") == 23
