"""From answers and readings to metrics.json: the tables of a report, and what a point of the headline costs.

Splits are shown one by one and, when there are several, pooled as `all` (a user is in one split only, so users stay
independent of each other). Answers of one run have one seed; those of a study have several (`tppo.core.stats`).

A family of comparisons is what stands in one column of a table: the pairs of policies in one measure, by one reader, in
one scope; the pairs of a policy and a simple baseline are a family of their own. `low_corrected`, `high_corrected` and
`p_corrected` of a difference hold for all of its family together: what is shown, and what verdicts go by (`estimate`).
`low`, `high`, `p_value`, `error_seeds` and `error_users` are of the pair alone. In both, p is below 0.05 exactly when
the interval leaves 0 out. Intervals of a model's own numbers (`rows`) are 95% each.

The headline counts all that was asked for (`tppo.core.asked`): by the verdicts on words or, of a judge of whole answers
only, by its verdict on the answer times the share of the queries asked for that are there. What the paper counts stands
beside it. Readings that lack it (an older version's, as they are) have the paper's headline, by its own name.

Win-tie-lose (the paper compares models response by response), under one rubric: the higher score wins, scores within
1e-6 tie; examples where the judge abstained on either are left out. The score `asked` is the headline's value of the
answer; `scores`, as the paper counts, is the sentence label (0 or 1) plus the share of its words that are relevant (0
to 1), unparseable answers 0.

A model's cost over SFT is everything the run made for it and not for SFT: its own stage and the stages that stage reads
(`stage_inputs`), without those that SFT itself needs. Stages shared by several models count in full for each of them:
it is the price of having that model alone. Labels are rows of the label stage (a response under one rubric). Manifests
hold a stage's last attempt: a stage resumed after a kill is cheaper on paper than it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from tppo.core.config import Recipe, Rubric
from tppo.core.run import RunFolder
from tppo.core.show import NOT_MEASURED, Table, number
from tppo.core.stages import BASELINES, DISPLAY, MODEL_ORDER, REFERENCES, rl_stage, stage_inputs
from tppo.core.stats import CrossedMeans, Estimate, IntervalEstimate, WinTieLose, estimate, simultaneous, win_tie_lose
from tppo.evaluate.metrics import (
    BESIDE,
    BY_JUDGE,
    BY_NAME,
    CORPUS,
    NO_JUDGE,
    PER_RESPONSE,
    RELEVANCE,
    RUBRICS,
    Metric,
    corpus_metrics,
)

POOLED = "all"
_QUESTION = ["seed", "example_id"]
"""What pairs the answers of two models."""


def model_pairs(models: Collection[str]) -> list[tuple[str, str]]:
    """Which of the models are compared: each with those after it in `MODEL_ORDER`, the farthest first."""
    compared = [model for model in MODEL_ORDER if model in models]
    return [(a, b) for number, a in enumerate(compared) for b in reversed(compared[number + 1 :])]


def voted_pairs(models: Collection[str]) -> list[tuple[str, str]]:
    """The pairs that are voted on: `model_pairs`, and the references, whose vote says what the judge's votes are worth:
    the user's true next queries should win against somebody else's."""
    return [*model_pairs(models), *([REFERENCES] if set(models) >= set(REFERENCES) else [])]


def baseline_pairs(models: Collection[str]) -> list[tuple[str, str]]:
    """Every policy with every baseline among the models."""
    return [
        (model, baseline) for model in MODEL_ORDER if model in models for baseline in BASELINES if baseline in models
    ]


def build_metrics(answers: pd.DataFrame, readings: pd.DataFrame, *, judge: str, rubric: Rubric) -> dict[str, Any]:
    """Tables with intervals: `rows` (per split, model and metric), `differences` and `wins` (per pair).

    A row of another judge than the first one has that judge's name as its `reader`; all other rows have none.

    Args:
        answers: rows of answers.parquet, of one or several seeds.
        readings: rows of readings.parquet on these answers.
        judge: name of the first judge.
        rubric: what the reward models learnt: the headline.
    """
    splits = list(dict.fromkeys(answers["split"]))
    scopes = {split: [split] for split in splits}
    if len(splits) > 1:
        scopes = {POOLED: splits, **scopes}
    judges = readings.loc[readings["measure"].isin([metric.name for metric in RELEVANCE]), "reader"].unique()
    kind = headline_kind(readings[readings["reader"] == judge], rubric)
    result: dict[str, Any] = {
        "judge": judge,
        "second_judges": [str(name) for name in judges if name != judge],
        "headline": f"{kind}_{rubric}",
        "check": f"{kind}_{RUBRICS[1 - RUBRICS.index(rubric)]}",
        "scopes": list(scopes),
        "models": [model for model in DISPLAY if model in set(answers["model"])],
        "rows": [],
        "differences": [],
        "wins": [],
        "abstained": [],
    }
    for scope, members in scopes.items():
        own_answers, own_readings = (frame[frame["split"].isin(members)] for frame in (answers, readings))
        _Scope(scope, own_answers, own_readings, judge).add_to(result)
    _correct(result)
    return result


HEADLINES = ("asked_words", "asked_relevant", "relevant")
"""What a headline may be, the first that was measured: of the words, of whole answers, and as the paper counts."""


def headline_kind(readings: pd.DataFrame, rubric: Rubric) -> str:
    """The first of `HEADLINES` that this judge gave every answer that it did not abstain on.

    Args:
        readings: the first judge's.
    """
    count = readings[readings["value"].notna()]["measure"].value_counts()
    judged = count.get(f"relevant_{rubric}", 0)
    return next(kind for kind in HEADLINES if count.get(f"{kind}_{rubric}", 0) == judged)


def _correct(result: dict[str, Any]) -> None:
    """Add to the differences of every family what holds for all of them together. The vote on the references
    compares no models: a family of one."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["differences"]:
        family = (row["scope"], row["metric"], row["reader"], row["than"] in BASELINES)
        families.setdefault(family, []).append(row)
    for row in result["wins"]:
        voted = (row["scope"], row["by"], row["rubric"], row["than"] in BASELINES, row["model"] in REFERENCES)
        families.setdefault(voted, []).append(row["net"])
    for found in families.values():
        comparisons = sum(row["p_value"] is not None for row in found)
        for row in found:
            row |= simultaneous(row, comparisons)


