"""The label check: do people, or another judge, say the same as the judge? (the paper's App. I)

The paper had 60 examples labelled by people and reports the raw agreement with its LLM judge: 91.18% of the
words, 80.95% of the sentences (= whole responses). Raw agreement alone flatters a judge when one answer is rare:
with one word in ten relevant, "never" agrees in 90%. So Cohen's kappa and the prevalence of both sides stand
beside it.

`tppo agreement` has three actions: `export` a blind sheet (`tppo.judge.sheet`), `page` to fill it in by clicking
(`tppo.judge.sheet`), `compare` the answers with the labels, and with another judge's. All pairs of raters are
compared, so two people's answers tell how well people agree at all: no judge can be expected to do better.

Questions one side did not answer (abstained, judged whole responses only, left empty) are counted and left out.

Intervals: 95% percentile bootstrap with responses as clusters (`tppo.core.stats`), because the words of
one response are not independent. Several responses to one user count as independent; with many of them
the intervals are too narrow.

Shapes: N questions, B draws; 4 cells of a confusion table in the order of CELLS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tppo.core.common import UserError, console, stream_seed
from tppo.core.config import Recipe
from tppo.core.files import write_json
from tppo.core.run import RunFolder
from tppo.core.show import NOT_MEASURED, interval, number
from tppo.core.stats import FEW_USERS, ClusterBootstrap, IntervalEstimate, percentile_interval
from tppo.core.tables import load_examples
from tppo.judge.sheet import SHEET, Answer, Rater, SheetKey, export_sheet, make_key, read_judge, read_key, read_person

RESULT = "agreement.json"
BOOTSTRAP_SAMPLES = 2000
"""Resamples of responses for the 95% intervals: with these the draw moves their ends by some 2% of the width."""
CELLS = ("both_relevant", "only_a_relevant", "only_b_relevant", "neither_relevant")


def raw_agreement(cells_4: np.ndarray) -> np.ndarray:
    """Share of questions with the same answer. (..., 4) -> (...); NaN without questions."""
    both, only_a, only_b, neither = np.moveaxis(np.asarray(cells_4, float), -1, 0)
    return _divide(both + neither, both + only_a + only_b + neither)


def cohen_kappa(cells_4: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two raters and two answers. (..., 4) -> (...).

    kappa = (po - pe) / (1 - pe), po the raw agreement, pe the agreement expected of independent raters with the
    same prevalences (Cohen, A coefficient of agreement for nominal scales, 1960). Written with counts, which for
    two answers is 2 (both neither - only_a only_b) over the sum of the crossed products of the margins: exact, and
    0/0 precisely when pe = 1, i.e. both raters gave one and the same answer to everything. That is NaN: there was
    nothing to agree on by chance or otherwise.
    """
    both, only_a, only_b, neither = np.moveaxis(np.asarray(cells_4, float), -1, 0)
    crossed = (both + only_a) * (only_a + neither) + (both + only_b) * (only_b + neither)
    return _divide(2 * (both * neither - only_a * only_b), crossed)


def prevalence(cells_4: np.ndarray, side: int) -> np.ndarray:
    """Share of questions that rater `side` (0 = a, 1 = b) answered with relevant. (..., 4) -> (...)."""
    both, only_a, only_b, neither = np.moveaxis(np.asarray(cells_4, float), -1, 0)
    return _divide(both + (only_b if side else only_a), both + only_a + only_b + neither)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


@dataclass(frozen=True)
class QuestionAgreement:
    """Agreement of two raters on one kind of question (words, or whole responses).

    Attributes:
        questions: how many both were asked.
        compared: how many both answered; everything below is about these.
        responses: how many responses they belong to (the clusters of the intervals).
        missing: for rater a and rater b, how many they did not answer, by reason.
        confusion: counts by CELLS.
        kappa_undefined_draws: bootstrap draws in which kappa is undefined; its interval leaves them out.
    """

    questions: int
    compared: int
    responses: int
    missing: dict[str, dict[str, int]]
    confusion: dict[str, int]
    agreement: IntervalEstimate
    kappa: IntervalEstimate
    prevalence: dict[str, IntervalEstimate]
    kappa_undefined_draws: int


