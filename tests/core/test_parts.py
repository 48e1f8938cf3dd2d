"""Which training users a stage learns from: disjoint parts, by a hash of seed and user."""

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.core.config import ADDED, Parts, Recipe
from tppo.core.parts import (
    check_parts,
    part_of,
    read_trained_on,
    require_unseen,
    say_fewer,
    train_examples,
    write_trained_on,
)
from tppo.core.recipe import check_samples
from tppo.core.stages import stage_config
from tppo.core.tables import EXAMPLES, Example, write_table
from tppo.core.text import Event

PARTS = ("sft", "reward", "rl")
ONE_FOR_ALL = Parts(disjoint=False)


def prepared(folder: Path, users: int, per_user: int = 2) -> Path:
    """Training examples, and one of another split."""
    folder.mkdir(exist_ok=True)
    rows = [
        vars(Example(f"{user}-{n}", f"u{user}", split, [], ["a"], datetime(2026, 3, 1)))
        for user in range(users)
        for n, split in enumerate(["train"] * per_user)
    ]
    rows.append({**rows[0], "example_id": "other", "user_id": "other", "split": "eval1"})
    write_table(
        folder / "examples.parquet", [{**row, "history": [vars(Event("search", "x"))]} for row in rows], EXAMPLES
    )
    return folder


def test_the_parts_are_disjoint_cover_everybody_and_keep_a_user_together(tmp_path: Path):
    folder, seed = prepared(tmp_path / "prepare", users=200), 3
    found = {part: train_examples(folder, part, Parts(), seed) for part in PARTS}
    users = {part: {example.user_id for example in examples} for part, examples in found.items()}
    assert not users["sft"] & users["reward"]
    assert not users["sft"] & users["rl"]
    assert not users["reward"] & users["rl"]
    assert set.union(*users.values()) == {f"u{user}" for user in range(200)}
    assert all(len(found[part]) == 2 * len(users[part]) for part in PARTS)
    assert [len(users[part]) for part in PARTS] == pytest.approx([100, 50, 50], abs=25)


def test_everybody_is_in_every_part_as_before_there_were_parts(tmp_path: Path):
    folder = prepared(tmp_path / "prepare", users=5)
    everybody = [f"{user}-{n}" for user in range(5) for n in range(2)]
    for part in PARTS:
        assert [example.example_id for example in train_examples(folder, part, ONE_FOR_ALL, 0)] == everybody
    assert Parts(disjoint=ADDED["parts.disjoint"]) == ONE_FOR_ALL
    assert ADDED["sample.seen_examples"] == 0


@given(st.text(max_size=8), st.integers(0, 5))
def test_a_users_part_depends_on_the_seed_and_the_user_only(user: str, seed: int):
    assert part_of(user, Parts(), seed) == part_of(user, Parts(), seed)
    assert part_of(user, Parts(sft=1e-12, reward=1e-12, rl=1e-12), seed) is None, "what the shares leave over"
    assert part_of(user, Parts(sft=1.0, reward=1.0, rl=1.0), seed) == "sft"


def test_other_seeds_make_other_parts():
    users = [f"u{user}" for user in range(100)]
    assert [part_of(user, Parts(), 0) for user in users] != [part_of(user, Parts(), 1) for user in users]


@pytest.mark.parametrize(
    "parts", [Parts(sft=0.6), Parts(rl=0.0), Parts(reward=-0.1), Parts(sft=1.5, reward=0.1, rl=0.1)]
)
def test_shares_that_cannot_be_are_refused(parts: Parts, tmp_path: Path):
    with pytest.raises(UserError, match=r"parts\.sft=.*at most 1"):
        train_examples(prepared(tmp_path / "prepare", users=3), "sft", parts, 0)
    with pytest.raises(UserError, match=r"parts\.sft=.*at most 1"):
        check_samples(Recipe(parts=parts))  # before anything runs
    parts.disjoint = False
    check_samples(Recipe(parts=parts))
    train_examples(tmp_path / "prepare", "sft", parts, 0)  # not used, not checked
    check_parts(Parts(sft=1 / 3, reward=1 / 3, rl=1 / 3))


def test_a_part_without_users_is_refused_with_the_way_out(tmp_path: Path):
    folder = prepared(tmp_path / "prepare", users=1)
    (mine,) = [part for part in PARTS if part_of("u0", Parts(), 0) == part]
    assert len(train_examples(folder, mine, Parts(), 0)) == 2
    for part in set(PARTS) - {mine}:
        with pytest.raises(UserError, match=rf"1 users.*parts\.{part}=.*parts\.disjoint=false"):
            train_examples(folder, part, Parts(), 0)


def test_fewer_than_a_maximum_is_said(capsys: pytest.CaptureFixture[str]):
    say_fewer(7, 9, "sample.train_examples", Parts(), "reward")
    said = capsys.readouterr().err
    assert "parts.reward=0.25 holds 7 training examples, fewer than sample.train_examples=9" in said
    say_fewer(9, 9, "sample.train_examples", Parts(), "reward")
    say_fewer(7, 9, "sample.train_examples", ONE_FOR_ALL, "reward")
    assert capsys.readouterr().err == ""


def test_users_that_sft_learnt_from_are_refused_where_they_must_be_unseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = prepared(tmp_path / "prepare", users=20)
    sft, rest = (train_examples(folder, part, Parts(), 0) for part in ("sft", "reward"))
    assert read_trained_on(tmp_path) is None
    require_unseen(rest, tmp_path, Parts(), "prompts of RL")
    assert "does not say what it was trained on" in capsys.readouterr().err
    write_trained_on(tmp_path, sft)
    assert read_trained_on(tmp_path).example_ids == {example.example_id for example in sft}
    require_unseen(rest, tmp_path, Parts(), "prompts of RL")
    with pytest.raises(UserError, match=r"trained on 1 of the users whose examples prompts of RL"):
        require_unseen([*rest, sft[0]], tmp_path, Parts(), "prompts of RL")
    require_unseen(sft, tmp_path, ONE_FOR_ALL, "prompts of RL")


def test_the_stages_that_draw_depend_on_the_parts_and_prepare_does_not():
    depend = {name for name in ("prepare", "sft", "sample", "label", "reward", "check_reward", "rl_tppo", "evaluate")
              if "parts" in stage_config(name, Recipe())}  # fmt: skip
    assert depend == {"sft", "sample", "label", "rl_tppo", "evaluate"}
