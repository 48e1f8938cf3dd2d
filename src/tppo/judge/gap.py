"""How differently SFT answers what it was trained on and people it never saw.

Two groups of answers of one policy, to disjoint users: those whose examples SFT was trained on, and others. The
difference of the means over users comes with a 95% interval by Welch's t on the users' own means, so a user with many
answers counts once. What is measured: words relevant, of the queries asked for (`tppo.core.asked`), under each rubric,
and the share of the true next queries that were written word for word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from tppo.core.asked import asked_share, asked_written
from tppo.core.tables import Example
from tppo.core.text import parse_response
from tppo.judge.verdict import RELEVANT

Row = dict[str, Any]


def answer_values(labels: Sequence[Row], examples: Mapping[str, Example], num_queries: int) -> list[Row]:
    """Rows {user_id, measure: value} of labelled answers; where the judge abstained on one there is no value.

    Args:
        labels: rows of labels.parquet with `finished`.
        examples: by id.
    """
    rows: dict[tuple[str, int], Row] = {}
    for row in labels:
        if row["status"] != "ok":
            continue
        example = examples[row["example_id"]]
        parsed = parse_response(row["response"], row["finished"], num_queries)
        if row["words"] or not parsed.words:
            marks = [word["label"] == RELEVANT for word in row["words"]]
            value = asked_share(parsed, marks, example.history, num_queries)
        else:  # a judge of whole answers
            value = row["sentence_label"] * asked_written(parsed, example.history, num_queries)
        shown = set(parsed.queries) if parsed.problem is None else set()
        overlap = sum(target in shown for target in example.targets) / len(example.targets)
        own = rows.setdefault((row["example_id"], row["sample"]), {"user_id": example.user_id, "overlap": overlap})
        own[f"relevant_{row['rubric']}"] = value
    return list(rows.values())


def gaps(seen: Sequence[Row], unseen: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Seen minus unseen of each measure that both have: value and 95% interval, the two means, users and answers."""
    names = {name for row in seen for name in row} & {name for row in unseen for name in row} - {"user_id"}
    return {name: _gap(_by_user(seen, name), _by_user(unseen, name)) for name in sorted(names)}


def _by_user(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if name in row:
            found.setdefault(row["user_id"], []).append(row[name])
    return found


def _gap(seen: Mapping[str, Sequence[float]], unseen: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    a_U, b_U = (np.array([np.mean(values) for values in group.values()]) for group in (seen, unseen))
    low = high = None
    if len(a_U) > 1 and len(b_U) > 1 and (np.ptp(a_U) > 0 or np.ptp(b_U) > 0):
        ends = stats.ttest_ind(a_U, b_U, equal_var=False).confidence_interval(0.95)
        low, high = (None if math.isnan(end) else float(end) for end in (ends.low, ends.high))
    return {
        "value": float(a_U.mean() - b_U.mean()),
        "low": low,
        "high": high,
        "seen": float(a_U.mean()),
        "unseen": float(b_U.mean()),
        "examples": sum(map(len, seen.values())),
        "users": len(seen),
        "unseen_examples": sum(map(len, unseen.values())),
        "unseen_users": len(unseen),
    }