def measure(
    answers_a: Sequence[Answer], answers_b: Sequence[Answer], responses: Sequence[str], draws: int, seed: int
) -> QuestionAgreement:
    """Compare answers to the same N questions; `responses` (N) names the response each belongs to."""
    questions = list(zip(answers_a, answers_b, responses, strict=True))
    compared = [(a, b, response) for a, b, response in questions if not isinstance(a, str) and not isinstance(b, str)]
    cells_N4 = np.array([[a and b, a and not b, b and not a, not a and not b] for a, b, _ in compared], dtype=float)
    cells_N4 = cells_N4.reshape(-1, len(CELLS))
    total_4 = cells_N4.sum(0)
    clusters = [response for *_, response in compared]
    drawn_B4 = None
    if len(set(clusters)) > 1:
        bootstrap = ClusterBootstrap(clusters, draws, seed)
        drawn_B4 = bootstrap.drawn_totals(bootstrap.sums(cells_N4))

    def estimate(statistic: Callable[[np.ndarray], np.ndarray]) -> IntervalEstimate:
        value = float(statistic(total_4))
        if np.isnan(value):
            return IntervalEstimate(None, None, None)
        return (
            IntervalEstimate(value, None, None) if drawn_B4 is None else percentile_interval(value, statistic(drawn_B4))
        )

    return QuestionAgreement(
        questions=len(questions),
        compared=len(compared),
        responses=len(set(clusters)),
        missing={"a": _missing(answers_a), "b": _missing(answers_b)},
        confusion=dict(zip(CELLS, map(int, total_4), strict=True)),
        agreement=estimate(raw_agreement),
        kappa=estimate(cohen_kappa),
        prevalence={"a": estimate(lambda c: prevalence(c, 0)), "b": estimate(lambda c: prevalence(c, 1))},
        kappa_undefined_draws=0 if drawn_B4 is None else int(np.isnan(cohen_kappa(drawn_B4)).sum()),
    )


def _missing(answers: Sequence[Answer]) -> dict[str, int]:
    return dict(sorted(Counter(answer for answer in answers if isinstance(answer, str)).items()))


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
    for example_id, sample in shared:
        if a.judged[example_id, sample].response != b.judged[example_id, sample].response:
            raise UserError(
                f"{a.source} and {b.source} hold different responses for example {example_id}, sample {sample}: they "
                "judge different samples; compare labels of the same responses.parquet"
            )
    words: list[tuple[Answer, Answer, str]] = []
    sentences: list[tuple[Answer, Answer, str]] = []
    for key in shared:
        cluster, one, other = f"{key[0]}/{key[1]}", a.judged[key], b.judged[key]
        words += [(x, y, cluster) for x, y in zip(one.words, other.words, strict=True)]
        sentences.append((one.sentence, other.sentence, cluster))
    return PairAgreement(
        a=a.name,
        b=b.name,
        items=len(shared),
        only_a=len(a.judged) - len(shared),
        only_b=len(b.judged) - len(shared),
        words=_measure_columns(words, draws, stream_seed(seed, "agreement", "words")),
        sentences=_measure_columns(sentences, draws, stream_seed(seed, "agreement", "sentences")),
    )


def _measure_columns(rows: Sequence[tuple[Answer, Answer, str]], draws: int, seed: int) -> QuestionAgreement:
    return measure([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], draws, seed)


def run_action(recipe: Recipe) -> None:
    """`tppo agreement`: export, page or compare."""
    run = RunFolder(recipe)
    folder = run.path("agreement")
    settings = recipe.agreement
    if settings.action == "page":
        from tppo.judge.sheet import serve_sheet  # FastAPI, which the other actions do without

        serve_sheet(folder, settings)
    elif settings.action == "compare":
        compare(recipe, run, folder)
    else:
        examples = load_examples(run.require("prepare"))
        key = make_key(_labels_path(recipe, run), settings.rubric, settings.examples, recipe.seed, examples)
        path = export_sheet(folder, key)
        console.print(f"{len(key.items)} responses, {sum(len(item.words) for item in key.items)} words: {path}")
        console.print(
            "Fill in its column 'label' (1 relevant, 0 not) in a copy for each person, or with `tppo agreement "
            "--agreement.action page`; then --agreement.action compare"
        )


def _labels_path(recipe: Recipe, run: RunFolder) -> Path:
    return Path(recipe.agreement.labels) if recipe.agreement.labels else run.require("label") / "labels.parquet"


