"""Numbers of metrics.json in words: cells, the verdict, the cautions, the Markdown summary.

A number that was not measured is written "not measured", never 0. Verdicts are computed from intervals only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tppo.core.show import NOT_MEASURED, interval, number, p_text, signed_number
from tppo.core.stages import BASELINES, DISPLAY
from tppo.core.stats import FEW_USERS, Estimate, estimate, verdict
from tppo.evaluate.compare import POOLED, Metrics
from tppo.evaluate.metrics import BY_NAME, FORM, KNOWN, RELEVANCE, SECOND, TRUTH, Metric

SCOPES = {POOLED: "Both evaluation sets", "eval1": "eval1: same period", "eval2": "eval2: later in time"}
SHORT = {"an improvement": "better", "worse": "worse", "higher": "higher", "lower": "lower"}
TONES = {
    "an improvement": "good",
    "worse": "bad",
    "no difference shown": "flat",
    NOT_MEASURED: "none",
    "higher": "flat",
    "lower": "flat",
}
# A model that moves this many nats per response from the SFT model is far from what the log taught it.
FAR_NATS = 10.0
DIVERSITY_LOSS = 0.1
RL_WINDOW = 5
"""Updates averaged for the start and the end of an RL run: one rollout is a small sample."""
RL_COLUMNS = (
    ("reward_mean", "reward"),
    ("reward_std", "reward std"),
    ("token_relevance", "relevance by token RM"),
    ("sentence_reward_mean", "relevance by sentence RM"),
    ("kl", "KL, nats a response"),
    ("entropy", "entropy"),
    ("response_length", "tokens"),
    ("queries", "queries"),
    ("unparseable", "unparseable"),
    ("explained_variance", "explained variance"),
    ("seconds", "seconds an update"),
)
DPO_COLUMNS = (
    ("loss", "loss"),
    ("reward_margin", "reward margin"),
    ("reward_accuracy", "pairs in the right order"),
    ("chosen_reward", "chosen reward"),
    ("rejected_reward", "rejected reward"),
)
AGAINST = {
    "relevant_targets": "relevant to what the user really searched next",
    "relevant_history": "relevant to the history",
}


def shift(estimate: Estimate, metric: Metric) -> str:
    """ "+6.3 points [1.2, 11.0]"."""
    if estimate.value is None:
        return NOT_MEASURED
    points = " points" if metric.unit == "rate" else ""
    shown = interval(estimate, metric.unit, signed=True)
    return f"{signed_number(estimate.value, metric.unit)}{points} {shown or '(interval not measured)'}"


def second_measures(headline: str) -> list[str]:
    """The second judge's measures of what the headline measures: its verdicts, and its score."""
    return [f"second_{headline}", f"second_sentence_score_{headline.removeprefix('relevant_')}"]


def verdicts(metrics: Metrics, scope: str) -> list[dict[str, Any]]:
    """One entry per pair of models: the claim, its numbers, and what the other measures say."""
    headline, check = BY_NAME[metrics.data["headline"]], BY_NAME[metrics.data["check"]]
    rubric = headline.name.removeprefix("relevant_")
    entries = []
    for model, than in metrics.pairs(scope):
        difference = metrics.difference(scope, model, than, headline.name)
        outcome = verdict(difference)
        wins = metrics.wins(scope, model, than, rubric)
        other = metrics.difference(scope, model, than, check.name)
        others = [("Check, " + AGAINST[check.name], shift(other, check), verdict(other))]
        for name, what in zip(second_measures(headline.name), ("", ", score"), strict=True):
            second = metrics.difference(scope, model, than, name)
            if second.value is not None:
                label = f"Second judge, {AGAINST[headline.name]}{what}"
                others.append((label, shift(second, BY_NAME[name]), verdict(second)))
        known = ("known_words", "known_queries") if metrics.knows_truth else ()
        for name in (*known, "hit", "token_f1"):
            found = metrics.difference(scope, model, than, name)
            others.append((f"{BY_NAME[name].label}, no judge", shift(found, BY_NAME[name]), verdict(found)))
        entries.append(
            {
                "model": model,
                "than": than,
                "title": f"{DISPLAY[model]} minus {DISPLAY[than]}",
                "shift": shift(difference, headline),
                "outcome": outcome,
                "tone": TONES[outcome],
                "win": None if wins is None or wins["win"] is None else wins,
                "others": [(label, text, said, TONES[said]) for label, text, said in others],
            }
        )
    return entries


