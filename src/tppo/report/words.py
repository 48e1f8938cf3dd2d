"""What metrics.json allows to say: the verdict, the cautions, and the tables that the page and the summary share.

Verdicts are computed from intervals only: those of differences, which hold for all pairs of a table's column together
(`tppo.evaluate.compare`), so that a sentence, its interval and its corrected p-value never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from tppo.core.show import (
    NOT_MEASURED,
    Cell,
    Table,
    digits,
    interval,
    number,
    p_text,
    signed_number,
    with_interval,
)
from tppo.core.stages import BASELINES, DISPLAY, REFERENCES
from tppo.core.stats import FEW_USERS, Estimate, estimate, verdict
from tppo.evaluate.compare import POOLED, Metrics
from tppo.evaluate.metrics import (
    AS_THE_PAPER,
    ASKED,
    BESIDE,
    BY_JUDGE,
    BY_NAME,
    CORPUS,
    FORM,
    KL,
    KNOWN,
    TRUTH,
    Metric,
)
from tppo.report.headline import AGAINST, NOT_ASKED, shares

SCOPES = {POOLED: "Both evaluation sets", "eval1": "eval1: same period", "eval2": "eval2: later in time",
          "reward_eval": "Users of the reward models' check"}  # fmt: skip
SHORT = {"an improvement": "better", "worse": "worse", "higher": "higher", "lower": "lower"}
TONES = {"an improvement": "good", "worse": "bad", "no difference shown": "flat", NOT_MEASURED: "none",
         "higher": "flat", "lower": "flat"}  # fmt: skip
FAR_NATS = 10.0
"""A model that moves this many nats per response from the SFT model is far from what the log taught it."""
DIVERSITY_LOSS = 0.1
WITHOUT_JUDGE = ("hit", "token_f1")
"""Measures that confirm a judge's."""

RL_WINDOW = 5
"""Updates averaged for the start and the end of an RL run: one rollout is a small sample."""
RL_COLUMNS = {
    "reward_mean": "reward",
    "reward_std": "reward std",
    "token_relevance": "relevance by token RM",
    "sentence_reward_mean": "relevance by sentence RM",
    "kl": "KL, nats a response",
    "entropy": "entropy",
    "response_length": "tokens",
    "queries": "queries",
    "unparseable": "unparseable",
    "explained_variance": "explained variance",
    "seconds": "seconds an update",
}
DPO_COLUMNS = {
    "loss": "loss",
    "reward_margin": "reward margin",
    "reward_accuracy": "pairs in the right order",
    "chosen_reward": "chosen reward",
    "rejected_reward": "rejected reward",
}


def shift(estimate: Estimate, metric: Metric) -> str:
    """ "+6.3 points [1.2, 11.0]"."""
    if estimate.value is None:
        return NOT_MEASURED
    points = " points" if metric.unit == "rate" else ""
    shown = interval(estimate, metric.unit, signed=True)
    return f"{signed_number(estimate.value, metric.unit)}{points} {shown or '(interval not measured)'}"


def display(pair: tuple[str, str]) -> str:
    return f"{DISPLAY[pair[0]]} minus {DISPLAY[pair[1]]}"


def second_measures(metrics: Metrics) -> list[tuple[str, str]]:
    """Each second judge's measures of what the headline measures, as (measure, judge): its verdicts, and its score."""
    score = f"sentence_score_{metrics.rubric}"
    return [(name, judge) for judge in metrics.second_judges for name in (metrics.like_headline(judge), score)]


