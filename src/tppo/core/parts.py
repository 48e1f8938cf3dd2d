"""Which training users a stage learns from: SFT, the reward models and RL from different people (section `parts`).

A policy writes better queries for the examples that it was tuned on than for people it does not know. Labels of such
answers would teach the reward models too kind a world, and RL would start from prompts it has learnt by heart. Hence
the training users fall into three parts by a hash of (seed, user), so a user's part depends on nobody else; all
examples of a user are in one. `parts.disjoint: false` gives every stage all training users, as before there were parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tppo.core.common import UserError, console, stream_seed
from tppo.core.config import Parts
from tppo.core.tables import (
    EXAMPLES,
    TRAINED_ON,
    Example,
    Examples,
    drawn_examples,
    load_examples,
    read_table,
    write_table,
)

Part = Literal["sft", "reward", "rl"]
TRAINED_ON_FILE = "trained_on.parquet"
SEEN_FILE = "seen.parquet"
"""In `sample` and `label`: answers to what SFT was trained on, and their labels. Nothing learns from them."""


def check_parts(parts: Parts) -> None:
    """UserError for shares that cannot be; where the parts are not disjoint they mean nothing."""
    if not parts.disjoint:
        return
    shares = {name: getattr(parts, name) for name in get_args(Part)}
    said = ", ".join(f"parts.{name}={share:g}" for name, share in shares.items())
    if not all(0 < share <= 1 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise UserError(f"{said}: give shares above 0 that add up to at most 1, or parts.disjoint=false")


def part_of(user_id: str, parts: Parts, seed: int) -> Part | None:
    """The part that a training user is in; None when the shares leave some over and this is one of them."""
    place = stream_seed(seed, "parts", user_id) / 2**63
    for name in get_args(Part):
        place -= getattr(parts, name)
        if place < 0:
            return name
    return None


def train_examples(prepare: Path, part: Part, parts: Parts, seed: int) -> Examples:
    """The training examples of a part's users, in file order.

    Args:
        seed: `Recipe.data_seed`: the same for every stage of a run.

    Raises:
        UserError: shares that cannot be, or no user falls into this part.
    """
    users = _users(prepare, part, parts, seed)
    examples = load_examples(prepare, "train")
    return examples if users is None else examples.among("user_id", users)


def drawn_train_examples(
    prepare: Path, part: Part, parts: Parts, data_seed: int, count: int | None, seed: int, *names: str | int
) -> Examples:
    """`count` of `train_examples` (None: all), drawn by `seed` and `names`; only theirs are kept in memory."""
    users = _users(prepare, part, parts, data_seed)
    among = None if users is None else ("user_id", users)
    return drawn_examples(prepare, "train", count, seed, *names, among=among)


def _users(prepare: Path, part: Part, parts: Parts, seed: int) -> list[str] | None:
    """The training users of a part; None for all."""
    check_parts(parts)
    if not parts.disjoint:
        return None
    everybody = read_table(prepare / "examples.parquet", EXAMPLES, ["user_id"], split="train")["user_id"].unique()
    users = [user for user in everybody.to_pylist() if part_of(user, parts, seed) == part]
    if len(everybody) and not users:
        raise UserError(
            f"{prepare}/examples.parquet has training examples of {len(everybody)} users, and none of them falls into "
            f"parts.{part}={getattr(parts, part):g}: prepare more, raise the share, or give parts.disjoint=false (SFT, "
            "labels and RL then learn from the same users)"
        )
    return users


def say_fewer(found: int, wanted: int, setting: str, parts: Parts, part: Part) -> None:
    """A line when a part holds fewer examples than a setting asks for."""
    if parts.disjoint and found < wanted:
        said = f"parts.{part}={getattr(parts, part):g} holds {found} training examples, fewer than {setting}={wanted}"
        console.print(f"{said}: all of them are used", markup=False, soft_wrap=True)


class TrainedOn(NamedTuple):
    """What an SFT model learnt from."""

    example_ids: set[str]
    user_ids: set[str]


def write_trained_on(sft: Path, examples: Iterable[Example]) -> None:
    """Record what SFT learns from, for the stages that are to answer, or not to answer, the same examples."""
    rows = [{"example_id": example.example_id, "user_id": example.user_id} for example in examples]
    write_table(sft / TRAINED_ON_FILE, rows, TRAINED_ON)


def read_trained_on(sft: Path) -> TrainedOn | None:
    """None for an SFT stage that recorded nothing (an older version's, or a model brought from elsewhere)."""
    if not (sft / TRAINED_ON_FILE).exists():
        return None
    rows = read_table(sft / TRAINED_ON_FILE, TRAINED_ON).to_pylist()
    return TrainedOn({row["example_id"] for row in rows}, {row["user_id"] for row in rows})


def require_unseen(examples: Sequence[Example], sft: Path, parts: Parts, purpose: str) -> None:
    """Examples that SFT must not have been trained on are of users it never saw; says when that cannot be known.

    Raises:
        UserError: the SFT model learnt from some of these users (it was made elsewhere, with other parts or seeds).
    """
    if not parts.disjoint:
        return
    trained = read_trained_on(sft)
    if trained is None:
        console.print(
            f"{sft} does not say what it was trained on, so {purpose} may be of users that it learnt from",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    elif seen := {example.user_id for example in examples} & trained.user_ids:
        raise UserError(
            f"{sft} was trained on {len(seen)} of the users whose examples {purpose} would be drawn from: it was made "
            "with another seed or other parts; make it anew here, or give parts.disjoint=false"
        )