def lead(metrics: Metrics, scope: str) -> list[str]:
    """The first sentences of the report: what the intervals allow to claim, then the shares themselves."""
    headline = metrics.data["headline"]
    against = AGAINST[headline]
    shares = []
    for model in metrics.policies[::-1]:
        estimate = metrics.cell(scope, model, headline)
        value = NOT_MEASURED if estimate.value is None else f"{number(estimate.value, 'rate')}%"
        shares.append(f"{DISPLAY[model]} {value} {interval(estimate, 'rate')}".strip())
    sentences = []
    for outcome, words in (
        ("an improvement", "is better than"),
        ("worse", "is worse than"),
        ("no difference shown", "shows no difference from"),
    ):
        for model in metrics.policies[::-1]:
            than = [e["than"] for e in verdicts(metrics, scope) if e["model"] == model and e["outcome"] == outcome]
            if than:
                sentences.append(f"{DISPLAY[model]} {words} {_listed([DISPLAY[name] for name in than])}.")
    if metrics.knows_truth:
        sentences += _known_truth(metrics, scope)
    return [*sentences, *baseline_verdicts(metrics, scope), f"Answers {against}: {', '.join(shares)}."]


def _known_truth(metrics: Metrics, scope: str) -> list[str]:
    """What the synthetic log itself says of each pair, with no judge between."""
    sentences = []
    for model, than in metrics.pairs(scope):
        said = [
            f"{BY_NAME[name].label.lower()} {shift(found, BY_NAME[name])} ({verdict(found)})"
            for name in ("known_words", "known_queries")
            if (found := metrics.difference(scope, model, than, name)).value is not None
        ]
        sentences.append(f"By what the synthetic log knows, {DISPLAY[model]} minus {DISPLAY[than]}: {', '.join(said)}.")
    return sentences


def baseline_verdicts(metrics: Metrics, scope: str) -> list[str]:
    """Which policies lose to a simple baseline, by the headline or without a judge; each interval excludes 0.

    SFT against its own best of n is left out: that is SFT with more samples.
    """
    sentences = []
    names = (metrics.data["headline"], "hit", "token_f1")
    for model in metrics.policies[::-1]:
        lost: dict[str, list[str]] = {}
        for policy, than in metrics.baseline_pairs(scope):
            if policy != model or (model, than) == ("sft", "best_of_n"):
                continue
            for name in names:
                if verdict(metrics.difference(scope, model, than, name)) == "worse":
                    lost.setdefault(DISPLAY[than], []).append(BY_NAME[name].label)
        if lost:
            said = "; ".join(f"{baseline} ({', '.join(labels)})" for baseline, labels in lost.items())
            sentences.append(f"{DISPLAY[model]} loses to a simple baseline: {said}.")
    if not sentences and metrics.baseline_pairs(scope):
        sentences = [
            f"No model is shown to lose to a simple baseline ({_listed([DISPLAY[b] for b in metrics.baselines])})."
        ]
    return sentences


