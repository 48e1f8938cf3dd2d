"""The label check: do people, or another judge, say the same as the judge? (the paper's App. I)

The paper had 60 examples labelled by people and reports the raw agreement with its LLM judge: 91.18% of the
words, 80.95% of the sentences (= whole responses). Raw agreement alone flatters a judge when one answer is rare:
with one word in ten relevant, "never" agrees in 90%. So Cohen's kappa and the prevalence of both sides stand
beside it.

`tppo agreement` has three actions: `export` a blind sheet, `page` to fill it in by clicking (both `tppo.judge.sheet`),
`compare` the answers with the labels, and with another judge's. All pairs of raters are compared, so two people's
answers tell how well people agree at all: no judge can be expected to do better.

Questions one side did not answer (abstained, judged whole responses only, left empty) are counted and left out.

Intervals: 95%, bootstrap with responses as clusters (`tppo.core.stats`), because the words of
one response are not independent. Several responses to one user count as independent; with many of them
the intervals are too narrow.

Shapes: N questions, B draws; 4 cells of a confusion table in the order of CELLS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from tppo.core.common import UserError, console, stream_seed
from tppo.core.config import Agreement, Recipe
from tppo.core.files import write_json
from tppo.core.run import RunFolder
from tppo.core.show import Table, with_interval
from tppo.core.stats import FEW_USERS, ClusterBootstrap, IntervalEstimate, percentile_interval
from tppo.core.tables import load_examples
from tppo.judge.sheet import (
    SHEET,
    Answer,
    Rater,
    export_sheet,
    make_key,
    read_judge,
    read_key,
    read_person,
    serve_sheet,
)

RESULT = "agreement.json"
BOOTSTRAP_SAMPLES = 2000
"""Resamples of responses for the 95% intervals: with these the draw moves their ends by some 2% of the width."""
CELLS = ("both_relevant", "only_a_relevant", "only_b_relevant", "neither_relevant")


def raw_agreement(cells_4: np.ndarray) -> np.ndarray:
    """Share of questions with the same answer. (..., 4) -> (...); NaN without questions."""
    cells_4 = np.asarray(cells_4, float)
    return _divide(cells_4[..., 0] + cells_4[..., 3], cells_4.sum(-1))


def prevalence(cells_4: np.ndarray, side: int) -> np.ndarray:
    """Share of questions that rater `side` (0 = a, 1 = b) answered with relevant. (..., 4) -> (...)."""
    cells_4 = np.asarray(cells_4, float)
    return _divide(cells_4[..., 0] + cells_4[..., 1 + side], cells_4.sum(-1))


def cohen_kappa(cells_4: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two raters and two answers. (..., 4) -> (...).

    kappa = (po - pe) / (1 - pe), po the raw agreement, pe the agreement expected of independent raters with the
    same prevalences (Cohen, A coefficient of agreement for nominal scales, 1960). Written with counts, which for
    two answers is 2 (both neither - only_a only_b) over the sum of the crossed products of the margins: exact, and
    0/0 precisely when pe = 1, i.e. both raters gave one and the same answer to everything. That is NaN: there was
    nothing to agree on by chance or otherwise. Not `sklearn.metrics.cohen_kappa_score`: it takes one table at a time,
    and the bootstrap has thousands.
    """
    both, only_a, only_b, neither = np.moveaxis(np.asarray(cells_4, float), -1, 0)
    crossed = (both + only_a) * (only_a + neither) + (both + only_b) * (only_b + neither)
    return _divide(2 * (both * neither - only_a * only_b), crossed)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


@dataclass(frozen=True)
class QuestionAgreement:
    """Agreement of two raters on one kind of question (words, or whole responses)."""

    questions: int  # both were asked
    compared: int  # both answered; everything below but `missing` is about these
    responses: int  # they belong to: the clusters of the intervals
    missing: dict[str, dict[str, int]]  # for rater a and rater b, how many they did not answer, by reason
    confusion: dict[str, int]  # counts by CELLS
    agreement: IntervalEstimate
    kappa: IntervalEstimate
    prevalence: dict[str, IntervalEstimate]
    kappa_undefined_draws: int  # the interval of kappa leaves them out


