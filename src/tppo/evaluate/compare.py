"""From rows of generations.parquet to metrics.json: the tables of the report.

Splits are shown one by one and, when there are several, pooled as `all` (a user is in one split only, so the
bootstrap over users stays one of independent clusters).

Win-tie-lose (the paper compares models response by response): the score of a response is its sentence
label (0 or 1) plus the share of its words that are relevant (0 to 1), under one rubric; unparseable responses
score 0. The higher score wins, scores within 1e-6 tie; examples where the judge abstained on either
are left out.

What a point of the headline costs: seconds of training and labelled responses, from the manifests.

A model's cost over SFT is everything the run made for it and not for SFT: its own stage and the stages that stage
reads (`stage_inputs`), without those that SFT itself needs. Stages shared by several models count in full
for each of them: it is the price of having that model alone. The gain is the headline's difference from SFT.

Labels are rows of the label stage (a response under one rubric). Manifests hold a stage's last attempt: a stage
resumed after a kill is cheaper on paper than it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tppo.core.common import stream_seed
from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.core.show import NOT_MEASURED, number
from tppo.core.stages import BASELINES, DISPLAY, MODEL_ORDER, REFERENCES, rl_stage, stage_inputs
from tppo.core.stats import Estimate, IntervalEstimate, UserBootstrap, WinTieLose, estimate, win_tie_lose
from tppo.evaluate.metrics import (
    CORPUS,
    PER_RESPONSE,
    corpus_metrics,
)

Rows = list[dict[str, Any]]
BootstrapOf = Callable[[Rows, str], UserBootstrap]
"""The bootstrap of a scope, from a row of any model for each question, in order, and the scope's name."""
POOLED = "all"


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


def build_metrics(
    rows: Rows, recipe: Recipe, votes: Rows | None = None, bootstrap_of: BootstrapOf | None = None
) -> dict[str, Any]:
    """Tables with intervals: `rows` (per split, model and metric), `differences` and `wins` (per pair).

    Args:
        rows: of generations.parquet; with a column `seed` when several runs answered the same examples.
        votes: rows of votes.parquet, when the judge was asked for votes; with a column `seed` as in `rows`.
        bootstrap_of: where intervals come from, when not from a bootstrap over users.
    """
    splits = list(dict.fromkeys(row["split"] for row in rows))
    scopes = {split: [split] for split in splits}
    if len(splits) > 1:
        scopes = {POOLED: splits, **scopes}
    other = "history" if recipe.reward.rubric == "targets" else "targets"
    result: dict[str, Any] = {
        "headline": f"relevant_{recipe.reward.rubric}",
        "check": f"relevant_{other}",
        "scopes": list(scopes),
        "models": [m for m in DISPLAY if any(row["model"] == m for row in rows)],
        "rows": [],
        "differences": [],
        "wins": [],
        "abstained": [],
    }
    for scope, members in scopes.items():
        chosen = [row for row in rows if row["split"] in members]
        bootstrap = _add_scope(result, scope, chosen, bootstrap_of or _user_bootstrap(recipe))
        _add_votes(result, scope, [row for row in votes or [] if row["split"] in members], chosen, bootstrap)
    return result


def _user_bootstrap(recipe: Recipe) -> BootstrapOf:
    def of(rows: Rows, scope: str) -> UserBootstrap:
        users, seed = [row["user_id"] for row in rows], stream_seed(recipe.seed, "bootstrap", scope)
        return UserBootstrap(users, recipe.evaluate.bootstrap_samples, seed)

    return of


def _question(row: dict[str, Any]) -> tuple[Any, str]:
    """What pairs the answers of two models: the example, and the seed where there are several."""
    return row.get("seed"), row["example_id"]


def _add_scope(result: dict[str, Any], scope: str, rows: Rows, bootstrap_of: BootstrapOf) -> UserBootstrap:
    by_model = {model: [r for r in rows if r["model"] == model] for model in result["models"]}
    by_model = {model: found for model, found in by_model.items() if found}
    questions = {_question(row): row for row in rows}
    bootstrap = bootstrap_of(list(questions.values()), scope)
    for model, found in by_model.items():
        indexed = {_question(row): row for row in found}
        by_model[model] = [indexed.get(question, {}) for question in questions]
        assert len(indexed) == len(found), f"{model} answered an example twice"
        result["rows"] += _model_rows(scope, model, by_model[model], bootstrap)
        for judge in ("", "second_"):
            for rubric in ("targets", "history"):
                count = sum(row[f"{judge}status_{rubric}"] == "abstained" for row in found)
                result["abstained"].append({"scope": scope, "model": model, "rubric": judge + rubric, "count": count})
    for a, b in [*model_pairs(list(by_model)), *baseline_pairs(list(by_model))]:
        _add_pair(result, scope, a, b, by_model, bootstrap)
    return bootstrap


def _add_votes(result: dict[str, Any], scope: str, votes: Rows, rows: Rows, bootstrap: UserBootstrap) -> None:
    """Win-tie-lose by vote, as the votes were counted (`tppo.evaluate.votes`); abstentions are left out."""
    questions = list(dict.fromkeys(_question(row) for row in rows))
    for a, b in dict.fromkeys((row["model"], row["than"]) for row in votes):
        found = {_question(row): row for row in votes if (row["model"], row["than"]) == (a, b)}
        side = {"a": 1.0, "tie": 0.0, "b": -1.0, None: None}
        sign_N = [side[found[question]["winner"]] if question in found else None for question in questions]
        first = next(iter(found.values()))
        flips = [row["flipped"] for row in found.values() if row["flipped"] is not None]
        wins = win_tie_lose(bootstrap, sign_N, [0.0] * len(sign_N))
        result["wins"].append(
            {
                **_wins_row(scope, a, b, first["rubric"], wins, "vote"),
                "judge": first["judge"],
                "flip_rate": sum(flips) / len(flips) if flips else None,
                "asked": len(flips),
                "abstained": sum(row["winner"] is None for row in found.values()),
            }
        )