def cautions(metrics: Metrics, scope: str, final_kl: dict[str, float | None]) -> list[str]:
    """What a reader has to know before acting on the verdict; each computed from the numbers."""
    notes: list[str] = []
    headline = metrics.data["headline"]
    for model in [name for name in metrics.policies[::-1] if name != "sft"]:
        notes += _model_cautions(metrics, scope, model)
        kl = final_kl.get(model)
        if kl is not None and kl > FAR_NATS:
            notes.append(f"{DISPLAY[model]} ended {kl:.1f} nats per response away from SFT, which is far.")
    users = metrics.cell(scope, "sft", headline).users
    if users < FEW_USERS:
        notes.append(f"Only {users} users were evaluated: intervals over so few users are too narrow.")
    for judge, prefix in (("The judge", ""), ("The second judge", "second_")):
        counted = {prefix + rubric for rubric in ("targets", "history")}
        counts = [
            row["count"] for row in metrics.data["abstained"] if row["scope"] == scope and row["rubric"] in counted
        ]
        if sum(counts):
            notes.append(f"{judge} abstained {sum(counts)} times; those answers are left out of its numbers.")
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
    ours = metrics.cell(scope, model, "distinct_2").value
    theirs = metrics.cell(scope, "sft", "distinct_2").value
    if ours is not None and theirs and ours < (1 - DIVERSITY_LOSS) * theirs:
        notes.append(
            f"{title} is less varied than SFT: {number(ours, 'rate')}% of its word pairs are distinct, "
            f"SFT's {number(theirs, 'rate')}%."
        )
    gained = change(metrics.data["headline"])[0] == "an improvement"
    confirmed = any(change(name)[0] == "an improvement" for name in ("hit", "token_f1"))
    if gained and not confirmed:
        notes.append(f"{title}'s gain over SFT is the judge's: hit and word F1, which need no judge, do not show it.")
    if gained and change(metrics.data["check"])[0] == "worse":
        notes.append(f"{title} gains in the headline but loses {AGAINST[metrics.data['check']]}.")
    return notes


