"""From rows of generations.parquet to metrics.json: the tables of the report.

Splits are shown one by one and, when there are several, pooled as `all` (a user is in one split only, so the
bootstrap over users stays one of independent clusters).

Win-tie-lose (the paper compares models response by response): the score of a response is its sentence
label (0 or 1) plus the share of its words that are relevant (0 to 1), under one rubric; unparseable responses
score 0. The higher score wins, scores within 1e-6 tie; examples where the judge abstained on either
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from tppo.config import Recipe
from tppo.evaluate.metrics import CORPUS, PER_RESPONSE, corpus_metrics
from tppo.evaluate.stats import UserBootstrap, WinTieLose, win_tie_lose
from tppo.seeding import stream_seed

Rows = list[dict[str, Any]]
BootstrapOf = Callable[[Rows, str], UserBootstrap]
"""The bootstrap of a scope, from a row of any model for each question, in order, and the scope's name."""

# Each model is compared with those after it, the farthest (SFT) first.
MODEL_ORDER = ("tppo", "ppo_sum", "ppo", "dpo", "sft")
DISPLAY = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo_sum": "PPO (token sum)",
    "tppo": "TPPO",
    "untuned": "Without SFT",
    "best_of_n": "SFT, best of n",
    "frequent_next": "Most frequent next",
    "repeat_last": "Last query again",
    "repeat_recent": "Last queries again",
    "nearest": "Nearest neighbour",
    "targets": "True next queries",
    "other_user": "Another user's next queries",
}
REFERENCES: tuple[str, str] = ("targets", "other_user")
"""The scale of a judge: queries that are as good as can be, and queries of somebody else."""
BASELINES = ("untuned", "best_of_n", "frequent_next", "repeat_last", "repeat_recent", "nearest")
"""What every policy is compared with, besides the other policies."""
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
    """Win-tie-lose by vote, as the votes were counted (`tppo.judge.vote`); abstentions are left out."""
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