def _wins_row(scope: str, a: str, b: str, rubric: str, wins: WinTieLose, by: str) -> dict[str, Any]:
    shares = {"win": wins.win, "tie": wins.tie, "lose": wins.lose, "net": wins.net.as_dict()}
    return {"scope": scope, "model": a, "than": b, "rubric": rubric, "by": by, **shares}


def _model_rows(scope: str, model: str, rows: Rows, bootstrap: UserBootstrap) -> Rows:
    table = [
        {
            "scope": scope,
            "model": model,
            "metric": metric.name,
            **bootstrap.mean([row.get(metric.name) for row in rows]).as_dict(),
        }
        for metric in PER_RESPONSE
    ]
    # No interval: drawing users with replacement repeats their words: biased downwards.
    corpus = _corpus_of_one_seed([row for row in rows if row])
    users = len({row["user_id"] for row in rows if row})
    table += [
        {
            "scope": scope,
            "model": model,
            "metric": metric.name,
            "value": corpus[metric.name],
            "low": None,
            "high": None,
            "examples": sum(bool(row) for row in rows),
            "users": users,
        }
        for metric in CORPUS
    ]
    return table


def _corpus_of_one_seed(rows: Rows) -> dict[str, float | None]:
    """Mean over the seeds of each seed's corpus metrics: over all seeds at once, more answers would repeat more."""
    seeds = {row.get("seed") for row in rows}
    found = [corpus_metrics([row["queries"] for row in rows if row.get("seed") == seed]) for seed in seeds]
    means: dict[str, float | None] = {}
    for metric in CORPUS:
        values = [value for corpus in found if (value := corpus[metric.name]) is not None]
        means[metric.name] = sum(values) / len(values) if values else None
    return means


def _add_pair(
    result: dict[str, Any], scope: str, a: str, b: str, by_model: dict[str, Rows], bootstrap: UserBootstrap
) -> None:
    for metric in PER_RESPONSE:
        estimate = bootstrap.difference(_column(by_model[a], metric.name), _column(by_model[b], metric.name))
        result["differences"].append(
            {"scope": scope, "model": a, "than": b, "metric": metric.name, **estimate.as_dict()}
        )
    for rubric in ("targets", "history"):
        wins = win_tie_lose(bootstrap, paired_scores(by_model[a], rubric), paired_scores(by_model[b], rubric))
        result["wins"].append(_wins_row(scope, a, b, rubric, wins, "scores"))


def paired_scores(rows: Sequence[dict[str, Any]], rubric: str) -> list[float | None]:
    """Sentence label + share of relevant words of each response, 0 to 2; None where the judge abstained."""
    scores: list[float | None] = []
    for row in rows:
        label, share = row.get(f"relevant_{rubric}"), row.get(f"words_{rubric}")
        scores.append(None if label is None or share is None else label + share)
    return scores


def _column(rows: Rows, name: str) -> list[float | None]:
    return [row.get(name) for row in rows]


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


def cost_rows(costs: list[Cost]) -> list[dict[str, str]]:
    """The costs in words, for the report's tables."""
    return [
        {
            "model": cost.model,
            "label": DISPLAY[cost.model],
            "minutes": NOT_MEASURED if cost.seconds is None else number(cost.seconds / 60),
            "labels": NOT_MEASURED if cost.labels is None else str(cost.labels),
            "seconds_per_point": _said(cost.seconds_per_point),
            "labels_per_point": _said(cost.labels_per_point),
            "seconds_per_answer": number(cost.seconds_per_answer),
        }
        for cost in costs
    ]


def _said(estimate: IntervalEstimate | None) -> str:
    if estimate is None:
        return "no gain shown"
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def cost_markdown(costs: list[Cost]) -> str:
    """The cost table of summary.md."""
    lines = ["## Cost of a point of the headline over SFT", ""]
    lines += ["| | training minutes | labels | seconds a point | labels a point | seconds an answer |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in cost_rows(costs):
        cells = ("minutes", "labels", "seconds_per_point", "labels_per_point", "seconds_per_answer")
        lines.append(f"| {row['label']} | {' | '.join(row[cell] for cell in cells)} |")
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Metrics:
    """metrics.json with look-ups."""

    data: dict[str, Any]

    @property
    def scopes(self) -> list[str]:
        return self.data["scopes"]

    @property
    def policies(self) -> list[str]:
        """SFT and the tuned models: what is compared with each other."""
        return [model for model in self.data["models"] if model not in (*BASELINES, "targets", "other_user")]

    @property
    def baselines(self) -> list[str]:
        return [model for model in self.data["models"] if model in BASELINES]

    @property
    def knows_truth(self) -> bool:
        """Whether the log says what is truly relevant (`tppo.logs.truth`)."""
        return self.cell(self.scopes[0], "sft", "known_words").value is not None

    def cell(self, scope: str, model: str, metric: str) -> Estimate:
        return _find(self.data["rows"], scope=scope, model=model, metric=metric)

    def difference(self, scope: str, model: str, than: str, metric: str) -> Estimate:
        return _find(self.data["differences"], scope=scope, model=model, than=than, metric=metric)

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
        wanted = {"scope": scope, "model": model, "than": than, "rubric": rubric, "by": "scores"}
        return next((row for row in self.data["wins"] if wanted.items() <= row.items()), None)


def _find(rows: list[dict[str, Any]], **wanted: str) -> Estimate:
    for row in rows:
        if wanted.items() <= row.items():
            return estimate(row)
    return Estimate(None, None, None, 0, 0)