def summary_markdown(metrics: Metrics, facts: Sequence[tuple[str, str]]) -> str:
    """The tables of the report in Markdown: numbers only, no text of the log, so it may be shared."""
    scope = metrics.scopes[0]
    lines = ["# Evaluation", "", *lead(metrics, scope), ""]
    lines += [f"- {name}: {value}" for name, value in facts]
    for part in metrics.scopes:
        second = [("Relevance by the second judge", SECOND)] if metrics.data.get("second_judge") else []
        known = [("True relevance, known of the synthetic log", KNOWN)] if metrics.knows_truth else []
        groups = (("Relevance", RELEVANCE), *second, *known, ("True next queries", TRUTH), ("Form", FORM))
        for title, group in groups:
            lines += ["", f"## {title}, {SCOPES[part]}", "", *_markdown_table(metrics, part, group)]
        lines += ["", f"## Differences, {SCOPES[part]}", ""]
        lines += ["| | headline | check | hit | word F1 |", "|---|---|---|---|---|"]
        for model, than in [*metrics.pairs(part), *metrics.baseline_pairs(part)]:
            cells = [
                shift(metrics.difference(part, model, than, name), BY_NAME[name])
                for name in (metrics.data["headline"], metrics.data["check"], "hit", "token_f1")
            ]
            lines.append(f"| {DISPLAY[model]} minus {DISPLAY[than]} | {' | '.join(cells)} |")
        lines += [
            "",
            f"## Win, tie, lose, {SCOPES[part]}",
            "",
            "| | against | by | win | tie | lose | win minus lose, points | votes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in shown_wins(metrics, part):
            shares = " | ".join(number(row[key], "rate") for key in ("win", "tie", "lose"))
            votes = votes_note(row) if row["by"] == "vote" else ""
            net = estimate(row["net"])
            shown = f"{signed_number(net.value, 'rate')} {interval(net, 'rate', signed=True)}".strip()
            pair = f"{DISPLAY[row['model']]} vs {DISPLAY[row['than']]}"
            lines.append(f"| {pair} | {row['rubric']} | {row['by']} | {shares} | {shown} | {votes} |")
    return "\n".join([*lines, ""])


def shown_wins(metrics: Metrics, scope: str) -> list[dict[str, Any]]:
    """The win-tie-lose rows of a scope; against baselines under the headline's rubric only."""
    rubric = metrics.data["headline"].removeprefix("relevant_")
    return [
        row
        for row in metrics.data["wins"]
        if row["scope"] == scope and (row["than"] not in BASELINES or row["rubric"] == rubric)
    ]


def votes_note(row: dict[str, Any]) -> str:
    """Beside a win-tie-lose row by vote: who voted, how often the two orders disagreed, and how often nobody knew."""
    flips = number(row["flip_rate"], "rate") + ("" if row["flip_rate"] is None else "%")
    abstained = f"; {row['abstained']} abstentions left out" if row["abstained"] else ""
    corrected = row["net"].get("p_holm")  # of a study
    p = "" if corrected is None else f"; corrected p {p_text(corrected)}"
    return f"{row['judge']}; orders disagree: {flips} of {row['asked']} asked{abstained}{p}"


def training_markdown(
    costs: Sequence[dict[str, Any]],
    reward_best: dict[str, dict[str, Any]],
    rl: dict[str, list[dict[str, Any]]],
    dpo: Sequence[dict[str, Any]],
) -> str:
    """How the models came to be, in Markdown: time and memory, reward models, first and last updates of RL.

    Args:
        costs: rows {stage, seconds, memory}.
        reward_best: held-out metrics of the kept checkpoint of each reward model, by kind.
        rl: rows of metrics.jsonl by algorithm.
        dpo: rows of DPO's metrics.jsonl.
    """
    lines = ["## Time and memory", "", "| stage | seconds | peak memory, MiB |", "|---|---|---|"]
    lines += [f"| {row['stage']} | {row['seconds']:.0f} | {row['memory']} |" for row in costs]
    lines += ["", "## Reward models on held-out users, kept checkpoint", "", "| | step | token AUC | sentence AUC |"]
    lines += ["|---|---|---|---|"]
    for kind, best in reward_best.items():
        cells = [_digits(best.get(name)) for name in ("token_auc", "sentence_auc")]
        lines.append(f"| {kind} | {best.get('step')} | {' | '.join(cells)} |")
    if rl:
        lines += ["", f"## RL, mean of the first and the last {RL_WINDOW} updates", ""]
        lines += [f"| | {' | '.join(label for _, label in RL_COLUMNS)} |", "|---" * (len(RL_COLUMNS) + 1) + "|"]
    for model, rows in rl.items():
        for name, part in (("first", rows[:RL_WINDOW]), ("last", rows[-RL_WINDOW:])):
            lines.append(_means_row(f"{DISPLAY[model]}, {name}", part, [key for key, _ in RL_COLUMNS]))
    if dpo:
        lines += ["", f"## DPO, mean of the first and the last {RL_WINDOW} steps, and held-out pairs at the end", ""]
        lines += [f"| | {' | '.join(label for _, label in DPO_COLUMNS)} |", "|---" * (len(DPO_COLUMNS) + 1) + "|"]
        steps, held_out = ([row for row in dpo if key in row] for key in ("loss", "eval_loss"))
        keys = [key for key, _ in DPO_COLUMNS]
        lines.append(_means_row("training, first", steps[:RL_WINDOW], keys))
        lines.append(_means_row("training, last", steps[-RL_WINDOW:], keys))
        lines.append(_means_row("held out", held_out[-1:], [f"eval_{key}" for key in keys]))
    return "\n".join([*lines, ""])


def _means_row(title: str, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    cells = [_digits(_mean([row[key] for row in rows if key in row])) for key in keys]
    return f"| {title} | {' | '.join(cells)} |"


def _markdown_table(metrics: Metrics, scope: str, group: Sequence[Metric]) -> list[str]:
    heads = [metric.label + (" %" if metric.unit == "rate" else "") for metric in group]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(group) + 1) + "|"]
    for model in metrics.data["models"]:
        cells = []
        for metric in group:
            estimate = metrics.cell(scope, model, metric.name)
            cells.append(f"{number(estimate.value, metric.unit)} {interval(estimate, metric.unit)}".strip())
        lines.append(f"| {DISPLAY[model]} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _digits(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
