"""What a user's reward function sees, may return, and how its mistakes are named."""

import numpy as np
import pytest
import torch

from tppo.core.common import UserError
from tppo.rl.guards import GuardError
from tppo.rl.reward_function import Scores, score


def rollout_of(make_trainer):
    trainer = make_trainer()
    return trainer._roll_out()


def test_samples_hold_texts_ids_and_spans(make_trainer, tokenizer):
    rollout = rollout_of(make_trainer)
    for sample in rollout.samples:
        assert tokenizer(sample.prompt)["input_ids"] == sample.prompt_ids
        assert len(sample.spans) == len(sample.response_ids)
        shown = sample.response_ids[:-1] if sample.finished else sample.response_ids
        texts = [sample.response[start:end].strip() for start, end in sample.spans[: len(shown)]]
        assert texts == [tokenizer.decode([token]) for token in shown]
        if sample.finished:
            start, end = sample.spans[-1]
            assert start == end
    assert any(sample.finished for sample in rollout.samples)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_one_float_per_token_or_one_per_response(make_trainer, kind):
    rollout = rollout_of(make_trainer)
    mask = rollout.batch.response_mask

    def reward(samples):
        return [kind([float(i + 1) for i in range(len(s.response_ids))]) if n % 2 else 7 for n, s in enumerate(samples)]

    rewards = score(reward, rollout.samples, mask).rewards
    assert (rewards[~mask] == 0).all()
    for row, sample in enumerate(rollout.samples):
        length = len(sample.response_ids)
        expected = list(range(1, length + 1)) if row % 2 else [0] * (length - 1) + [7]
        assert rewards[row, :length].tolist() == expected


def test_a_wrong_length_names_the_sample_and_the_right_length(make_trainer):
    rollout = rollout_of(make_trainer)
    length = len(rollout.samples[3].response_ids)

    def reward(samples):
        return [[0.0] * (len(s.response_ids) + (row == 3)) for row, s in enumerate(samples)]

    with pytest.raises(
        UserError, match=rf"shape \({length + 1},\) for sample 3 \(prompt \d+: '.*return {length} floats"
    ):
        score(reward, rollout.samples, rollout.batch.response_mask)
    with pytest.raises(UserError, match="15 rewards for 16 samples"):
        score(lambda samples: [0.0] * 15, rollout.samples, rollout.batch.response_mask)
    with pytest.raises(UserError, match="no numbers for sample 0"):
        score(lambda samples: [{"reward": 1}] * 16, rollout.samples, rollout.batch.response_mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_nan_and_infinity_name_the_sample(make_trainer, bad):
    """1e39 is a float of Python and infinite in float32."""

    def reward(samples):
        return [bad if row == 5 else 0.0 for row in range(len(samples))]

    with pytest.raises(GuardError, match=r"reward of update 1, sample 5 \(prompt \d+: '"):
        make_trainer(reward).step()


def test_metrics_and_classes_are_optional_extras(make_trainer):
    def reward(samples):
        return Scores([0.0] * len(samples), {"mine": 2.5}, [[1] * len(s.response_ids) for s in samples])

    result = make_trainer(reward).step()
    assert result.metrics["mine"] == 2.5
    assert result.rewards.classes[0][0] == 1
