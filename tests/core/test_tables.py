"""Tables are read by column and row: what is drawn is what was always drawn, and nothing else becomes an object."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core import tables
from tppo.core.common import UserError, draw
from tppo.core.tables import EXAMPLES, Example, drawn_examples, load_examples, read_table, write_table


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, example_factory):
    """A folder of examples, the splits mixed row by row, and the examples."""
    folder = tmp_path_factory.mktemp("prepare")
    parts = zip(example_factory(3000), example_factory(3000, "reward_eval", 5000), strict=True)
    examples = [example for pair in parts for example in pair]
    write_table(folder / "examples.parquet", [asdict(example) for example in examples], EXAMPLES)
    return folder, examples


def of_split(examples: list[Example], split: str) -> list[Example]:
    return [example for example in examples if example.split == split]


@given(count=st.sampled_from([None, 0, 1, 40, 2999, 3000, 9999]), seed=st.integers(0, 3))
def test_examples_are_drawn_as_from_a_list(prepared, count, seed):
    folder, examples = prepared
    for split in ("train", "reward_eval"):
        wanted = draw(of_split(examples, split), count, seed, "sft", split)
        assert list(drawn_examples(folder, split, count, seed, "sft", split)) == wanted


def test_drawing_makes_objects_of_what_is_drawn_only(prepared, monkeypatch):
    made = []
    real = tables._examples
    monkeypatch.setattr(tables, "_examples", lambda table: made.append(table.num_rows) or real(table))
    drawn = drawn_examples(prepared[0], "train", 7, 0)
    assert drawn.table.num_rows == len(drawn) == 7
    assert drawn.table.nbytes < 10_000
    assert made == []
    assert drawn[-1] == list(drawn)[6]
    assert sum(made) == 1 + 7


def test_examples_are_a_sequence(prepared):
    folder, examples = prepared
    loaded = load_examples(folder)
    assert loaded == examples
    assert load_examples(folder, "train") == of_split(examples, "train")
    assert loaded[3] == examples[3]
    assert loaded[-1] == examples[-1]
    assert loaded[10:14] == examples[10:14]
    assert loaded[::-1000] == examples[::-1000]
    assert examples[17] in loaded
    with pytest.raises(IndexError):
        loaded[len(examples)]
    assert not load_examples(folder, "eval1")
    ids = {examples[i].example_id for i in (5, 99, 2)} | {"nobody"}
    assert loaded.with_ids(ids) == [examples[i] for i in (2, 5, 99)]


def test_only_columns_and_rows_that_are_asked_for_are_read(prepared):
    path = prepared[0] / "examples.parquet"
    found = read_table(path, EXAMPLES, ["example_id", "split"], split="train")
    assert found.column_names == ["example_id", "split"]
    assert found.num_rows == 3000
    assert found.schema.field("split").metadata == EXAMPLES.field("split").metadata


def test_what_is_no_such_table_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist: run the stage that writes it"):
        load_examples(tmp_path)
    path = tmp_path / "examples.parquet"
    path.write_bytes(b"no table" * 10)
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_examples(tmp_path)
    pq.write_table(pa.table({"example_id": ["a"], "split": ["train"]}), path)
    with pytest.raises(UserError, match=r"lacks the columns \['user_id', 'history', 'targets', 'target_time'\]"):
        drawn_examples(tmp_path, "train", 1, 0)
    table = pa.table({name: ["a"] for name in EXAMPLES.names})
    pq.write_table(table, path)
    with pytest.raises(UserError, match="a column of another type than documented"):
        load_examples(tmp_path)
    pq.write_table(table.set_column(2, "split", pa.array([1])), path)
    with pytest.raises(UserError, match="a column of another type than documented"):
        load_examples(tmp_path, "train")
