"""tppo: token-level proximal policy optimization for query generation.

The dozen names a researcher uses. They are loaded when they are first asked for, so that the command line starts at
once.

>>> import tppo
>>> sorted(tppo.__all__)[:4]
['RL', 'Recipe', 'Sample', 'Scores']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tppo.cli import run
    from tppo.core.config import RL, Recipe
    from tppo.core.models import load_policy
    from tppo.reward.align import classes_from_words, pool_probabilities, token_spans
    from tppo.reward.models import SentenceRewardModel, TokenRewardModel
    from tppo.rl.reward_function import Sample, Scores
    from tppo.rl.rewards import gae, token_level_rewards
    from tppo.rl.trainer import TokenPPOTrainer

__version__ = "0.1.0"
_HOMES = {
    "cli": ("run",),
    "core.config": ("RL", "Recipe"),
    "core.models": ("load_policy",),
    "reward.align": ("classes_from_words", "pool_probabilities", "token_spans"),
    "reward.models": ("SentenceRewardModel", "TokenRewardModel"),
    "rl.reward_function": ("Sample", "Scores"),
    "rl.rewards": ("gae", "token_level_rewards"),
    "rl.trainer": ("TokenPPOTrainer",),
}
__all__ = [
    "RL",
    "Recipe",
    "Sample",
    "Scores",
    "SentenceRewardModel",
    "TokenPPOTrainer",
    "TokenRewardModel",
    "classes_from_words",
    "gae",
    "load_policy",
    "pool_probabilities",
    "run",
    "token_level_rewards",
    "token_spans",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tppo.{home}"), name)
    raise AttributeError(f"module 'tppo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