def verdicts(metrics: Metrics, scope: str) -> list[dict[str, Any]]:
    """What each pair's interval allows to claim, its numbers, and what the other measures say."""
    known = (metrics.true_words, "known_queries") if metrics.knows_truth else ()
    measures = [(f"Check, {AGAINST[metrics.data['check']]}", metrics.data["check"], "")]
    for name, judge in second_measures(metrics):
        said = AGAINST.get(name, f"{AGAINST[metrics.headline]}, score")
        measures.append((f"Second judge, {said}", name, judge))
    if metrics.counts_asked:
        paper = f"relevant_{metrics.rubric}"
        measures.append((AGAINST[paper].capitalize(), paper, ""))
    measures += [(f"{BY_NAME[name].label}, no judge", name, "") for name in (*known, *WITHOUT_JUDGE)]
    entries = []
    for model, than in metrics.pairs(scope):
        difference = metrics.difference(scope, model, than, metrics.headline)
        outcome, wins = verdict(difference), metrics.wins(scope, model, than, metrics.rubric)
        others = []
        for label, name, judge in measures:
            found = metrics.difference(scope, model, than, name, judge)
            if found.value is not None or not judge:
                said = verdict(found)
                others.append((label, shift(found, BY_NAME[name]), said, TONES[said]))
        entries.append(
            {
                "model": model,
                "than": than,
                "title": display((model, than)),
                "shift": shift(difference, BY_NAME[metrics.headline]),
                "outcome": outcome,
                "tone": TONES[outcome],
                "win": None if wins is None or wins["win"] is None else wins,
                "others": others,
            }
        )
    return entries


def lead(metrics: Metrics, scope: str) -> list[str]:
    """The first sentences of the report: what the intervals allow to claim, then the shares themselves."""
    sentences, said = [], verdicts(metrics, scope)
    for outcome, words in (
        ("an improvement", "is better than"),
        ("worse", "is worse than"),
        ("no difference shown", "shows no difference from"),
    ):
        for model in metrics.policies[::-1]:
            than = [DISPLAY[e["than"]] for e in said if (e["model"], e["outcome"]) == (model, outcome)]
            if than:
                sentences.append(f"{DISPLAY[model]} {words} {_listed(than)}.")
    if metrics.knows_truth:
        sentences += _known_truth(metrics, scope)
    return [*sentences, *baseline_verdicts(metrics, scope), *shares(metrics, scope)]


def _known_truth(metrics: Metrics, scope: str) -> list[str]:
    """What the synthetic log itself says of each pair, with no judge between."""
    sentences = []
    for pair in metrics.pairs(scope):
        said = [
            f"{BY_NAME[name].label.lower()} {shift(found, BY_NAME[name])} ({verdict(found)})"
            for name in (metrics.true_words, "known_queries")
            if (found := metrics.difference(scope, *pair, name)).value is not None
        ]
        sentences.append(f"By what the synthetic log knows, {display(pair)}: {', '.join(said)}.")
    return sentences


def baseline_verdicts(metrics: Metrics, scope: str) -> list[str]:
    """Which policies lose to a simple baseline, by the headline or without a judge; each interval excludes 0.

    SFT against its own best of n is left out: that is SFT with more samples.
    """
    sentences = []
    for model in metrics.policies[::-1]:
        lost: dict[str, list[str]] = {}
        for pair in metrics.baseline_pairs(scope):
            for name in (metrics.headline, *WITHOUT_JUDGE) if pair[0] == model and pair != ("sft", "best_of_n") else ():
                if verdict(metrics.difference(scope, *pair, name)) == "worse":
                    lost.setdefault(DISPLAY[pair[1]], []).append(BY_NAME[name].label)
        if lost:
            said = "; ".join(f"{baseline} ({', '.join(labels)})" for baseline, labels in lost.items())
            sentences.append(f"{DISPLAY[model]} loses to a simple baseline: {said}.")
    if not sentences and metrics.baseline_pairs(scope):
        names = _listed([DISPLAY[baseline] for baseline in metrics.baselines])
        sentences = [f"No model is shown to lose to a simple baseline ({names})."]
    return sentences