class _Scope:
    """One evaluation set, or all of them: its questions, and every measure of every model on them."""

    def __init__(self, name: str, answers: pd.DataFrame, readings: pd.DataFrame, judge: str) -> None:
        self.name, self.answers, self.judge = name, answers, judge
        self.models = [model for model in DISPLAY if model in set(answers["model"])]
        questions = answers.drop_duplicates(_QUESTION)
        self.index = pd.MultiIndex.from_frame(questions[_QUESTION])
        self.means = CrossedMeans(list(questions["user_id"]), list(questions["seed"]))
        self.votes = readings[readings["than"].notna()]
        self.single = readings[readings["than"].isna()]
        # Readers that are no judge have measures of their own, so the measure says who it was.
        self.single = self.single.assign(reader=self.single["reader"].replace(dict.fromkeys([judge, *NO_JUDGE], "")))
        wide = self.single.pivot(index=_QUESTION, columns=["reader", "measure", "model"], values="value")
        self.wide = wide.reindex(self.index)

    def values(self, model: str, measure: str, reader: str = "") -> np.ndarray:
        """Of each question (N,); NaN where it was not measured."""
        found = self.wide.get((reader, measure, model))
        return np.full(len(self.index), np.nan) if found is None else found.to_numpy(float)

    def add_to(self, result: dict[str, Any]) -> None:
        measures = [("", metric) for metric in PER_RESPONSE]
        measures += [(judge, metric) for judge in result["second_judges"] for metric in BY_JUDGE]
        for model in self.models:
            own = {"scope": self.name, "model": model}
            for reader, metric in measures:
                found = self.means.mean(self.values(model, metric.name, reader), share=metric.unit == "rate")
                result["rows"].append({**own, "metric": metric.name, "reader": reader, **found.as_dict()})
            result["rows"] += [{**own, **row} for row in self._corpus_rows(model)]
            for reader in ("", *result["second_judges"]):
                for rubric in RUBRICS:
                    own_rows = self.single[(self.single["reader"] == reader) & (self.single["model"] == model)]
                    asked = own_rows.loc[own_rows["measure"] == f"relevant_{rubric}", "value"]
                    count = int(asked.isna().sum())
                    result["abstained"].append({**own, "reader": reader, "rubric": rubric, "count": count})
        for a, b in [*model_pairs(self.models), *baseline_pairs(self.models)]:
            own = {"scope": self.name, "model": a, "than": b}
            for reader, metric in measures:
                values = (self.values(model, metric.name, reader) for model in (a, b))
                found = self.means.difference(*values)
                result["differences"].append({**own, "metric": metric.name, "reader": reader, **found.as_dict()})
            kind = result["headline"].rpartition("_")[0]
            for rubric in RUBRICS:
                scores = {"scores": [self.scores(model, rubric) for model in (a, b)]}
                if kind != HEADLINES[-1]:
                    scores = {"asked": [self.values(model, f"{kind}_{rubric}") for model in (a, b)], **scores}
                for by, (ours, theirs) in scores.items():
                    wins = win_tie_lose(self.means, ours, theirs)
                    result["wins"].append({**own, "rubric": rubric, "by": by, **_shares(wins)})
        result["wins"] += [{"scope": self.name, **row} for row in self._vote_rows()]

    def scores(self, model: str, rubric: str) -> np.ndarray:
        """As the paper counts: sentence label + share of relevant words of each response, 0 to 2; NaN where the judge
        abstained."""
        return self.values(model, f"relevant_{rubric}") + self.values(model, f"words_{rubric}")

    def _corpus_rows(self, model: str) -> list[dict[str, Any]]:
        """No interval: how varied all answers are is no mean over users. Mean over the
        seeds of each seed's: over all seeds at once, more answers would repeat more."""
        own = self.answers[self.answers["model"] == model]
        found = [corpus_metrics(part["queries"]) for _, part in own.groupby("seed")]
        rows = []
        for metric in CORPUS:
            values = [value for corpus in found if (value := corpus[metric.name]) is not None]
            mean = sum(values) / len(values) if values else None
            counts = {"examples": len(own), "users": own["user_id"].nunique()}
            rows.append({"metric": metric.name, "reader": "", "value": mean, "low": None, "high": None, **counts})
        return rows

    def _vote_rows(self) -> list[dict[str, Any]]:
        """Win-tie-lose by vote, as the votes were counted (`tppo.evaluate.votes`); abstentions are left out."""
        rows = []
        for (a, b), found in self.votes.groupby(["model", "than"], sort=False):
            judge, rubric = found["reader"].iloc[0], found["measure"].iloc[0].partition("_")[2]
            of = {
                name: found[found["measure"] == f"{name}_{rubric}"].set_index(_QUESTION)["value"]
                for name in ("vote", "flipped")
            }
            sign_N, flips = of["vote"].reindex(self.index).to_numpy(float), of["flipped"]
            wins = win_tie_lose(self.means, sign_N, np.zeros(len(sign_N)))
            row = {"model": a, "than": b, "rubric": rubric, "by": "vote", **_shares(wins), "judge": judge}
            rate = float(flips.mean()) if len(flips) else None
            rows.append({**row, "flip_rate": rate, "asked": len(flips), "abstained": int(of["vote"].isna().sum())})
        return rows


