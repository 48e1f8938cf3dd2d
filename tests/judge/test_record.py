from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.tables import LABELS, read_table, write_table
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row


def verdict_for(response: str, relevant: bool = True) -> Verdict:
    words = [WordVerdict(0.1 * i, relevant) for i, _ in enumerate(split_response(response).words)]
    return Verdict(words, 0.5, relevant, "ok", None)


def test_row_keeps_the_order_and_repeated_words(example_factory):
    [example] = example_factory(1)
    response = "rose rose\n\nrose  soil"
    row = verdict_to_row(example, 2, "targets", "j", response, verdict_for(response))
    assert [word["word"] for word in row["words"]] == ["rose", "rose", "rose", "soil"]
    assert [word["i"] for word in row["words"]] == [0, 1, 2, 3]
    assert [word["query"] for word in row["words"]] == [0, 0, 1, 1]
    assert len({word["score"] for word in row["words"]}) == 4
    assert {word["label"] for word in row["words"]} == {2}
    assert (row["sentence_label"], row["status"], row["sample"]) == (1, "ok", 2)


@given(response=st.text(max_size=40), relevant=st.booleans())
def test_words_are_spans_of_the_raw_response(example_factory, response, relevant):
    [example] = example_factory(1)
    row = verdict_to_row(example, 0, "history", "j", response, verdict_for(response, relevant))
    for word in row["words"]:
        assert response[word["start"] : word["end"]] == word["word"]
        assert word["label"] == (2 if relevant else 1)


def test_row_fits_the_table_and_an_abstention_is_no_label(example_factory, tmp_path):
    [example] = example_factory(1)
    abstained = Verdict(None, 0.0, False, "abstained", "three bad replies")
    rows = [
        verdict_to_row(example, 0, "targets", "j", "a b", verdict_for("a b")),
        verdict_to_row(example, 1, "targets", "j", "a b", abstained),
    ]
    write_table(tmp_path / "labels.parquet", rows, LABELS)
    row = read_table(tmp_path / "labels.parquet", LABELS).to_pylist()[1]
    assert (row["words"], row["sentence_score"], row["sentence_label"]) == ([], None, None)
    assert (row["status"], row["problem"]) == ("abstained", "three bad replies")


def test_a_miscounted_verdict_is_refused_not_repaired(example_factory):
    [example] = example_factory(1)
    with pytest.raises(ValueError, match="gave 2 word verdicts for a response of 3 words"):
        verdict_to_row(example, 0, "targets", "j", "a b c", verdict_for("a b"))