def cautions(metrics: Metrics, scope: str, final_kl: Mapping[str, float | None]) -> list[str]:
    """What a reader has to know before acting on the verdict; each computed from the numbers."""
    notes = [] if metrics.counts_asked else [NOT_ASKED]
    for model in [name for name in metrics.policies[::-1] if name != "sft"]:
        notes += _model_cautions(metrics, scope, model)
        kl = final_kl.get(model)
        if kl is not None and kl > FAR_NATS:
            notes.append(f"{DISPLAY[model]} ended {kl:.1f} nats per response away from SFT, which is far.")
    users = metrics.cell(scope, "sft", metrics.headline).users
    if users < FEW_USERS:
        notes.append(
            f"Only {users} users were evaluated: intervals over so few take it on trust that means are about normal."
        )
    for reader in ("", *metrics.second_judges):
        of = [row for row in metrics.data["abstained"] if (row["scope"], row["reader"]) == (scope, reader)]
        if count := sum(row["count"] for row in of):
            who = f"The second judge, {reader}," if reader else "The judge"
            notes.append(f"{who} abstained {count} times; those answers are left out of its numbers.")
    notes.append(_trainings(metrics.data.get("seeds", 1)))
    if metrics.data["judge_labelled_training"]:
        notes.append(
            "The judge here is the one whose labels trained the reward models, so relevance may be learnt to "
            "suit it. Hit and word F1 use no judge; trust a gain more when they agree."
        )
    return notes


def _trainings(seeds: int) -> str:
    if seeds == 1:
        return "Each model was trained once: intervals cover the choice of users, not the luck of a training run."
    return (
        f"Each model was tuned {seeds} times from one SFT model and one set of reward models: intervals cover the "
        "choice of users and the luck of the tuning, not that of SFT, labels and reward models."
    )


def _model_cautions(metrics: Metrics, scope: str, model: str) -> list[str]:
    def change(name: str) -> tuple[str, str]:
        metric, difference = BY_NAME[name], metrics.difference(scope, model, "sft", name)
        return verdict(difference, metric.better), shift(difference, metric)

    title, notes = DISPLAY[model], []
    for name, bad, words in (
        ("copied_queries", "worse", "repeats searches of the history more often than SFT"),
        ("copied_words", "higher", "takes more words from the history than SFT"),
        ("repeated_queries", "worse", "repeats itself more often than SFT"),
        ("queries_written", "lower", "writes fewer queries than SFT"),
        ("unparseable", "worse", "gives more unparseable answers than SFT"),
    ):
        outcome, text = change(name)
        if outcome == bad:
            notes.append(f"{title} {words}: {text}.")
    ours, theirs = (metrics.cell(scope, name, "distinct_2").value for name in (model, "sft"))
    if ours is not None and theirs and ours < (1 - DIVERSITY_LOSS) * theirs:
        notes.append(
            f"{title} is less varied than SFT: {number(ours, 'rate')}% of its word pairs are distinct, "
            f"SFT's {number(theirs, 'rate')}%."
        )
    gained = change(metrics.headline)[0] == "an improvement"
    if gained and not any(change(name)[0] == "an improvement" for name in WITHOUT_JUDGE):
        notes.append(f"{title}'s gain over SFT is the judge's: hit and word F1, which need no judge, do not show it.")
    if gained and change(metrics.data["check"])[0] == "worse":
        notes.append(f"{title} gains in the headline but loses in the check: {AGAINST[metrics.data['check']]}.")
    return notes