def _shares(wins: WinTieLose) -> dict[str, Any]:
    return {"win": wins.win, "tie": wins.tie, "lose": wins.lose, "net": wins.net.as_dict()}


@dataclass(frozen=True)
class Metrics:
    """metrics.json with look-ups."""

    data: dict[str, Any]
    _rows: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.data["rows"]:
            self._rows[row["scope"], row["model"], row["metric"], row.get("reader", "")] = row
        for row in self.data["differences"]:
            self._rows[row["scope"], row["model"], row["than"], row["metric"], row.get("reader", "")] = row

    @property
    def headline(self) -> str:
        return self.data["headline"]

    @property
    def rubric(self) -> str:
        """Of the headline."""
        return self.headline.rpartition("_")[2]

    @property
    def counts_asked(self) -> bool:
        """Whether the headline counts all that was asked for; else it is the paper's (see above)."""
        return self.headline.rpartition("_")[0] != HEADLINES[-1]

    @property
    def beside(self) -> list[Metric]:
        """What stands beside the headline: the paper's rate, and what no headline prices."""
        paper = [f"relevant_{self.rubric}"] if self.counts_asked else []
        return [BY_NAME[name] for name in (*paper, *BESIDE)]

    def like_headline(self, reader: str) -> str:
        """What a second judge gave that counts as the headline does; of a judge of whole answers not the words."""
        for kind in HEADLINES:
            name = f"{kind}_{self.rubric}"
            if any(self.cell(self.scopes[0], model, name, reader).value is not None for model in self.data["models"]):
                return name
        return self.headline

    @property
    def scopes(self) -> list[str]:
        return self.data["scopes"]

    @property
    def policies(self) -> list[str]:
        """SFT and the tuned models: what is compared with each other."""
        return [model for model in self.data["models"] if model not in (*BASELINES, *REFERENCES)]

    @property
    def baselines(self) -> list[str]:
        return [model for model in self.data["models"] if model in BASELINES]

    @property
    def second_judges(self) -> list[str]:
        return self.data.get("second_judges", [])

    @property
    def knows_truth(self) -> bool:
        """Whether the log says what is truly relevant (`tppo.logs.truth`)."""
        return self.cell(self.scopes[0], "sft", "known_words").value is not None

    @property
    def true_words(self) -> str:
        """What the log knows of words, counted as the headline is; as the paper counts where that was not measured."""
        asked = self.cell(self.scopes[0], "sft", "asked_known_words").value is not None
        return "asked_known_words" if asked and self.counts_asked else "known_words"

    def cell(self, scope: str, model: str, metric: str, reader: str = "") -> Estimate:
        """Args: reader: a second judge; empty: the first judge, or what needs none."""
        return estimate(self._rows.get((scope, model, metric, reader)))

    def difference(self, scope: str, model: str, than: str, metric: str, reader: str = "") -> Estimate:
        return estimate(self._rows.get((scope, model, than, metric, reader)))

    def difference_row(self, scope: str, model: str, than: str, metric: str, reader: str = "") -> dict[str, Any]:
        """With all that a study knows of it, too: seeds, p-values."""
        return self._rows[scope, model, than, metric, reader]

    def pairs(self, scope: str) -> list[tuple[str, str]]:
        """The policies that are compared with each other."""
        return [pair for pair in self._compared(scope) if pair[1] not in BASELINES]

    def baseline_pairs(self, scope: str) -> list[tuple[str, str]]:
        """A policy and the baseline it is compared with."""
        return [pair for pair in self._compared(scope) if pair[1] in BASELINES]

    def _compared(self, scope: str) -> list[tuple[str, str]]:
        found = [(row["model"], row["than"]) for row in self.data["differences"] if row["scope"] == scope]
        return list(dict.fromkeys(found))

    def wins(self, scope: str, model: str, than: str, rubric: str) -> dict[str, Any] | None:
        """By the headline's value of each answer."""
        by = "asked" if self.counts_asked else "scores"
        wanted = {"scope": scope, "model": model, "than": than, "rubric": rubric, "by": by}
        return next((row for row in self.data["wins"] if wanted.items() <= row.items()), None)