def measure(
    answers_a: Sequence[Answer], answers_b: Sequence[Answer], responses: Sequence[str], draws: int, seed: int
) -> QuestionAgreement:
    """Compare answers to the same N questions; `responses` (N) names the response each belongs to."""
    questions = list(zip(answers_a, answers_b, responses, strict=True))
    compared = [(a, b, response) for a, b, response in questions if not isinstance(a, str) and not isinstance(b, str)]
    clusters = [response for *_, response in compared]
    cells_N4 = np.eye(len(CELLS))[[3 - 2 * a - b for a, b, _ in compared]]
    total_4 = cells_N4.sum(0)
    drawn_B4 = None
    if len(set(clusters)) > 1:
        bootstrap = ClusterBootstrap(clusters, draws, seed)
        drawn_B4 = bootstrap.drawn_totals(bootstrap.sums(cells_N4))

    def estimate(statistic: Callable[[np.ndarray], np.ndarray]) -> IntervalEstimate:
        value = float(statistic(total_4))
        if np.isnan(value):
            return IntervalEstimate(None, None, None)
        if drawn_B4 is None:
            return IntervalEstimate(value, None, None)
        return percentile_interval(value, statistic(drawn_B4), len(set(clusters)))

    def missing(answers: Sequence[Answer]) -> dict[str, int]:
        return dict(sorted(Counter(answer for answer in answers if isinstance(answer, str)).items()))

    return QuestionAgreement(
        questions=len(questions),
        compared=len(compared),
        responses=len(set(clusters)),
        missing={"a": missing(answers_a), "b": missing(answers_b)},
        confusion=dict(zip(CELLS, map(int, total_4), strict=True)),
        agreement=estimate(raw_agreement),
        kappa=estimate(cohen_kappa),
        prevalence={"a": estimate(lambda c: prevalence(c, 0)), "b": estimate(lambda c: prevalence(c, 1))},
        kappa_undefined_draws=0 if drawn_B4 is None else int(np.isnan(cohen_kappa(drawn_B4)).sum()),
    )


@dataclass(frozen=True)
class PairAgreement:
    """Two raters. `only_a`, `only_b`: responses that only one of them has; `items`: those that both have."""

    a: str
    b: str
    items: int
    only_a: int
    only_b: int
    words: QuestionAgreement
    sentences: QuestionAgreement


def compare_raters(a: Rater, b: Rater, draws: int, seed: int) -> PairAgreement:
    """Join two raters by response and compare their words and sentences.

    Raises:
        UserError: they have no response in common, or other texts under the same example and sample.
    """
    shared = sorted(a.judged.keys() & b.judged.keys())
    if not shared:
        raise UserError(f"{a.source} and {b.source} have no response in common: they belong to different samples")
    ones, others = [a.judged[key] for key in shared], [b.judged[key] for key in shared]
    for (example_id, sample), one, other in zip(shared, ones, others, strict=True):
        if one.response != other.response:
            raise UserError(
                f"{a.source} and {b.source} hold different responses for example {example_id}, sample {sample}: they "
                "judge different samples; compare labels of the same responses.parquet"
            )
    clusters = [f"{example_id}/{sample}" for example_id, sample in shared]
    of_words = [cluster for cluster, one in zip(clusters, ones, strict=True) for _ in one.words]
    words_a, words_b = ([answer for judged in side for answer in judged.words] for side in (ones, others))
    sentences_a, sentences_b = ([judged.sentence for judged in side] for side in (ones, others))
    words_seed, sentences_seed = (stream_seed(seed, "agreement", name) for name in ("words", "sentences"))
    return PairAgreement(
        a=a.name,
        b=b.name,
        items=len(shared),
        only_a=len(a.judged) - len(shared),
        only_b=len(b.judged) - len(shared),
        words=measure(words_a, words_b, of_words, draws, words_seed),
        sentences=measure(sentences_a, sentences_b, clusters, draws, sentences_seed),
    )


def run_action(recipe: Recipe) -> None:
    """`tppo agreement`: export, page or compare."""
    run, settings = RunFolder(recipe), recipe.agreement
    folder = run.path("agreement")
    if settings.action == "page":
        serve_sheet(folder, settings)
        return
    labels = Path(settings.labels) if settings.labels else run.require_for_task("label") / "labels.parquet"
    if settings.action == "compare":
        compare(settings, recipe.seed, labels, folder)
        return
    examples = load_examples(run.require("prepare"))
    key = make_key(labels, settings.rubric, settings.examples, recipe.seed, examples)
    path = export_sheet(folder, key)
    console.print(f"{len(key.items)} responses, {sum(len(item.words) for item in key.items)} words: {path}")
    console.print(
        "Fill in its column 'label' (1 relevant, 0 not) in a copy for each person, or with `tppo agreement "
        "--agreement.action page`; then --agreement.action compare"
    )


