"""The study's report on made-up cells: every table and figure, no text of the log, missing cells named."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import agreement_run, fake_run
from tppo.core.common import UserError
from tppo.core.config import Agreement, Prepare, Reading, Recipe, Setting, Study
from tppo.core.files import write_json
from tppo.core.tables import EXAMPLES as TABLE
from tppo.core.tables import write_table
from tppo.evaluate.answers import ANSWERS
from tppo.evaluate.metrics import PER_RESPONSE
from tppo.evaluate.readings import READINGS
from tppo.judge.agreement import run_action
from tppo.study.grid import Plan, make_plan
from tppo.study.report import setting_metrics, write_report
from tppo.study.results import collect
from tppo.study.run import run_study
from tppo.study.tables import agreement_table, point_cost_table

EXAMPLES = [*fake_run.make_examples(10), *fake_run.make_examples(10, split="eval2", seed=7)]


def make_study(
    root: Path,
    skip: str = "",
    baselines: tuple[str, ...] = (),
    second_judge: str | None = None,
    **changes: Any,
) -> tuple[Recipe, Plan]:
    """Every cell but `skip`, finished, by the run folders themselves; the second judge says what the first does."""
    recipe = replace(
        fake_run.make_recipe(root, ["tppo", "ppo", "dpo"]),
        study=Study(seeds=[0, 1, 2], settings=[Setting("kl", {"rl.kl_coef": 0.05}, ["tppo"])]),
    )
    recipe = replace(recipe, **changes)
    if second_judge:
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, readings=[Reading("embedding")]))
    plan = make_plan(recipe)
    made = [job for job in plan.readings if job.stages[0] in ("read_embedding", "read_distance")]
    for job in (*plan.shared, *plan.cells, *made):
        for stage in [] if job.name == skip else job.stages:
            with job.run.stage(stage) as (folder, _):
                if stage == "prepare":
                    write_table(folder / "examples.parquet", [fake_run.example_row(e) for e in EXAMPLES], TABLE)
                elif stage == "reward":
                    fake_run._write_jsonl(folder / "metrics.jsonl", fake_run._reward_rows())
                elif stage == "rl_dpo":
                    fake_run._write_jsonl(folder / "metrics.jsonl", fake_run._dpo_rows())
                elif stage.startswith("rl_"):
                    fake_run._write_jsonl(folder / "metrics.jsonl", fake_run._rl_rows(job.model, job.seed))
                    fake_run._write_jsonl(folder / "samples.jsonl", fake_run._token_rows(EXAMPLES, job.model))
                elif stage == "evaluate":
                    models = ["sft", *baselines, "targets", "other_user"] if job.model == "sft" else [job.model]
                    draw = 7 * job.seed + (1 if job.setting in ("base", "kl") else 1000)
                    parts = [fake_run.made_up_rows(EXAMPLES, m, draw, job.seed) for m in models]
                    for place, (name, schema) in enumerate((("answers", ANSWERS), ("readings", READINGS))):
                        rows = [row for part in parts for row in part[place]]
                        write_table(folder / f"{name}.parquet", rows, schema)
                    write_json(folder / "metrics.json", {**fake_run.JUDGE, "rows": [], "differences": []})
                elif stage == "read_distance":
                    write_table(folder / "readings.parquet", distance_rows(job.recipe), READINGS)
                elif stage == "read_embedding":
                    write_table(folder / "readings.parquet", read_again(job.recipe, second_judge), READINGS)
    return recipe, plan


def read_again(recipe: Recipe, judge: str | None) -> list[dict[str, Any]]:
    """What the first judge said, by the second one."""
    read = [
        (model, row)
        for model, folder in recipe.evaluate.answers.items()
        for row in pq.read_table(Path(folder) / "readings.parquet").to_pylist()
    ]
    first = fake_run.JUDGE["judge"]
    return [{**row, "reader": judge} for model, row in read if (row["model"], row["reader"]) == (model, first)]


def distance_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Made-up KL: 2 nats for each algorithm after the first, and a tenth for each seed, at every example."""
    return [
        {
            **{name: getattr(example, name) for name in ("example_id", "user_id", "split")},
            **{"model": model, "seed": recipe.seed, "reader": "distance", "measure": measure, "value": value},
        }
        for number, model in enumerate(recipe.algorithms)
        for example in EXAMPLES
        for measure, value in (("sampled_tokens", 9.0), ("kl_from_sft", 2.0 * (number + 1) + 0.1 * recipe.seed))
    ]