@dataclass(frozen=True)
class Cost:
    """What a model cost over SFT, and what it gained."""

    model: str
    seconds: float | None
    """Of training; None when a manifest is missing."""
    labels: int | None
    gain: Estimate
    """Headline minus SFT's, a share."""
    seconds_per_answer: float | None
    """Answering the evaluation set, loading included; None when the evaluation was resumed."""

    @property
    def seconds_per_point(self) -> IntervalEstimate | None:
        return per_point(self.seconds, self.gain)

    @property
    def labels_per_point(self) -> IntervalEstimate | None:
        return per_point(self.labels, self.gain)


def per_point(cost: float | None, gain: Estimate) -> IntervalEstimate | None:
    """Cost of a percentage point; None unless the gain's whole interval is above 0 (else there may be no gain).

    The cost is a fixed number, so the ends of the gain's interval give those of the quotient.
    """
    if cost is None or gain.value is None or gain.low is None or gain.high is None or gain.low <= 0:
        return None
    return IntervalEstimate(cost / (100 * gain.value), cost / (100 * gain.high), cost / (100 * gain.low))


def closure(stage: str, recipe: Recipe) -> set[str]:
    """A stage and all that it reads, directly or not."""
    return {stage}.union(*(closure(name, recipe) for name in stage_inputs(stage, recipe)))


