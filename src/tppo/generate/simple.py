"""Simple baselines that answer an evaluation example without a trained policy. A model that loses to one has lost.

Pure functions over examples. They learn from the examples of training users only, and see of a history what the models
see (examples hold `task.history_events` events). A baseline that knows fewer queries than asked gives fewer: nothing is
padded, and the number of queries stands in the tables.

- `frequent_next`: the queries that most training users searched soon after the user's last query (co-occurrence, as in
  Huang, Chien and Oyang, JASIST 54(7), 2003), then the queries most training users searched at all. Users are counted,
  not occurrences: windows of one user overlap. Ties go by the alphabet.
- `repeat_last`, `repeat_recent`: the user's last query; the last N distinct ones, newest first. True next queries are
  new to the history by definition (`tppo.logs.examples`), so these hit nothing exactly: they show what copying the
  history is worth to a judge and in words.
- `nearest`: the true next queries after the training example whose last query is nearest by cosine (of equals the first
  in file order).
- `best_of_n` needs models: `tppo.evaluate.answers` draws the samples, `best_sample` chooses.

Shapes: N training examples, D embedding size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, islice

import numpy as np

from tppo.core.tables import Example
from tppo.core.text import Event, normalise_query

Queries = list[str]
Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> unit vectors, one row each."""


def searches(history: Sequence[Event]) -> Queries:
    """The queries of a history, oldest first."""
    return [normalise_query(event.text) for event in history if event.kind == "search"]


def last_query(history: Sequence[Event]) -> str | None:
    """The newest query, or the newest event's text where there is no search; None for an empty history."""
    texts = searches(history) or [normalise_query(event.text) for event in history]
    return texts[-1] if texts else None


def repeat_recent(history: Sequence[Event], num_queries: int) -> Queries:
    """The last `num_queries` distinct queries, newest first."""
    return list(dict.fromkeys(reversed(searches(history))))[:num_queries]


class FrequentNext:
    """How many training users searched a query, and how many did within `num_queries` new queries after another."""

    def __init__(self, train: Sequence[Example], num_queries: int) -> None:
        self.num_queries = num_queries
        users_of: defaultdict[str, set[str]] = defaultdict(set)
        users_after: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for example in train:
            sequence = [*searches(example.history), *example.targets]
            for place, query in enumerate(sequence):
                users_of[query].add(example.user_id)
                for following in sequence[place + 1 : place + 1 + num_queries]:
                    if following != query:
                        users_after[query][following].add(example.user_id)
        self.overall = _most_users(users_of)
        self.after = {query: _most_users(users) for query, users in users_after.items()}

    def __call__(self, history: Sequence[Event]) -> Queries:
        """Up to `num_queries` distinct queries that are not in the history."""
        last, seen = last_query(history), set(searches(history))
        followers = self.after.get(last, []) if last is not None else []
        new = (query for query in chain(followers, self.overall) if query not in seen)
        # One query can be in both rankings, and no more than twice.
        return list(dict.fromkeys(islice(new, 2 * self.num_queries)))[: self.num_queries]


def _most_users(users_of: dict[str, set[str]]) -> Queries:
    counts = Counter({query: len(users) for query, users in users_of.items()})
    return sorted(counts, key=lambda query: (-counts[query], query))


class NearestNeighbour:
    """The next queries of the training example with the most similar last query."""

    def __init__(self, train: Sequence[Example], num_queries: int, embed: Embed) -> None:
        self.num_queries = num_queries
        self.embed = embed
        targets: dict[str, Queries] = {}
        for example in train:
            if (last := last_query(example.history)) is not None:
                targets.setdefault(last, example.targets)  # of equal last queries the first
        self.targets = list(targets.values())
        self.keys_ND = embed(list(targets)) if targets else np.zeros((0, 0))

    def __call__(self, history: Sequence[Event]) -> Queries:
        """The neighbour's next queries, in order; none without a history or without training examples."""
        last = last_query(history)
        if last is None or not self.targets:
            return []
        similarity_N = self.keys_ND @ self.embed([last])[0]
        return self.targets[int(similarity_N.argmax())][: self.num_queries]


def best_sample(rewards: Sequence[float]) -> int:
    """Index of the sample with the largest reward; of equals the first drawn."""
    return max(range(len(rewards)), key=lambda index: rewards[index])