def compare(recipe: Recipe, run: RunFolder, folder: Path) -> None:
    """Compare every pair of raters; prints a table and writes agreement.json."""
    settings = recipe.agreement
    raters = _raters(recipe, _labels_path(recipe, run), folder)
    pairs = [compare_raters(a, b, BOOTSTRAP_SAMPLES, recipe.seed) for a, b in combinations(raters, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / RESULT,
        {
            "rubric": settings.rubric,
            "seed": recipe.seed,
            "bootstrap_samples": BOOTSTRAP_SAMPLES,
            "raters": [{"name": r.name, "kind": r.kind, "source": str(r.source), "sha256": r.sha256} for r in raters],
            "pairs": [asdict(pair) for pair in pairs],
        },
    )
    print_pairs(pairs, Console())
    console.print(f"written: {folder / RESULT}", soft_wrap=True)


def _raters(recipe: Recipe, labels: Path, folder: Path) -> list[Rater]:
    """The judge, the other judge if there is one, and the people; judges cut to the sheet when people are there."""
    settings = recipe.agreement
    raters = [read_judge(labels, settings.rubric)]
    if settings.other:
        raters.append(read_judge(Path(settings.other), settings.rubric))
        if raters[0].sha256 == raters[1].sha256:
            raise UserError(
                f"agreement.other {settings.other} is the same file as {labels}: give another judge's labels"
            )
    if settings.answers or not settings.other:
        key = read_key(folder)
        _check_origin(key, raters[0], recipe)
        wanted = {item.key for item in key.items}
        for i, judge in enumerate(raters):
            cut = {key: judged for key, judged in judge.judged.items() if key in wanted}
            raters[i] = Rater(judge.name, judge.kind, judge.source, judge.sha256, cut)
        paths = [Path(path) for path in settings.answers] or [folder / SHEET]
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"agreement.answers names a file twice: {', '.join(map(str, paths))}")
        raters += [read_person(path, key) for path in paths]
    return _with_distinct_names(raters)


def _check_origin(key: SheetKey, judge: Rater, recipe: Recipe) -> None:
    rubric = recipe.agreement.rubric
    if key.rubric != rubric:
        raise UserError(f"the sheet was exported for rubric '{key.rubric}', not '{rubric}': set agreement.rubric to it")
    if key.labels_sha256 != judge.sha256:
        raise UserError(
            f"the sheet was exported from {key.labels} with SHA-256 {key.labels_sha256[:12]}, but {judge.source} has "
            f"{judge.sha256[:12]}: give that file in --agreement.labels (and these labels in --agreement.other)"
        )


def _with_distinct_names(raters: list[Rater]) -> list[Rater]:
    """Raters that share a name (two sheet.csv, one judge at two thresholds) get their path behind it."""
    counts = Counter(rater.name for rater in raters)
    return [
        Rater(f"{r.name} ({r.source})", r.kind, r.source, r.sha256, r.judged) if counts[r.name] > 1 else r
        for r in raters
    ]


def print_pairs(pairs: Sequence[PairAgreement], out: Console) -> None:
    """A table of words and sentences for each pair, and what the reader has to know of it."""
    for pair in pairs:
        table = Table(title=Text(f"{pair.a} (a) and {pair.b} (b): {pair.items} responses"), title_justify="left",
                      box=SIMPLE, padding=(0, 1, 0, 0))  # fmt: skip
        table.add_column("")
        for head in ("compared", "agree %", "kappa", "relevant % a", "relevant % b"):
            table.add_column(head, justify="right")
        for name, found in (("words", pair.words), ("sentences", pair.sentences)):
            table.add_row(
                name,
                f"{found.compared}/{found.questions}",
                _shown(found.agreement, "rate"),
                _shown(found.kappa, "number", "undefined" if found.compared else NOT_MEASURED),
                _shown(found.prevalence["a"], "rate"),
                _shown(found.prevalence["b"], "rate"),
            )
        out.print(table)
        for note in _notes(pair):
            out.print(Text(f"  {note}"))


def _shown(estimate: IntervalEstimate, unit: str, without: str = NOT_MEASURED) -> Text:
    if estimate.value is None:
        return Text(without)
    # On two lines, so that the table fits into 80 columns and no interval is broken.
    return Text(f"{number(estimate.value, unit)}\n{interval(estimate, unit)}".strip())


def _notes(pair: PairAgreement) -> list[str]:
    notes = []
    if pair.only_a or pair.only_b:
        notes.append(f"responses that only a has: {pair.only_a}, only b: {pair.only_b}; left out")
    for name, found in (("words", pair.words), ("sentences", pair.sentences)):
        for side, missing in found.missing.items():
            if missing:
                reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in missing.items())
                notes.append(f"{name}, {side}: {reasons}; left out, not counted as 0")
        if found.compared and found.kappa.value is None:
            notes.append(f"{name}: kappa is undefined, since both gave the same answer to every question")
        elif found.kappa_undefined_draws:
            notes.append(
                f"{name}: kappa's interval leaves out {found.kappa_undefined_draws} draws where it is undefined"
            )
        if 0 < found.responses < FEW_USERS:
            notes.append(f"{name}: only {found.responses} responses, so the intervals are a little narrow")
    return notes