def scope_tables(metrics: Metrics, scope: str) -> dict[str, Any]:
    """The tables of one evaluation set, by what they show; `second` by judge."""

    def headline_first(group: Sequence[Metric]) -> list[Metric]:
        return sorted(group, key=lambda metric: not metric.name.endswith(metrics.rubric))

    beside = [BY_NAME[name] for name in BESIDE]
    paper = grid(metrics, scope, [*headline_first(AS_THE_PAPER), *beside], "Relevance as the paper counts")
    asked = grid(metrics, scope, [*headline_first(ASKED), *beside], "Relevance of what was asked for")
    return {
        "relevance": asked if metrics.counts_asked else paper,
        "paper": paper if metrics.counts_asked else None,
        "second": {
            judge: grid(metrics, scope, _measured(metrics, scope, judge), "Relevance by the second judge", judge)
            for judge in metrics.second_judges
        },
        "known": grid(metrics, scope, KNOWN, "True relevance, known of the synthetic log")
        if metrics.knows_truth
        else None,
        "truth": grid(metrics, scope, TRUTH, "True next queries"),
        "form": grid(metrics, scope, FORM[:4], "Form"),
        "variety": grid(metrics, scope, (*FORM[4:], *CORPUS), "Variety"),
        "differences": difference_table(metrics, scope),
        "wins": wins_table(metrics, scope),
    }


def _measured(metrics: Metrics, scope: str, judge: str) -> list[Metric]:
    """What a second judge was asked for; all where it abstained on everything."""
    found = [m for m in BY_JUDGE if metrics.cell(scope, "sft", m.name, judge).value is not None]
    return found or list(BY_JUDGE)


def head(metric: Metric, unit: str, reader: str = "") -> str:
    """The head of a column: what it holds, in which unit, and whether a second judge says so."""
    return f"{metric.label}{' (second judge)' if reader else ''}{f', {unit}' if metric.unit == 'rate' else ''}"


def grid(metrics: Metrics, scope: str, group: Sequence[Metric], title: str, reader: str = "") -> Table:
    """Every model by some measures."""
    rows = []
    for model in metrics.data["models"]:
        cells = [(metrics.cell(scope, model, metric.name, reader), metric.unit) for metric in group]
        row: list[Cell | str] = [Cell(number(cell.value, unit), interval(cell, unit)) for cell, unit in cells]
        rows.append([DISPLAY[model], *row])
    read = metrics.cell(scope, "sft", group[0].name, reader).examples
    return Table(
        ["Model", *(head(metric, "%", reader) for metric in group)],
        rows,
        f"{title}, {SCOPES[scope]}",
        f"By {reader}, on {read} examples." if reader else "",
        docs=["", *(metric.doc for metric in group)],
        series=metrics.data["models"],
        quiet=REFERENCES,
    )


def difference_table(metrics: Metrics, scope: str) -> Table:
    """Every pair of policies, and every policy and baseline, by the measures that matter most."""
    beside = [metric.name for metric in metrics.beside]
    names = (metrics.headline, metrics.data["check"], *WITHOUT_JUDGE, *beside)
    pairs = [*metrics.pairs(scope), *metrics.baseline_pairs(scope)]
    rows: list[list[Cell | str]] = []
    for pair in pairs:
        cells: list[Cell | str] = [display(pair)]
        for metric in (BY_NAME[name] for name in names):
            found = metrics.difference(scope, *pair, metric.name)
            outcome, signed = verdict(found, metric.better), signed_number(found.value, metric.unit)
            shown = interval(found, metric.unit, signed=True)
            cells.append(Cell(signed, shown, SHORT.get(outcome, ""), TONES[outcome]))
        rows.append(cells)
    heads = ["Pair", *(head(BY_NAME[name], "points") for name in names)]
    series, note = [pair[0] for pair in pairs], differences_note(metrics, scope)
    return Table(heads, rows, f"Differences, {SCOPES[scope]}", note, series=series)


def together(metrics: Metrics, scope: str) -> str:
    """What an interval of a difference holds for: "3 pairs of models"."""
    pairs, baselines = metrics.pairs(scope), metrics.baseline_pairs(scope)
    said = f"{len(pairs)} pair{'s' if len(pairs) != 1 else ''} of models"
    return f"{said} (apart from them for all {len(baselines)} of a model and a simple baseline)" if baselines else said


def differences_note(metrics: Metrics, scope: str) -> str:
    """What the intervals of a table of differences mean."""
    return (
        f"Intervals hold with 95% for all {together(metrics, scope)} in a column together (Bonferroni): one that "
        "leaves 0 out is a verdict, and has a corrected p below 0.05."
    )