def model_costs(recipe: Recipe, run: RunFolder, metrics: Metrics, scope: str) -> list[Cost]:
    """Every tuned policy, and best_of_n (reward models, no tuning), against SFT."""
    facts = (run.manifest("evaluate") or {}).get("facts", {})
    count = sum(facts.get("examples", {}).values())
    answering = facts.get("seconds_answering", {})
    costs = []
    for model in [
        name for name in metrics.data["models"] if name in (*metrics.policies, "best_of_n") and name != "sft"
    ]:
        last = "reward" if model == "best_of_n" else rl_stage(model)
        stages = closure(last, recipe) - closure("sft", recipe)
        manifests: dict[str, dict[str, Any] | None] = {stage: run.manifest(stage) for stage in stages}
        known = [manifest for manifest in manifests.values() if manifest is not None]
        label = manifests.get("label")
        labels: int | None = 0
        if "label" in stages:
            labels = label["facts"].get("labels") if label else None
        costs.append(
            Cost(
                model,
                sum(manifest["seconds"] for manifest in known) if len(known) == len(stages) else None,
                labels,
                gain_over_sft(metrics, scope, model),
                answering[model] / count if count and model in answering else None,
            )
        )
    return costs


def gain_over_sft(metrics: Metrics, scope: str, model: str) -> Estimate:
    """The headline minus SFT's. Baselines are on the other side of their pair with SFT."""
    headline = metrics.data["headline"]
    if model in metrics.policies:
        return metrics.difference(scope, model, "sft", headline)
    loss = metrics.difference(scope, "sft", model, headline)
    value, low, high = (None if end is None else -end for end in (loss.value, loss.high, loss.low))
    return Estimate(value, low, high, loss.examples, loss.users)


def cost_table(costs: list[Cost], note: str = "") -> Table:
    """The costs in words."""
    heads = ["Model", "Training minutes", "Labels", "Seconds a point", "Labels a point", "Seconds an answer"]
    rows = [
        [
            DISPLAY[cost.model],
            NOT_MEASURED if cost.seconds is None else number(cost.seconds / 60),
            NOT_MEASURED if cost.labels is None else str(cost.labels),
            _said(cost.seconds_per_point),
            _said(cost.labels_per_point),
            number(cost.seconds_per_answer),
        ]
        for cost in costs
    ]
    title = "Cost of a point of the headline over SFT"
    return Table(heads, rows, title, note, series=[cost.model for cost in costs])


def _said(estimate: IntervalEstimate | None) -> str:
    if estimate is None:
        return "no gain shown"
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