def results_of(folder: Path) -> list[dict[str, Any]]:
    """results.parquet with an answer's measures side by side; those of a judge have its name before them, but for the
    first one's."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in pq.read_table(folder / "results.parquet").to_pylist():
        key = tuple(row[name] for name in ("setting", "model", "seed", "example_id"))
        answer = found.setdefault(key, {name: row[name] for name in ("split", "user_id")})
        answer |= dict(zip(("setting", "model", "seed", "example_id"), key, strict=True))
        judge = "" if row["reader"] in ("text", "log", "distance", fake_run.JUDGE["judge"]) else row["reader"] + " "
        if row["than"] is None:
            answer[judge + row["measure"]] = row["value"]
    return list(found.values())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study") / "made-up"
    recipe, plan = make_study(root)
    assert write_report(recipe, plan, {}) == root / "study/report.html"
    return root / "study"


def test_results_hold_every_answer_and_no_text(study: Path):
    table = pq.read_table(study / "results.parquet")
    # Three seeds: SFT with two references, three algorithms, and TPPO once more with the other setting.
    rows = results_of(study)
    assert len(rows) == 3 * (3 + 3 + 1) * len(EXAMPLES)
    assert not {"response", "queries", "words", "problem"} & set(table.column_names)
    measured = set(table.column("measure").to_pylist())
    log_or_encoder = {
        "known_queries",
        "known_words",
        "asked_known_words",
        "similarity_written",
        "similarity_true",
        "kl_from_sft",
    }
    assert {metric.name for metric in PER_RESPONSE} - log_or_encoder <= measured
    assert all(field.metadata[b"doc"] for field in table.schema)
    row = next(r for r in rows if r["model"] == "tppo" and r["words_targets"])
    assert row["relevant_words_targets"] == round(row["words_targets"] * row["word_count"])
    curves = pq.read_table(study / "curves.parquet").to_pylist()
    assert {(r["setting"], r["model"]) for r in curves} == {
        ("base", "tppo"), ("base", "ppo"), ("base", "dpo"), ("kl", "tppo"),
    }  # fmt: skip
    assert max(r["update"] for r in curves if r["model"] == "dpo") == 40


def test_numbers_are_means_over_seeds_and_examples(study: Path):
    metrics = json.loads((study / "metrics.json").read_text())
    rows = [r for r in results_of(study) if r["setting"] == "base"]
    by_model = {
        model: [r["relevant_targets"] for r in rows if r["model"] == model and r["split"] == "eval1"]
        for model in ("tppo", "ppo")
    }
    wanted = {"scope": "eval1", "model": "tppo", "than": "ppo", "metric": "relevant_targets"}
    found = next(row for row in metrics["differences"] if wanted.items() <= row.items())
    assert found["value"] == pytest.approx(sum(by_model["tppo"]) / 60 - sum(by_model["ppo"]) / 60)
    assert (found["seeds"], found["users"], found["examples"]) == (3, 10, 60)
    assert found["p_value"] <= found["p_corrected"] <= 1
    assert metrics["distinct_examples"] == {"all": 40, "eval1": 20, "eval2": 20}


def test_a_point_costs_what_the_mean_cell_took(tmp_path: Path):
    recipe, plan = make_study(tmp_path / "run", study=Study(seeds=[0, 1, 2, 3, 4]))
    metrics = setting_metrics(recipe, plan, collect(plan), "base")
    assert metrics
    seconds = {"sample": 30.0, "label": 20.0, "reward": 10.0, "rl_dpo": 42.0}
    for job in (*plan.shared, *plan.cells):
        for stage in job.stages:
            path = job.run.path(stage) / "manifest.json"
            manifest = json.loads(path.read_text())
            took = 60.0 * (job.seed + 1) if stage == "rl_tppo" else seconds.get(stage, 1000.0)
            facts = {
                "label": {"labels": 7},
                "evaluate": {"examples": {"eval1": 4}, "seconds_answering": {job.model: 8.0}},
            }
            path.write_text(json.dumps({**manifest, "seconds": took, "facts": facts.get(stage, {})}))
    rows = {row[0]: row[1:] for row in point_cost_table(plan, metrics).rows}
    assert set(rows) == {"TPPO", "PPO", "DPO"}
    gain = metrics.difference("all", "tppo", "sft", "asked_words_targets")
    assert gain.low > 0
    minutes, labels, a_point, labels_a_point, an_answer = rows["TPPO"]
    assert (minutes, labels, an_answer) == ("4.00", "7", "2.00")  # 1 to 5 minutes, and one for what they read
    assert a_point.startswith(f"{240 / (100 * gain.value):.1f} [")
    assert labels_a_point.startswith(f"{7 / (100 * gain.value):.1f} [")
    assert rows["DPO"][:2] == [f"{72 / 60:.2f}", "0"]  # it reads the samples, and no label


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name == "href" and tag == "a":
                self.links.add((value or "").removeprefix("#"))


def test_page_and_summary(study: Path):
    html, summary = (study / "report.html").read_text(), (study / "summary.md").read_text()
    page = Page()
    page.feed(html)
    assert page.links <= page.ids
    assert not page.tags & {"script", "iframe", "img"}
    claim = re.search(r'<p class="claim">(.*?)</p>', html)
    assert claim
    assert re.match(
        r"TPPO minus PPO: [+−][\d.]+ points \[.*\], corrected p [=<] [\d.]+; 3 seeds, 40 examples\.", claim[1]
    )
    claims = re.findall(r"points \[([^,]+), ([^\]]+)\], corrected p [=<] ([\d.]+); 3 seeds", summary)
    assert len(claims) == 3
    for low, high, p in claims:
        ends = [float(end.replace("−", "-")) for end in (low, high)]
        assert (ends[0] <= 0 <= ends[1]) == (float(p) >= 0.05)
    for text in ("3 seeds", "15 of 15 cells finished", "corrected-eval1", "tuned 3 times", "kl_coef", "DPO loss",
                 "Held-out AUC on its own task"):  # fmt: skip
        assert text in html
    for text in ("## At equal KL", "## Steadiness", "## Search budget", "## Machine time", "PPO's best", "TPPO minus"):
        assert text in summary
    assert "| TPPO | 2 | base, kl |" in summary
    assert "Where the reward sits" not in html
    assert not words_of_the_log(html) | words_of_the_log(summary)


def words_of_the_log(text: str) -> set[str]:
    words = {word for topic in fake_run.TOPICS.values() for word in topic} - {"list", "recipe", "amp"}
    return words & set(re.findall(r"[a-z]+", re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)))


def test_answers_are_shown_when_the_log_is_synthetic_only(tmp_path: Path):
    recipe, plan = make_study(tmp_path / "run", skip="cells/base-sft-s0", prepare=Prepare(source=["synthetic"]))
    assert write_report(recipe, plan, {})
    folder = tmp_path / "run/study"
    html = (folder / "report.html").read_text()
    samples, tokens = (
        re.search(f'<section id="{name}">.*?</section>', html, re.DOTALL) for name in ("samples", "tokens")
    )
    assert samples
    assert tokens
    assert samples[0].count('<article class="sample"') == 12
    # The first seed lacks SFT, so all answers are of the second.
    assert samples[0].count("</i>SFT</h4>") == samples[0].count("</i>TPPO</h4>") == 12
    assert words_of_the_log(samples[0])
    assert words_of_the_log(tokens[0])
    assert "nobody's searches" in html
    assert "rows of the log" not in html
    page = Page()
    page.feed(html)
    assert page.links <= page.ids
    assert not words_of_the_log((folder / "summary.md").read_text() + (folder / "metrics.json").read_text())


def test_an_ablation_is_in_page_summary_and_metrics(tmp_path: Path):
    settings = [Setting(f"alpha{value}", {"rl.length_penalty_alpha": value}, ["tppo"]) for value in (0.5, 1.0)]
    study = Study(seeds=[0, 1], settings=settings)
    recipe, plan = make_study(tmp_path / "run", study=study)
    assert write_report(recipe, plan, {})
    folder = tmp_path / "run/study"
    html, summary = (folder / "report.html").read_text(), (folder / "summary.md").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    section = re.search(r'<div id="ablations">.*<section id="settings">', html, re.DOTALL)
    assert section
    assert section[0].count("<svg") == 4
    assert all(f'aria-label="{title}' in section[0] for title in ("Words relevant to", "Queries", "Tokens"))
    rows = metrics["ablations"]["rl.length_penalty_alpha"]
    assert {(row["value"], row["model"], row["seed"]) for row in rows} == {
        (value, "tppo", seed) for value in (0.5, 1.0, 2.0) for seed in (0, 1)
    }
    table = summary[summary.index("## Ablation of rl.length_penalty_alpha") :]
    assert re.findall(r"^\| ([\d.]+(?: \(the recipe\))?) \| TPPO \| 2 \|", table, re.MULTILINE) == [
        "0.5", "1", "2 (the recipe)",
    ]  # fmt: skip
    cell = next(
        r for r in metrics["rows"] if (r["scope"], r["model"], r["metric"]) == ("all", "tppo", "response_tokens")
    )
    at_base = [row["response_tokens"] for row in rows if row["setting"] == "base"]
    assert sum(at_base) / 2 == pytest.approx(cell["value"])


def test_label_agreement_is_shown_for_the_studys_own_labels_only(tmp_path: Path):
    recipe, plan = make_study(tmp_path / "run")
    shared = plan.shared[0].recipe
    labels = tmp_path / "run/shared/base/label/labels.parquet"
    run = plan.cell_of["base", "sft", 0].run
    assert agreement_table(run).rows == []
    rows = agreement_run.label_rows(shared)
    agreement_run.write_labels(labels, rows)
    other = agreement_run.write_labels(
        tmp_path / "other.parquet", agreement_run.label_rows(shared, lambda word, i: False, "never-v1")
    )
    settings = Agreement(action="compare", other=str(other))
    run_action(replace(shared, agreement=settings))
    asked = [word["label"] for row in rows if row["rubric"] == "targets" for word in row["words"]]
    words, sentences = agreement_table(run).rows
    assert words[:3] == ["rule-v1, never-v1", "words", f"{len(asked)} of {len(asked)}"]
    assert words[3].startswith(f"{100 * asked.count(1) / len(asked):.1f} [")
    assert sentences[1] == "sentences"
    assert write_report(recipe, plan, {})
    html = (tmp_path / "run/study/report.html").read_text()
    assert words[3] in html[html.index('<section id="agreement">') :].split("</section>")[0]
    agreement_run.write_labels(labels, rows[:-1])
    other_labels = agreement_table(run)
    assert (other_labels.rows, "about other labels" in other_labels.note) == ([], True)


def test_a_missing_cell_is_named_and_the_rest_is_reported(tmp_path: Path):
    recipe, plan = make_study(tmp_path / "run", skip="cells/base-ppo-s1")
    assert write_report(recipe, plan, {"cells/base-ppo-s1": "why"})
    html = (tmp_path / "run/study/report.html").read_text()
    assert "1 of 15 cells failed and are not in the numbers: cells/base-ppo-s1." in html
    metrics = json.loads((tmp_path / "run/study/metrics.json").read_text())
    pairs = {(r["model"], r["than"]): r["seeds"] for r in metrics["differences"] if r["metric"] == "hit"}
    assert (pairs["tppo", "ppo"], pairs["tppo", "sft"]) == (2, 3)


def test_baselines_and_the_second_judge_are_in_the_report(tmp_path: Path, study: Path):
    recipe, plan = make_study(tmp_path / "run", baselines=("frequent_next",), second_judge="other-v1")
    folder = tmp_path / "run/study"
    assert write_report(recipe, plan, {}) == folder / "report.html"
    html, summary = (folder / "report.html").read_text(), (folder / "summary.md").read_text()
    assert "The same by a second judge, other-v1" in html
    assert "second judge: other-v1" in summary
    assert "SFT minus Most frequent next" in html
    assert "SFT minus Most frequent next" in summary
    row = next(r for r in results_of(folder) if r["model"] == "sft")
    assert row["other-v1 relevant_history"] == row["relevant_history"]
    found, alone = (json.loads((path / "metrics.json").read_text())["differences"] for path in (folder, study))

    def corrected(rows: list, metric: str, reader: str = "") -> dict:
        wanted = (metric, reader)
        return {
            (r["scope"], r["model"], r["than"]): r["p_corrected"] for r in rows if (r["metric"], r["reader"]) == wanted
        }

    # Against baselines every policy is compared, too, but that makes no p-value between policies larger.
    with_baselines = corrected(found, "relevant_targets")
    assert with_baselines.keys() - corrected(alone, "relevant_targets").keys() == {
        (scope, model, "frequent_next")
        for scope in ("all", "eval1", "eval2")
        for model in ("tppo", "ppo", "dpo", "sft")
    }
    assert corrected(alone, "relevant_targets").items() <= with_baselines.items()
    # The second judge reads the policies and the references, no baseline.
    by_second = {pair: p for pair, p in corrected(found, "relevant_targets", "other-v1").items() if p is not None}
    assert by_second == corrected(alone, "relevant_targets")


def test_changed_settings_are_not_mixed_in(tmp_path: Path):
    recipe, _ = make_study(tmp_path / "run")
    recipe.dpo.beta = 0.7
    recipe.study.action = "report"
    with pytest.raises(UserError, match=r"3 of 16 run folders failed[\s\S]*dpo\.beta: 0\.1 -> 0\.7"):
        run_study(recipe)
    metrics = json.loads((tmp_path / "run/study/metrics.json").read_text())
    assert "dpo" not in metrics["models"]
    with pytest.raises(UserError, match=r"--redo \['rl'\]: this study makes"):
        run_study(recipe, ["rl"])


def test_the_distance_from_sft_stands_beside_the_gain(tmp_path: Path):
    evaluate = fake_run.make_recipe(tmp_path, []).evaluate
    recipe, plan = make_study(tmp_path / "run", evaluate=replace(evaluate, readings=[Reading("distance", 3)]))
    assert [job.name for job in plan.readings] == [
        f"distance/{setting}-s{seed}" for seed in (0, 1, 2) for setting in ("base", "kl")
    ]
    measured = plan.reading_of["kl", 1, "distance"].recipe
    assert measured.stage_dirs == {
        "prepare": str(plan.shared[0].run.path("prepare")),
        "sft": str(plan.shared[0].run.path("sft")),
        "rl_tppo": f"{recipe.run_dir}/cells/kl-tppo-s1/rl_tppo",
        "rl_dpo": f"{recipe.run_dir}/cells/base-dpo-s1/rl_dpo",
    }
    run_study(recipe)
    folder = tmp_path / "run/study"
    metrics = json.loads((folder / "metrics.json").read_text())
    cells = {(row["model"], row["metric"]): row for row in metrics["rows"] if row["scope"] == "all"}
    for number, model in enumerate(("tppo", "ppo", "dpo")):
        found = cells[model, "kl_from_sft"]
        assert found["value"] == pytest.approx(2 * (number + 1) + 0.1)
        assert (found["examples"], found["seeds"]) == (3 * len(EXAMPLES), 3)
        assert found["low"] <= found["value"] <= found["high"]
    assert cells["sft", "kl_from_sft"]["value"] is None
    rows = [row for row in results_of(folder) if (row["setting"], row["model"], row["seed"]) == ("base", "dpo", 2)]
    (kl,) = {row["kl_from_sft"] for row in rows}
    assert kl == pytest.approx(6.2)
    table = (folder / "summary.md").read_text().split("## Distance from SFT on the evaluation users")[1]
    shown = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:4]
    assert [line[0] for line in shown] == ["| DPO", "| PPO", "| TPPO"]
    gain = next(
        row["value"] for row in metrics["differences"]
        if (row["scope"], row["model"], row["than"], row["metric"]) == ("all", "tppo", "sft", metrics["headline"])
    )  # fmt: skip
    assert float(shown[2][3]) == pytest.approx(100 * gain / 2.1, abs=0.01)
    assert float(shown[2][4]) == pytest.approx(100 * gain / 2.1**0.5, abs=0.01)
    assert "Distance from SFT on the evaluation users" in (folder / "report.html").read_text()