def compare(settings: Agreement, seed: int, labels: Path, folder: Path) -> None:
    """Compare every pair of raters; prints a table and writes agreement.json."""
    draws = BOOTSTRAP_SAMPLES
    raters = _raters(settings, labels, folder)
    pairs = [compare_raters(a, b, draws, seed) for a, b in combinations(raters, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    sources = [{"name": r.name, "kind": r.kind, "source": str(r.source), "sha256": r.sha256} for r in raters]
    found = {"rubric": settings.rubric, "seed": seed, "bootstrap_samples": draws, "raters": sources}
    write_json(folder / RESULT, found | {"pairs": [asdict(pair) for pair in pairs]})
    for pair in pairs:
        print(pair_table(pair).markdown())
    console.print(f"written: {folder / RESULT}", soft_wrap=True)


def _raters(settings: Agreement, labels: Path, folder: Path) -> list[Rater]:
    """The judge, the other judge if there is one, and the people; judges cut to the sheet when people are there."""
    raters = [read_judge(labels, settings.rubric)]
    if settings.other:
        raters.append(read_judge(Path(settings.other), settings.rubric))
        if raters[0].sha256 == raters[1].sha256:
            raise UserError(
                f"agreement.other {settings.other} is the same file as {labels}: give another judge's labels"
            )
    if settings.answers or not settings.other:
        key = read_key(folder)
        if key.rubric != settings.rubric:
            raise UserError(
                f"the sheet was exported for rubric '{key.rubric}', not '{settings.rubric}': set agreement.rubric to it"
            )
        if key.labels_sha256 != raters[0].sha256:
            raise UserError(
                f"the sheet was exported from {key.labels} with SHA-256 {key.labels_sha256[:12]}, but {labels} has "
                f"{raters[0].sha256[:12]}: give that file in --agreement.labels (and these labels in --agreement.other)"
            )
        paths = [Path(path) for path in settings.answers] or [folder / SHEET]
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"agreement.answers names a file twice: {', '.join(map(str, paths))}")
        wanted = {item.key for item in key.items}
        raters = [replace(r, judged={k: found for k, found in r.judged.items() if k in wanted}) for r in raters]
        raters += [read_person(path, key) for path in paths]
    # Raters that share a name (two sheet.csv, one judge at two thresholds) get their path behind it.
    counts = Counter(rater.name for rater in raters)
    return [replace(r, name=f"{r.name} ({r.source})") if counts[r.name] > 1 else r for r in raters]


def pair_table(pair: PairAgreement) -> Table:
    """What was measured of words and sentences, and what the reader has to know of it."""
    columns, notes = [], []
    if pair.only_a or pair.only_b:
        notes.append(f"responses that only a has: {pair.only_a}, only b: {pair.only_b}; left out")
    for name, found in (("words", pair.words), ("sentences", pair.sentences)):
        undefined = bool(found.compared) and found.kappa.value is None
        kappa = "undefined" if undefined else with_interval(found.kappa)
        agree, *relevant = (with_interval(share, "rate") for share in (found.agreement, *found.prevalence.values()))
        columns.append([f"{found.compared}/{found.questions}", agree, kappa, *relevant])
        for side, missing in found.missing.items():
            if missing:
                reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in missing.items())
                notes.append(f"{name}, {side}: {reasons}; left out, not counted as 0")
        if undefined:
            notes.append(f"{name}: kappa is undefined, since both gave the same answer to every question")
        elif draws := found.kappa_undefined_draws:
            notes.append(f"{name}: kappa's interval leaves out {draws} draws where it is undefined")
        if 0 < found.responses < FEW_USERS:
            notes.append(f"{name}: only {found.responses} responses, so the intervals are a little narrow")
    return Table(
        ("", "words", "sentences"),
        list(zip(("compared", "agree %", "kappa", "relevant % a", "relevant % b"), *columns, strict=True)),
        title=f"{pair.a} (a) and {pair.b} (b): {pair.items} responses",
        note="\n".join(f"- {note}" for note in notes),
    )
