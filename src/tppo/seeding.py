"""Randomness: one seed in the recipe, independent streams by name."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`: streams do not disturb each other."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, *names))


def draw(items: Sequence[Item], count: int | None, seed: int, *names: str | int) -> list[Item]:
    """`count` of the items, drawn without replacement and in their order; None means all."""
    if count is None or len(items) <= count:
        return list(items)
    chosen = rng(seed, *names).choice(len(items), size=count, replace=False)
    return [items[index] for index in sorted(chosen)]


def seed_everything(seed: int, *names: str | int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    import torch  # here: commands that only draw with `rng` should start without torch

    value = stream_seed(seed, *names)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
