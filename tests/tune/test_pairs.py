"""Preference pairs: what is chosen, what is rejected, and that every example is accounted for."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.recipe import check_samples
from tppo.core.tables import Example
from tppo.tune.dpo import judged_pairs, sft_output_pairs, standing

EOS = 0


def response(example_id, sample, text, problem=None):
    """A row of responses.parquet whose ids are the text's characters, so that no two texts share them."""
    finished = problem != "truncated"
    ids = [ord(c) for c in text] + ([EOS] if finished else [])
    return {
        "example_id": example_id, "split": "train", "sample": sample, "response_ids": ids,
        "response": text, "finished": finished, "problem": problem,
    }  # fmt: skip


def label(row, sentence_label, word_labels, status="ok"):
    """A row of labels.parquet for a response."""
    ok = status == "ok"
    words = [{"label": value} for value in word_labels] if ok else []
    return {
        "example_id": row["example_id"], "split": row["split"], "sample": row["sample"], "response": row["response"],
        "words": words, "sentence_label": sentence_label if ok else None, "status": status,
    }  # fmt: skip


@st.composite
def judged_tables(draw):
    """Responses (unparseable ones among them) and labels (abstentions among them) of up to 5 examples."""
    responses, labels = [], []
    for number in range(draw(st.integers(1, 5))):
        for sample in range(draw(st.integers(1, 4))):
            problem = draw(st.sampled_from([None, None, None, "truncated", "too_many_queries"]))
            row = response(f"e{number}", sample, f"text {number} {sample}", problem)
            word_labels = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3))
            status = draw(st.sampled_from(["ok", "ok", "ok", "abstained"]))
            responses.append(row)
            labels.append(label(row, draw(st.integers(0, 1)), word_labels, status))
    return responses, labels


def score(row, verdict):
    """Standing as one number, worked out otherwise than the code does: the evaluation's score with the label first."""
    if row["problem"]:
        return 0.0
    relevant = [word["label"] - 1 for word in verdict["words"]]
    return 2 * verdict["sentence_label"] + sum(relevant) / len(relevant)


@given(judged_tables())
def test_judged_pairs_are_best_against_worst_and_account_for_every_example(tables):
    responses, labels = tables
    found = judged_pairs(responses, labels)
    examples = {row["example_id"] for row in responses}
    assert len(found.pairs) + sum(found.dropped.values()) == len(examples)
    by_ids = {tuple(row["response_ids"]): (row, verdict) for row, verdict in zip(responses, labels, strict=True)}
    paired = {pair.example_id: pair for pair in found.pairs}
    assert len(paired) == len(found.pairs), "one pair for an example"
    reasons = {"tie": 0, "fewer_than_two_judged_responses": 0}
    for example in examples:
        judged = [
            score(row, verdict)
            for row, verdict in by_ids.values()
            if row["example_id"] == example and verdict["status"] == "ok"
        ]
        if example in paired:
            chosen, rejected = (
                by_ids[tuple(ids)] for ids in (paired[example].chosen_ids, paired[example].rejected_ids)
            )
            assert {chosen[0]["example_id"], rejected[0]["example_id"]} == {example}
            assert {chosen[1]["status"], rejected[1]["status"]} == {"ok"}
            assert score(*chosen) == max(judged) > min(judged) == score(*rejected)
            assert chosen[0]["problem"] is None, "an unparseable response is never chosen"
        else:
            reasons["tie" if len(judged) > 1 else "fewer_than_two_judged_responses"] += 1
            assert len(judged) < 2 or max(judged) == min(judged)
    assert {key: count for key, count in reasons.items() if count} == dict(found.dropped)


@given(judged_tables(), st.randoms())
def test_judged_pairs_do_not_depend_on_the_order_of_the_rows(tables, random):
    responses, labels = tables
    expected = judged_pairs(responses, labels)
    random.shuffle(responses)
    random.shuffle(labels)
    found = judged_pairs(responses, labels)
    assert found.dropped == expected.dropped
    assert sorted(found.pairs, key=lambda pair: pair.example_id) == sorted(
        expected.pairs, key=lambda pair: pair.example_id
    )