def intervals_fact(metrics: Metrics) -> tuple[str, str]:
    """How intervals were made, for the head of a summary."""
    over = "users" if metrics.data.get("seeds", 1) == 1 else "users and seeds"
    return "intervals", f"95%, t over {over}; those of differences for all pairs of a column together (Bonferroni)"


def distance_tables(metrics: Metrics) -> list[Table]:
    """How far each policy went from "sft", and for what; none where no KL was measured on the evaluation users."""
    scope, headline = metrics.scopes[0], BY_NAME[metrics.headline]
    rows = []
    for model in metrics.policies:
        kl = metrics.cell(scope, model, KL.name)
        if kl.value is None:
            continue
        gain = metrics.difference(scope, model, "sft", headline.name)
        rates: list[float | None] = [None, None]
        if gain.value is not None and kl.value > 0:
            rates = [100 * gain.value / distance for distance in (kl.value, math.sqrt(kl.value))]
        shown = [with_interval(kl, KL.unit), shift(gain, headline), *map(number, rates)]
        rows.append([DISPLAY[model], *shown, str(kl.examples)])
    note = (
        "KL(policy || SFT) in nats per response at the prompts of the evaluation users, mean log ratio of responses "
        "sampled anew at temperature 1; interval over users, and seeds where there are several. The headline's gain "
        "over SFT beside it, and the gain for a nat, which flatters a policy that stayed near since the first nats are "
        "the cheapest, and for the square root of the nats, against which Gao et al. (ICML 2023) fit gains."
    )
    gained = f"{headline.label}, over SFT"
    heads = ["Model", KL.label, gained, "Points for a nat", "Points for √nats", "Responses"]
    return [Table(heads, rows, "Distance from SFT on the evaluation users", note, "distance")] if rows else []


def wins_table(metrics: Metrics, scope: str, bars: bool = False) -> Table:
    """Win-tie-lose; against baselines under the headline's rubric only.

    Args:
        bars: with a bar of the three shares, for a page.
    """
    shown = [
        row
        for row in metrics.data["wins"]
        if row["scope"] == scope and (row["than"] not in BASELINES or row["rubric"] == metrics.rubric)
    ]
    rows: list[list[Cell | str]] = []
    for row in shown:
        by_vote = row["by"] == "vote"
        how = {"asked": "", "scores": ", as the paper counts", "vote": ", by vote"}[row["by"]]
        against = {"targets": "next queries", "history": "history"}[row["rubric"]] + how
        net, shares = estimate(row["net"]), [row[key] for key in ("win", "tie", "lose")]
        cells: list[Cell | str] = [
            f"{DISPLAY[row['model']]} against {DISPLAY[row['than']]}",
            Cell(against, votes_note(row) if by_vote else ""),
            *(Cell(number(share, "rate")) for share in shares),
            Cell(signed_number(net.value, "rate"), interval(net, "rate", signed=True)),
        ]
        rows.append([*cells[:2], _bar(shares), *cells[2:]] if bars else cells)
    heads = ["Pair", "Judged by", "Win, %", "Tie, %", "Lose, %", "Win minus lose, points"]
    return Table(
        [*heads[:2], "win · tie · lose", *heads[2:]] if bars else heads,
        rows,
        f"Win, tie, lose, {SCOPES[scope]}",
        "Intervals of win minus lose hold with 95% for all pairs that are judged alike together (Bonferroni).",
        series=[row["model"] for row in shown],
    )


def _bar(shares: Sequence[float | None]) -> Cell:
    found = [share for share in shares if share is not None]
    if len(found) < 3:
        return Cell()
    said = ", ".join(f"{name} {100 * share:.1f}%" for name, share in zip(("win", "tie", "lose"), found, strict=True))
    parts = Markup("").join(
        Markup('<span class="{}" style="width:{}%"></span>').format(name, f"{100 * share:.2f}")
        for name, share in zip("wtl", found, strict=True)
    )
    return Cell(Markup('<div class="wtl" role="img" aria-label="{}">{}</div>').format(said, parts))


