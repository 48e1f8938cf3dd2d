"""The true relevance of queries to the users of a synthetic log: known from how the log is made, judged by nobody.

A query is relevant when it is new and its user could have made it, word for word (`tppo.logs.synthetic.user_queries`).
A word is relevant when it stands in a new query that could have held it (`relevant_words`). A query that repeats a
search of the history or of the same response is not new.
"""

from __future__ import annotations

from itertools import chain

from tppo.core.config import Synthetic
from tppo.core.files import sha256_file
from tppo.core.run import MANIFEST, RunFolder, without_retired
from tppo.core.tables import Example
from tppo.core.text import ParsedResponse, Word, parse_response, repeated_queries
from tppo.core.words import split_words
from tppo.logs.clean import hash_user
from tppo.logs.prepare import SYNTHETIC_KEY
from tppo.logs.synthetic import relevant_words, user_name, user_queries


class Truth:
    """What is relevant to the users of the synthetic log with these settings and this seed."""

    def __init__(self, config: Synthetic, seed: int) -> None:
        self.users = {f"{hash_user(SYNTHETIC_KEY, user_name(user)):016x}": user for user in range(config.users)}
        self.config = config
        self.seed = seed
        self._possible: dict[str, list[tuple[str, ...]]] = {}

    def possible(self, user_id: str) -> list[tuple[str, ...]]:
        """What a user of examples.parquet can search, as words."""
        if user_id not in self._possible:
            self._possible[user_id] = user_queries(self.users[user_id], self.config, self.seed)
        return self._possible[user_id]

    def words(self, example: Example, response: str) -> tuple[list[Word], list[bool]]:
        """The words of a response and whether each is relevant."""
        parsed = parse_response(response, finished=True, num_queries=1)
        return parsed.words, list(chain.from_iterable(self._marks(example, parsed)))

    def shares(self, example: Example, response: str, num_queries: int) -> tuple[float, float]:
        """Share of the `num_queries` asked for that are relevant, and share of the words written that are.

        A query that was not written is not relevant, so that saying less does not pay; those beyond the number asked
        for do not count.
        """
        parsed = parse_response(response, finished=True, num_queries=num_queries)
        marks = self._marks(example, parsed)
        possible = set(self.possible(example.user_id))
        # A query with every word marked is new, but may still be half of one, or in another order.
        relevant = [
            all(found) and tuple(split_words(query)) in possible
            for query, found in zip(parsed.queries, marks, strict=True)
        ]
        flat = list(chain.from_iterable(marks))
        return sum(relevant[:num_queries]) / num_queries, sum(flat) / len(flat) if flat else 0.0

    def _marks(self, example: Example, parsed: ParsedResponse) -> list[list[bool]]:
        """Whether each word of each query is relevant."""
        old = repeated_queries(example.history, parsed.queries)
        possible = self.possible(example.user_id)
        return [
            [mark and number not in old for mark in relevant_words([word.lower() for word in words], possible)]
            for number, words in enumerate(parsed.query_words)
        ]


def known_truth(run: RunFolder) -> Truth | None:
    """The truth about the examples of a run, or None: they were not prepared from the run's own synthetic log."""
    made, prepared = run.manifest("synthetic"), run.manifest("prepare")
    if made is None or prepared is None:
        return None
    if prepared["inputs"].get("synthetic") != sha256_file(run.path("synthetic") / MANIFEST):
        return None
    config = without_retired(made["config"])
    return Truth(Synthetic(**config["synthetic"]), config["seed"])
