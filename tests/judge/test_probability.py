"""The probability of a verdict, from token log probabilities cut in any way a tokenizer may cut a reply."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.judge.prompts import BrokenReply, verdict_probabilities


def entry(token: str, share: float, **others: float) -> dict:
    listed = {token: share} | others
    top = [{"token": text, "logprob": math.log(part) if part else -math.inf} for text, part in listed.items()]
    return {**top[0], "top_logprobs": top}


@given(
    words=st.lists(st.text(max_size=8), max_size=4),
    spaces=st.text(" \n\t", max_size=3),
    verdict=st.sampled_from("01"),
    share=st.floats(0.01, 0.99),
    cuts=st.sets(st.integers(1, 400)),
)
def test_it_is_found_wherever_the_tokens_end(words, spaces, verdict, share, cuts):
    scored = [{"i": i, "word": word, "score": 1} for i, word in enumerate(words)]
    before = f'{{"words": {json.dumps(scored, ensure_ascii=False)}, "sentence":{spaces}'
    content = f"{before}{verdict}}}"
    ends = sorted({cut for cut in cuts if cut < len(content)} | {len(content)})
    tokens, start = [], 0
    for end in ends:
        token = content[start:end]
        others = {"<other>": 0.005}
        if start <= len(before) < end:
            place = len(before) - start
            other = {"0": "1", "1": "0"}[verdict]
            others[token[:place] + other + token[place + 1 :]] = (1 - share) * 0.9
        tokens.append(entry(token, share * 0.9, **others))
        start = end
    found = verdict_probabilities("token", content, {"content": tokens})
    assert found == pytest.approx({verdict: share, {"0": "1", "1": "0"}[verdict]: 1 - share})


def test_a_verdict_spelled_by_several_tokens_is_counted_whole():
    # The same verdict with and without what follows it.
    tokens = [
        entry('{"sentence":', 1.0),
        entry(" 0", 0.5, **{" 0}": 0.2, " 1": 0.2, " 1}": 0.1, "1": 0.3}),
        entry("}", 1),
    ]
    assert verdict_probabilities("sentence", '{"sentence": 0}', {"content": tokens})["1"] == pytest.approx(0.3)


def test_a_verdict_that_is_not_listed_has_no_probability():
    tokens = [entry('{"sentence": ', 1.0), entry("0", 0.9, **{"x": 0.1}), entry("}", 1.0)]
    assert verdict_probabilities("sentence", '{"sentence": 0}', {"content": tokens}) == {"0": 1, "1": 0}


@pytest.mark.parametrize(
    ("tokens", "others"),
    [
        (['{"winner": "', "*a", '"}'], {"b": 0.25, "t": 0.03, "tie": 0.02, "ab": 0.1, "tied": 0.1}),
        (['{"winner":', '* "a"', "}"], {' "b"': 0.2, ' "b"}': 0.05, ' "tie': 0.05, ' "as"': 0.1, "a": 0.1}),
        (['*{"winner": "a"}'], {'{"winner": "b"}': 0.25, '{"winner": "ti': 0.05, '{"winner": "': 0.1}),
    ],
)
def test_the_winner_of_a_pair(tokens, others):
    # Starred: the token of the verdict. Other words, and verdicts in another place, count for none.
    entries = [entry(token[1:], 0.2, **others) if token[0] == "*" else entry(token, 1.0) for token in tokens]
    found = verdict_probabilities("pair", '{"winner": "a"}', {"content": entries})
    assert found == pytest.approx({"a": 0.4, "b": 0.5, "tie": 0.1})


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": None},
        {"content": []},
        {"content": [entry('{"sentence": 1}', 1.0)]},  # another reply
        {"content": [{"token": '{"sentence": 0}', "logprob": 0.0}]},  # no alternatives
        {"content": [{"token": '{"sentence": 0}', "logprob": "?", "top_logprobs": []}]},
        {"content": [{"token": '{"sentence": 0}', "logprob": math.nan, "top_logprobs": []}]},
        {"content": [{"token": '{"sentence": 0}', "logprob": 3.0, "top_logprobs": []}]},
        {"content": [entry('{"sentence": 0}', 0.0)]},
        [],
        "logprobs",
    ],
)
def test_what_is_no_probability_is_refused(logprobs):
    with pytest.raises(BrokenReply, match="logprobs: "):
        verdict_probabilities("sentence", '{"sentence": 0}', logprobs)
