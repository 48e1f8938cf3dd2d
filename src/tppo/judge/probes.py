"""Probes: responses whose place in the order of rewards is known without asking a judge.

All answer the same history, so a reward model that does not read the history cannot tell `real` from `shuffled`,
and one that knows single words only cannot tell `real` from `repeated` and `copied`. What the labels say of them:

| probe | rubric `targets` | rubric `history` |
|---|---|---|
| real | relevant | relevant where the user stays on a topic of the history |
| shuffled | as often relevant as the judge's false alarms | the same |
| noise | the same | the same |
| repeated | the first query at best: with `label.repeats_irrelevant` the others are not new | the same |
| copied | irrelevant with `label.repeats_irrelevant`, whatever they say | the same |
| empty | irrelevant; a reward model gives it 0 by definition | the same |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tppo.core.common import rng, stream_seed
from tppo.core.config import Rubric
from tppo.core.tables import Example
from tppo.core.text import render_response
from tppo.core.words import join_words, split_words
from tppo.judge.verdict import JudgeItem, other_user_items

PROBES = {
    "real": "the user's real next queries",
    "shuffled": "another user's next queries",
    "noise": "random words of the log, in the form of the real queries",
    "repeated": "one relevant word as every query",
    "copied": "the newest searches of the history, word for word",
    "empty": "an empty response",
}
CONSTRUCTIBLE = tuple(probe for probe in PROBES if probe != "empty")
"""Probes with words to label."""


def make_probes(
    examples: Sequence[Example], vocabulary: Sequence[str], rubric: Rubric, num_queries: int, seed: int
) -> dict[str, list[str | None]]:
    """One response per probe and example, None where there is none (one user only, a history without a search).

    `noise` is drawn from the vocabulary; the rubric says which word is relevant for sure (`repeated`); `num_queries` is
    for `repeated` and `copied` (the latter as far as the history goes).
    """
    several_users = len({example.user_id for example in examples}) > 1
    others = [item.response for item in other_user_items(examples, seed)] if several_users else [None] * len(examples)
    return {
        "real": [render_response(example.targets) for example in examples],
        "shuffled": list(others),
        "noise": [_noise(example, vocabulary, seed) for example in examples],
        "repeated": [_repeated(example, rubric, num_queries) for example in examples],
        "copied": [_copied(example, num_queries) for example in examples],
        "empty": [""] * len(examples),
    }


def construct(
    examples: Sequence[Example], counts: Mapping[str, int], rubric: Rubric, num_queries: int, seed: int
) -> dict[str, list[tuple[Example, str]]]:
    """Probes as responses to learn from: for each kind that many (example, response), all where there are fewer.

    The kinds are those of CONSTRUCTIBLE; the examples are drawn with the seed, for each kind on its own.
    """
    wanted = {kind: count for kind, count in counts.items() if count}
    if not wanted:
        return {}
    probes = make_probes(examples, log_words(examples), rubric, num_queries, seed)
    found = {}
    for kind, count in wanted.items():
        able = [pair for pair in zip(examples, probes[kind], strict=True) if pair[1] is not None]
        chosen = rng(seed, "construct", kind).permutation(len(able))[:count]
        found[kind] = [able[i] for i in sorted(chosen)]
    return found


def noise_items(examples: Sequence[Example], seed: int, purpose: str) -> list[JudgeItem]:
    """Each example with `noise` as its response: random words of these examples' own histories and targets.

    The purpose names the stream of random numbers: what a judge is calibrated on is not what it is tested with.
    """
    vocabulary, seed = log_words(examples), stream_seed(seed, "noise", purpose)
    return [JudgeItem(e.history, e.targets, _noise(e, vocabulary, seed)) for e in examples]


def log_texts(examples: Sequence[Example]) -> list[str]:
    """All targets and all texts of the histories, in order, repetitions too."""
    return [text for example in examples for text in [*example.targets, *(event.text for event in example.history)]]


def log_words(examples: Sequence[Example]) -> list[str]:
    """The distinct words of all histories and targets, sorted."""
    return sorted({word for text in set(log_texts(examples)) for word in split_words(text)})


def _noise(example: Example, vocabulary: Sequence[str], seed: int) -> str:
    """As many queries as the real ones, each of as many words; drawn for each example on its own."""
    generator = rng(seed, "noise", example.example_id)
    sizes = [len(split_words(query)) for query in example.targets]
    drawn = [[vocabulary[i] for i in generator.integers(len(vocabulary), size=size)] for size in sizes]
    return render_response([join_words(words) for words in drawn])


def _repeated(example: Example, rubric: Rubric, num_queries: int) -> str | None:
    """The longest word (function words are short) of the newest text that relevance is judged against."""
    texts = example.targets[:1] if rubric == "targets" else _searches(example)[:1]
    return render_response([max(split_words(texts[0]), key=len)] * num_queries) if texts else None


def _copied(example: Example, num_queries: int) -> str | None:
    newest = list(dict.fromkeys(_searches(example)))[:num_queries]
    return render_response(newest[::-1]) if newest else None


def _searches(example: Example) -> list[str]:
    """Searches of the history, newest first."""
    return [event.text for event in reversed(example.history) if event.kind == "search"]
