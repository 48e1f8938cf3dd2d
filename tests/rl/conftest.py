"""A tiny world: 20 letters and end-of-sequence, a two-layer model, and rewards that like one letter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.letters import PROMPTS, letter_tokenizer
from tppo.core.config import RL
from tppo.rl.policy import training_state
from tppo.rl.reward_function import Scores
from tppo.rl.trainer import TokenPPOTrainer

GOOD = 5  # the id of the token the rewards below like


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return letter_tokenizer()


def make_lm(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 21,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "attention_dropout": 0.3,  # must be off in RL, or the first ratio is not 1
        }
        | settings
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_lm() -> Any:
    """`tiny_lm(seed=0, **LlamaConfig settings)`."""
    return make_lm


def dense(samples: Any) -> Scores:
    """+1 for each token that is GOOD, paid where it stands."""
    rewards = [[float(token == GOOD) for token in sample.response_ids] for sample in samples]
    return Scores(rewards, {"good": sum(map(sum, rewards)) / len(rewards)})


@pytest.fixture
def dense_reward() -> Any:
    return dense


@pytest.fixture
def make_trainer(tokenizer: Any) -> Any:
    """`make_trainer(reward_fn=dense, lm=None, seed=3, **RL settings)`."""

    def make(reward_fn: Any = dense, lm: Any = None, seed: int = 3, **settings: Any) -> TokenPPOTrainer:
        config = RL(
            **{
                "batch_size": 16,
                "minibatch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 3e-3,
                "value_learning_rate": 1e-2,
                "warmup_updates": 1,
                "kl_coef": 0.01,
                "precision": "fp32",
            }
            | settings
        )
        lm = make_lm() if lm is None else lm
        return TokenPPOTrainer(lm, reward_fn, PROMPTS, config, tokenizer=tokenizer, max_response_tokens=8, seed=seed)

    return make


def without_times(row: dict[str, float]) -> dict[str, float]:
    from tppo.rl.loop import TIME_COLUMNS

    return {name: value for name, value in row.items() if name not in TIME_COLUMNS}


@pytest.fixture
def timeless() -> Any:
    """`timeless(row)`: a row of metrics without the columns that measure time."""
    return without_times


@pytest.fixture
def weights() -> Any:
    """`weights(trainer)`: a copy of every tensor an update may change, the optimizer's included."""

    def copy(trainer: TokenPPOTrainer) -> dict[str, torch.Tensor]:
        moments = training_state(trainer.policy, trainer.optimizer)["optimizer"]
        return {name: value.clone() for name, value in {**trainer.policy.state_dict(), **moments}.items()}

    return copy


@pytest.fixture
def assert_same() -> Any:
    """`assert_same(a, b)`: two results of `weights` are equal bit by bit."""

    def check(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), name

    return check
