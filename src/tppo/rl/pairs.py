"""Preference pairs for DPO, as pure functions of the tables of the sample and label stages.

Two kinds. The paper's (App. H) prefers the true next queries to what the SFT model wrote. The judged kind is
on-policy: both responses of a pair come from the SFT model, so the policy learns what is better among the things
it does write, and the judge's verdicts are the same that train the reward models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.judge.record import RELEVANT
from tppo.tables import Example
from tppo.text import render_response

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two responses to the prompt of one example. Ids end with end-of-sequence iff the response is finished."""

    example_id: str
    chosen_ids: list[int]
    rejected_ids: list[int]


class Pairs(NamedTuple):
    pairs: list[Pair]
    dropped: Counter[str]
    """Why an example gave no pair -> how many; with `pairs`, every example is accounted for."""


class Standing(NamedTuple):
    """What orders responses: the sentence label first, then the share of relevant words."""

    sentence_label: int
    word_share: float


def check_samples(recipe: Recipe) -> None:
    """Refuse, before anything runs, a recipe whose judged pairs could never be made.

    Raises:
        UserError: judged pairs are asked for, but one response per prompt is sampled.
    """
    if "dpo" in recipe.algorithms and recipe.dpo.pairs == "judged" and recipe.sample.samples_per_example < 2:
        raise UserError(
            "dpo.pairs=judged compares several responses to one prompt, but sample.samples_per_example="
            f"{recipe.sample.samples_per_example}: give --sample.samples_per_example 2 or more (and --redo sample "
            "when the stage is finished), or --dpo.pairs sft_output"
        )


def sft_output_pairs(
    responses: Sequence[Row],
    examples: Mapping[str, Example],
    encode: Callable[[Sequence[str]], list[int]],
    max_response_tokens: int,
) -> Pairs:
    """App. H: chosen are the true next queries, rejected is the example's first sampled response as it was drawn.

    Args:
        responses: rows of responses.parquet; samples after an example's first are not used.
        examples: by example_id.
        encode: queries -> ids of the response, end-of-sequence included.
        max_response_tokens: longer true queries are dropped, as in SFT: they could never be written.
    """
    pairs, dropped = [], Counter[str]()
    for row in responses:
        if row["sample"] != 0:
            continue
        targets = examples[row["example_id"]].targets
        chosen_ids = encode(targets)
        if len(chosen_ids) > max_response_tokens:
            dropped["true_queries_too_long"] += 1
        elif row["finished"] and row["response"] == render_response(targets):
            dropped["sampled_the_true_queries"] += 1
        else:
            pairs.append(Pair(row["example_id"], chosen_ids, list(row["response_ids"])))
    return Pairs(pairs, dropped)


def standing(response: Row, label: Row) -> Standing:
    """How a judged response stands. An unparseable one is worth nothing, as in the evaluation: nobody is shown it.

    A judge of whole responses gives no word labels; the sentence label alone then orders them.
    """
    assert label["status"] == "ok", "an abstained response has no standing"
    words = label["words"]
    if response["problem"] is not None:
        return Standing(0, 0.0)
    share = sum(word["label"] == RELEVANT for word in words) / len(words) if words else 0.0
    return Standing(label["sentence_label"], share)


def judged_pairs(responses: Sequence[Row], labels: Sequence[Row]) -> Pairs:
    """Best against worst of the sampled responses to each prompt; of equals, the one sampled first.

    Args:
        responses: rows of responses.parquet.
        labels: rows of labels.parquet of one rubric.

    Raises:
        UserError: a response has no label, or another text than was labelled.
    """
    by_key = {(row["example_id"], row["sample"]): row for row in labels}
    by_example: dict[str, list[tuple[Standing, Row]]] = {}
    for row in sorted(responses, key=lambda row: row["sample"]):
        judged = by_example.setdefault(row["example_id"], [])
        label = by_key.get((row["example_id"], row["sample"]))
        if label is None or label["response"] != row["response"]:
            raise UserError(
                f"labels.parquet has no verdict on sample {row['sample']} of example {row['example_id']}: it was "
                "made from other responses; give `--redo label`"
            )
        if label["status"] == "ok":
            judged.append((standing(row, label), row))
    pairs, dropped = [], Counter[str]()
    for example_id, judged in by_example.items():
        if len(judged) < 2:
            dropped["fewer_than_two_judged_responses"] += 1
            continue
        best, chosen = max(judged, key=lambda item: item[0])
        worst, rejected = min(judged, key=lambda item: item[0])
        if best == worst:
            dropped["tie"] += 1
        else:
            pairs.append(Pair(example_id, list(chosen["response_ids"]), list(rejected["response_ids"])))
    return Pairs(pairs, dropped)