def votes_note(row: dict[str, Any]) -> str:
    """Beside a win-tie-lose row by vote: who voted, how often the two orders disagreed, and how often nobody knew."""
    flips = number(row["flip_rate"], "rate") + ("" if row["flip_rate"] is None else "%")
    abstained = f"; {row['abstained']} abstentions left out" if row["abstained"] else ""
    corrected = row["net"]["p_corrected"]
    p = "" if corrected is None else f"; corrected p {p_text(corrected)}"
    return f"{row['judge']}; orders disagree: {flips} of {row['asked']} asked{abstained}{p}"


def summary_markdown(metrics: Metrics, facts: Sequence[tuple[str, str]]) -> str:
    """The tables of the report in Markdown: numbers only, no text of the log, so it may be shared."""
    lines = [
        "# Evaluation",
        "",
        *lead(metrics, metrics.scopes[0]),
        "",
        *(f"- {name}: {value}" for name, value in facts),
    ]
    for scope in metrics.scopes:
        found = scope_tables(metrics, scope)
        tables = [found["relevance"], found["paper"], *found["second"].values(), found["known"]]
        tables += [found[name] for name in ("truth", "form", "variety", "differences", "wins")]
        lines += ["", *(table.markdown() for table in tables if table)]
    return "\n".join([*lines, ""])


def training_tables(
    costs: Sequence[dict[str, Any]],
    reward_best: dict[str, dict[str, Any]],
    rl: dict[str, list[dict[str, Any]]],
    dpo: Sequence[dict[str, Any]],
) -> list[Table]:
    """How the models came to be: time and memory, reward models, first and last updates of RL, DPO.

    Args:
        costs: rows {stage, seconds, memory}.
        reward_best: held-out metrics of the kept checkpoint of each reward model, by kind.
        rl: rows of metrics.jsonl by algorithm.
        dpo: rows of DPO's metrics.jsonl.
    """
    time = [[row["stage"], f"{row['seconds']:.0f}", str(row["memory"])] for row in costs]
    aucs = ("token_auc", "sentence_auc")
    best = [[kind, str(b.get("step")), *(digits(b.get(name)) for name in aucs)] for kind, b in reward_best.items()]
    tables = [
        Table(["Stage", "Seconds", "Peak memory, MiB"], time, "Time and memory"),
        Table(["Model", "Step", "Token AUC", "Sentence AUC"], best, "Reward models on held-out users, kept checkpoint"),
    ]
    if rl:
        rows = [
            _means(f"{DISPLAY[model]}, {name}", part, RL_COLUMNS)
            for model, found in rl.items()
            for name, part in (("first", found[:RL_WINDOW]), ("last", found[-RL_WINDOW:]))
        ]
        title = f"RL, mean of the first and the last {RL_WINDOW} updates"
        tables.append(Table(["Policy", *RL_COLUMNS.values()], rows, title))
    if dpo:
        steps, held_out = ([row for row in dpo if key in row] for key in ("loss", "eval_loss"))
        rows = [
            _means("training, first", steps[:RL_WINDOW], DPO_COLUMNS),
            _means("training, last", steps[-RL_WINDOW:], DPO_COLUMNS),
            _means("held out", held_out[-1:], [f"eval_{key}" for key in DPO_COLUMNS]),
        ]
        title = f"DPO, mean of the first and the last {RL_WINDOW} steps, and held-out pairs at the end"
        tables.append(Table(["Part", *DPO_COLUMNS.values()], rows, title))
    return tables


def _means(title: str, rows: Sequence[dict[str, Any]], keys: Sequence[str] | Mapping[str, str]) -> list[str]:
    found = [[row[key] for row in rows if key in row] for key in keys]
    return [title, *(digits(fmean(values) if values else None) for values in found)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