def test_a_judge_of_whole_responses_orders_by_the_sentence_label():
    bad, good = response("e", 0, "a b"), response("e", 1, "c d")
    [pair] = judged_pairs([bad, good], [label(bad, 0, []), label(good, 1, [])]).pairs
    assert pair.chosen_ids == good["response_ids"]


def test_the_sentence_label_comes_before_the_words():
    half_relevant, all_words = response("e", 0, "a b"), response("e", 1, "c d")
    labels = [label(half_relevant, 1, [1, 2]), label(all_words, 0, [2, 2])]
    [pair] = judged_pairs([half_relevant, all_words], labels).pairs
    assert pair.chosen_ids == half_relevant["response_ids"]
    assert standing(half_relevant, labels[0]) == (1, 0.5)


def test_of_equals_the_first_sample_counts():
    rows = [response("e", sample, text) for sample, text in enumerate("abcd")]
    labels = [label(row, sentence, [2]) for row, sentence in zip(rows, (0, 1, 1, 0), strict=True)]
    [pair] = judged_pairs(rows, labels).pairs
    assert (pair.chosen_ids, pair.rejected_ids) == (rows[1]["response_ids"], rows[0]["response_ids"])


def test_labels_of_other_responses_are_refused():
    row = response("e7", 0, "a")
    with pytest.raises(UserError, match=r"sample 0 of example e7.*--redo label"):
        judged_pairs([row], [])
    with pytest.raises(UserError, match="made from other responses"):
        judged_pairs([row], [label(response("e7", 0, "b"), 1, [2])])


def encode(queries):
    return [ord(c) for c in "\n".join(queries)] + [EOS]


@given(st.lists(st.tuples(st.text("ab", max_size=3), st.booleans(), st.integers(1, 2)), max_size=6))
def test_sft_output_pairs_prefer_the_true_queries_to_the_first_sample(drawn):
    examples, rows = {}, []
    for number, (text, finished, samples) in enumerate(drawn):
        name = f"e{number}"
        examples[name] = Example(name, "u", "train", [], ["ab", "b" * number], datetime(2020, 1, 1))
        text = "\n".join(examples[name].targets) if text == "ab" else text
        rows += [response(name, sample, text, None if finished else "truncated") for sample in range(samples)]
    found = sft_output_pairs(rows, examples, encode, max_response_tokens=7)
    assert len(found.pairs) + sum(found.dropped.values()) == len(drawn), "one example, one pair or one reason"
    first = {row["example_id"]: row for row in rows if row["sample"] == 0}
    for pair in found.pairs:
        assert pair.chosen_ids == encode(examples[pair.example_id].targets)
        assert pair.rejected_ids == first[pair.example_id]["response_ids"], "as drawn: nothing added, nothing cut"
        assert pair.chosen_ids != pair.rejected_ids
        assert len(pair.chosen_ids) <= 7
    for name in examples.keys() - {pair.example_id for pair in found.pairs}:
        too_long = len(encode(examples[name].targets)) > 7
        assert too_long or (first[name]["response"], first[name]["finished"]) == (
            "\n".join(examples[name].targets),
            True,
        )


def test_true_queries_that_cannot_be_written_make_no_pair():
    example = Example("e", "u", "train", [], ["ж"], datetime(2020, 1, 1))
    found = sft_output_pairs([response("e", 0, "a")], {"e": example}, lambda queries: None, 7)
    assert (found.pairs, found.dropped) == ([], {"true_queries_not_writable": 1})


def test_judged_pairs_need_several_samples_before_anything_runs():
    recipe = Recipe(algorithms=["tppo", "dpo"])
    check_samples(recipe)
    recipe.dpo.pairs = "judged"
    with pytest.raises(UserError, match=r"samples_per_example=1.*samples_per_example 2 or more"):
        check_samples(recipe)
    recipe.sample.samples_per_example = 2
    check_samples(recipe)
