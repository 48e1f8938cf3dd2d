"""Studies of both reward models on the labels of a run folder: `search`, `curves`, `ablation`.

    python benchmarks/reward_study.py search --output studies/aol --config recipes/aol-cpu.yaml --run_dir runs/aol-cpu
    python benchmarks/reward_study.py curves --output studies/aol --seeds 3 --run_dir runs/aol-cpu
    python benchmarks/reward_study.py ablation --output studies/aol --seeds 3 --run_dir runs/aol-cpu

- search: the same number of settings for either model: learning rates x epochs, then at the best of those four
  variants, one change each. All with the first seed; the best `--finalists` of either model with the others too.
- curves: the recipe's two models, evaluated more often; is the token model's sentence AUC higher, faster, steadier?
- ablation: the token model with local weight w and global weight 1 - w (the paper's Eq. 3). Losses at different w are
  on different scales, so AUC decides.

Needs a finished label stage. Everything else on the command line goes to the recipe (`--config`, `--run_dir`,
`--reward.patience 6`). The output folder gets trials.jsonl, from which a killed study goes on, and for each study a
table (Markdown), its numbers (JSON) and charts (PNG). The held-out users that pick a checkpoint or a setting are those
it is reported on, for both models alike: the numbers compare, but are a little high.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from reward_trials import KIND, Data, Trial, as_flags, load_data, own_settings, run_trials

from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.files import write_json, write_text
from tppo.core.recipe import parse_recipe
from tppo.core.show import Table, digits
from tppo.report.charts import REWARD_CHARTS, reward_lines, save_line_chart, seed_line

Rows = list[dict[str, Any]]

PAPER = {
    "token": {"class_ratio": 3.0, "global_estimator": "expected", "local_weight": 0.4, "global_weight": 0.6},
    "sentence": {"class_ratio": 3.0, "sentence_pooling": "mean", "sentence_loss": "bce"},
}
# One change at a time from the paper's setting; as many variants for one model as for the other.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "token": [
        {"class_ratio": 0.0},
        {"global_estimator": "straight_through"},
        {"local_weight": 0.2, "global_weight": 0.8},
        {"local_weight": 0.8, "global_weight": 0.2},
    ],
    "sentence": [
        {"class_ratio": 0.0},
        {"sentence_pooling": "cls"},
        {"sentence_pooling": "max"},
        {"sentence_loss": "mse"},
    ],
}
ABLATION_CHARTS = (("token_auc", "Held-out AUC of tokens"), ("sentence_auc", "Held-out AUC of the mean on responses"))


def search(recipe: Recipe, data: Data, arguments: argparse.Namespace, output: Path) -> None:
    """Both models' searches; writes search.md and search.json."""
    seeds = _seeds(recipe, arguments)
    trials = output / "trials.jsonl"

    def train(kind: str, grid: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[tuple[dict[str, Any], Rows]]:
        """Each setting with the rows of its seeds, best first."""
        settings = [own_settings(kind, recipe.reward, **changes) for changes in grid]
        todo = [Trial(kind, own, seed) for own in settings for seed in seeds]
        rows = run_trials(todo, data, trials, arguments.workers)
        by_setting = [rows[i : i + len(seeds)] for i in range(0, len(rows), len(seeds))]
        return ranked(zip(grid, by_setting, strict=True))

    found: list[dict[str, Any]] = []
    tried = {}
    for kind in KIND:
        schedules = itertools.product(arguments.learning_rates, arguments.epochs)
        plain = [{"learning_rate": rate, "epochs": count, **PAPER[kind]} for rate, count in schedules]
        results = train(kind, plain, seeds[:1])
        results = ranked(results + train(kind, [{**results[0][0], **one} for one in VARIANTS[kind]], seeds[:1]))
        tried[kind] = len(results)
        finalists = [changes for changes, _ in results[: arguments.finalists or len(results)]]
        finals = train(kind, finalists, seeds)
        rest = results[len(finalists) :]
        found += [{"kind": kind, "changes": changes, **summary(rows)} for changes, rows in [*finals, *rest]]
    heads = ["model", "settings", "seeds", "own AUC", "sentence AUC", "best step", "collapsed"]
    cells = [
        [row["kind"], _described(row), str(row["seeds"]), *_aucs(row), f"{row['step']:.0f}", str(row["collapsed"])]
        for row in found
    ]
    lines = [f"{count} settings for the {kind} model" for kind, count in tried.items()]
    for kind in KIND:
        best = next(row for row in found if row["kind"] == kind)
        lines.append(f"best for the {kind} model: `{as_flags(kind, best['changes'])}`")
    _publish(output, "search", heads, cells, lines, {"settings": found})


def curves(recipe: Recipe, data: Data, arguments: argparse.Namespace, output: Path) -> None:
    """Both models of the recipe over training; writes curves.md, curves.json and a chart per measure."""
    changes = {"evals_per_epoch": arguments.evals_per_epoch, "patience": 0}
    settings = {kind: own_settings(kind, recipe.reward, **changes) for kind in KIND}
    trials = [Trial(kind, own, seed) for kind, own in settings.items() for seed in _seeds(recipe, arguments)]
    rows = run_trials(trials, data, output / "trials.jsonl", arguments.workers)
    points = [{"model": row["kind"], "seed": row["seed"], **point} for row in rows for point in row["curve"]]
    for name, title in REWARD_CHARTS:
        save_line_chart(output / f"curves_{name}.png", reward_lines(points, name), title, "step")
    compared = compare_curves(rows)
    heads = ["model", "seeds", "own AUC", "sentence AUC", "reaches the rival's best", "std over seeds", "wobble"]
    cells = [
        [kind, str(found["seeds"]), *_aucs(found), _reached(found["reach_steps"]), *(
            digits(found[name]) for name in ("seed_std", "wobble"))]
        for kind, found in compared["models"].items()
    ]  # fmt: skip
    _publish(output, "curves", heads, cells, claims(compared), {**compared, "points": points})


def ablation(recipe: Recipe, data: Data, arguments: argparse.Namespace, output: Path) -> None:
    """The token model at several local weights; writes ablation.md, ablation.json and charts."""
    seeds = _seeds(recipe, arguments)
    changes = {"evals_per_epoch": arguments.evals_per_epoch, "patience": 0}
    settings = [
        own_settings("token", recipe.reward, local_weight=w, global_weight=round(1 - w, 9), **changes)
        for w in arguments.weights
    ]
    trials = [Trial("token", own, seed) for own in settings for seed in seeds]
    rows = run_trials(trials, data, output / "trials.jsonl", arguments.workers)
    by_weight = {w: [row for row in rows if row["settings"]["local_weight"] == w] for w in arguments.weights}
    colours = matplotlib.colormaps["viridis"].resampled(len(by_weight) + 1)  # the last one is too pale for a line
    for name, title in ABLATION_CHARTS:
        lines = [
            seed_line(to_hex(colours(i)), f"{w:g}", [point for row in found for point in row["curve"]], "step", name)
            for i, (w, found) in enumerate(by_weight.items())
        ]
        save_line_chart(output / f"ablation_{name}.png", lines, f"{title}, by local weight", "step")
    kept = [{"weight": row["settings"]["local_weight"], **row["facts"]["best"]} for row in rows]
    both = [seed_line("tppo", "tokens", kept, "weight", "token_auc")]
    both.append(seed_line("targets", "mean, on responses", kept, "weight", "sentence_auc"))
    save_line_chart(output / "ablation_weight.png", both, "Held-out AUC of the kept checkpoint", "local weight")
    found = [{"local_weight": w, **summary(rows)} for w, rows in by_weight.items()]
    heads = ["local weight", "seeds", "token AUC", "sentence AUC", "best step", "collapsed"]
    cells = [
        [f"{row['local_weight']:g}", str(row["seeds"]), *_aucs(row), f"{row['step']:.0f}", str(row["collapsed"])]
        for row in found
    ]
    lines = [
        f"highest {label} AUC: w = {max(found, key=lambda row: _or_lowest(row[name]['mean']))['local_weight']:g}"
        for name, label in (("auc", "token"), ("sentence_auc", "sentence"))
    ]
    points = [{"local_weight": w, "seed": row["seed"], **point}
              for w, rows in by_weight.items() for row in rows for point in row["curve"]]  # fmt: skip
    _publish(output, "ablation", heads, cells, lines, {"weights": found, "points": points})


def summary(rows: Rows) -> dict[str, Any]:
    """One setting over its seeds: kept checkpoints' AUCs (mean, std), mean step, number of collapsed models."""
    best = [row["facts"]["best"] for row in rows]
    return {
        "seeds": len(rows),
        "auc": mean_std([row["auc"] for row in best]),
        "sentence_auc": mean_std([row["sentence_auc"] for row in best]),
        "step": statistics.fmean(row["step"] for row in best),
        "collapsed": sum(row["facts"]["collapsed"] is True for row in rows),
    }


def mean_std(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None where there are too few values, or one that was not measured."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else None}


def own_auc(rows: Rows) -> float:
    """What a setting is chosen by: the mean AUC on the model's own task; last where there is none."""
    return _or_lowest(mean_std([row["facts"]["best"]["auc"] for row in rows])["mean"])


def ranked(results: Iterable[tuple[dict[str, Any], Rows]]) -> list[tuple[dict[str, Any], Rows]]:
    """Settings with their rows, best first."""
    return sorted(results, key=lambda result: own_auc(result[1]), reverse=True)


def compare_curves(rows: Rows) -> dict[str, Any]:
    """Sentence AUC of both models over training, from rows with the same steps for all seeds of a kind.

    Returns:
        rival_best: the top of the rival's mean curve. models: by kind the `summary`, and with the second half of the
        evaluations: seed_std (std over seeds, mean over evaluations) and wobble (mean change from one evaluation to
        the next); reach_steps (by seed: first step with at least rival_best, or None), best_by_seed.
    """
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KIND}
    aucs = {
        kind: [[point["sentence_auc"] for point in row["curve"]] for row in found] for kind, found in by_kind.items()
    }
    if any(auc is None for curves in aucs.values() for curve in curves for auc in curve):
        raise UserError("the held-out rows hold one class only, so there is no sentence AUC: raise --max_rows")
    rival_best = max(statistics.fmean(at_step) for at_step in zip(*aucs["sentence"], strict=True))
    models = {}
    for kind, found in by_kind.items():
        late = [curve[len(curve) // 2 :] for curve in aucs[kind]]
        spread = [statistics.stdev(at_step) for at_step in zip(*late, strict=True)] if len(late) > 1 else []
        changes = [abs(b - a) for curve in late for a, b in itertools.pairwise(curve)]
        models[kind] = {
            **summary(found),
            "seed_std": statistics.fmean(spread) if spread else None,
            "wobble": statistics.fmean(changes) if changes else None,
            "reach_steps": [
                next((point["step"] for point in row["curve"] if point["sentence_auc"] >= rival_best), None)
                for row in found
            ],
            "best_by_seed": [row["facts"]["best"]["sentence_auc"] for row in found],
        }
    return {"rival_best": rival_best, "models": models}


def claims(compared: dict[str, Any]) -> list[str]:
    """Whether the token model's sentence AUC is higher, reached faster and steadier, said plainly."""
    token, rival = compared["models"]["token"], compared["models"]["sentence"]
    never = float("inf")
    higher = [a > b for a, b in zip(token["best_by_seed"], rival["best_by_seed"], strict=True)]
    faster = [
        (never if a is None else a) < (never if b is None else b)
        for a, b in zip(token["reach_steps"], rival["reach_steps"], strict=True)
    ]
    steadier = [token[name] < rival[name] for name in ("seed_std", "wobble") if token[name] is not None]
    lines = [
        f"higher: {_verdict(higher, 'seeds')} (kept checkpoint {_mean(token['sentence_auc'])} "
        f"against {_mean(rival['sentence_auc'])})",
        f"faster: {_verdict(faster, 'seeds')} (steps to the rival's best, {compared['rival_best']:.3f}: "
        f"{_reached(token['reach_steps'])} against {_reached(rival['reach_steps'])})",
        f"steadier: {_verdict(steadier, 'measures')} (std over seeds {digits(token['seed_std'])} against "
        f"{digits(rival['seed_std'])}, wobble {digits(token['wobble'])} against {digits(rival['wobble'])})",
    ]
    if rival["collapsed"]:
        lines.append(f"the rival collapsed with {rival['collapsed']} of {rival['seeds']} seeds: no fair comparison")
    return lines


def _verdict(holds: Sequence[bool], of: str) -> str:
    if not holds:
        return "not measured"
    word = "yes" if all(holds) else "no" if not any(holds) else "mixed"
    return f"{word}, {sum(holds)} of {len(holds)} {of}"


def _seeds(recipe: Recipe, arguments: argparse.Namespace) -> list[int]:
    return [recipe.seed + i for i in range(arguments.seeds)]


def _described(row: dict[str, Any]) -> str:
    """A setting as it differs from the paper's."""
    paper = PAPER[row["kind"]]
    return ", ".join(f"{name} {value}" for name, value in row["changes"].items() if paper.get(name) != value)


def _aucs(row: dict[str, Any]) -> list[str]:
    return [_mean(row["auc"]), _mean(row["sentence_auc"])]


def _mean(value: dict[str, float | None]) -> str:
    return digits(value["mean"]) + ("" if value["std"] is None else f" ± {value['std']:.3f}")


def _reached(steps: Sequence[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in steps)


def _or_lowest(value: float | None) -> float:
    return -1.0 if value is None else value


def _publish(
    output: Path, name: str, heads: list[str], cells: list[list[str]], lines: Sequence[str], numbers: dict[str, Any]
) -> None:
    """The table on stdout and in `name`.md with the lines below it; the numbers in `name`.json."""
    text = "\n".join([Table(heads, cells).markdown(), *(f"- {line}" for line in lines), ""])
    print(text)
    write_text(output / f"{name}.md", text)
    write_json(output / f"{name}.json", numbers)


STUDIES: dict[str, Callable[[Recipe, Data, argparse.Namespace, Path], None]] = {
    "search": search,
    "curves": curves,
    "ablation": ablation,
}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output", type=Path, required=True, help="folder for trials, tables and charts")
    parser.add_argument("--seeds", type=int, default=3, help="seeds from the recipe's on")
    parser.add_argument("--max_rows", type=int, help="random labelled responses of each split, for a quick trial")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="search")
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 8], help="search")
    parser.add_argument("--finalists", type=int, default=4, help="search: settings with all seeds; 0: every one")
    parser.add_argument("--evals_per_epoch", type=int, default=8, help="curves and ablation")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], help="ablation"
    )
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side, on CPUs")
    own, others = parser.parse_known_args(arguments)
    if min(own.seeds, own.workers) < 1:
        parser.error("--seeds and --workers must be at least 1")
    return own, parse_recipe("reward", others)[0]


def main(arguments: Sequence[str]) -> None:
    try:
        own, recipe = parse(arguments)
        own.output.mkdir(parents=True, exist_ok=True)
        STUDIES[own.study](recipe, load_data(recipe, own.max_rows), own, own.output)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
