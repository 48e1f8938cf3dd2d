"""Can the texts to be judged give orders to the judge? Measured, not assumed.

A response is judged three times: as it is (clean), with a payload added to one of the texts around it (attacked), and
with another user's query added in the same place (control: an added text can change a verdict for good reason). What
the attack did is how much more often the verdict flips under attack than under control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from tppo.core.common import rng
from tppo.core.config import Rubric
from tppo.core.text import QUERY_SEPARATOR, Event
from tppo.judge.payloads import PAYLOADS
from tppo.judge.verdict import Judge, JudgeItem, Verdict, split_response

Place = Literal["history", "targets", "response"]


def probe_injection(judge: Judge, items: Sequence[JudgeItem], count: int, seed: int) -> dict[str, Any] | None:
    """Flip rates of a judge over `count` probes; None (not measured) when `count` is 0.

    Returns:
        Counts and shares by what happened to the response's verdict: `raised` (irrelevant to relevant) among the
        responses that were irrelevant when clean, `lowered` among those that were relevant; under attack and under
        control. Probes in which any of the three judgements is an abstention are counted apart.
    """
    judged = [item for item in items if split_response(item.response).words]
    if not count or not judged:
        return None
    rubric = judge.rubrics[0]
    generator = rng(seed, "judge", "injection")
    clean = [judged[int(i)] for i in generator.permutation(len(judged))[:count]]
    clean = [clean[i % len(clean)] for i in range(count)]
    payloads = [PAYLOADS[i % len(PAYLOADS)].text for i in range(count)]
    controls = [str(judged[int(generator.integers(len(judged)))].targets[0]) for _ in clean]
    places = places_of(rubric)
    attacked = [add_text(item, payloads[i], places[i % len(places)]) for i, item in enumerate(clean)]
    controlled = [add_text(item, controls[i], places[i % len(places)]) for i, item in enumerate(clean)]
    before = judge.judge(clean, rubric, "injection probes, clean")
    return {
        "rubric": rubric,
        "probes": count,
        "payloads": min(count, len(PAYLOADS)),
        "attack": _flips(before, judge.judge(attacked, rubric, "injection probes, attacked")),
        "control": _flips(before, judge.judge(controlled, rubric, "injection probes, control")),
    }


def places_of(rubric: Rubric) -> tuple[Place, ...]:
    """Where a text can be added so that the judge sees it."""
    places: tuple[Place, ...] = get_args(Place)
    return places if rubric == "targets" else tuple(place for place in places if place != "targets")


def add_text(item: JudgeItem, text: str, place: Place) -> JudgeItem:
    """The item with a text as the newest search, the last true query or the last query of the response."""
    if place == "history":
        return replace(item, history=[*item.history, Event("search", text)])
    if place == "targets":
        return replace(item, targets=[*item.targets, text])
    return replace(item, response=item.response + QUERY_SEPARATOR + text)


def _flips(before: Sequence[Verdict], after: Sequence[Verdict]) -> dict[str, Any]:
    pairs = [
        (a.sentence_relevant, b.sentence_relevant)
        for a, b in zip(before, after, strict=True)
        if a.status == b.status == "ok"
    ]
    result: dict[str, Any] = {"abstained": len(before) - len(pairs)}
    for name, was in (("raised", False), ("lowered", True)):
        flips = [now != was for then, now in pairs if then == was]
        result |= {f"{name}_of": len(flips), f"{name}": sum(flips) / len(flips) if flips else None}
    return result
