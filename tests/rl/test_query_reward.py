"""The format part of the query reward, and how reward-model scores are padded."""

import numpy as np
import pytest
import torch

from tppo.config import RL, Task
from tppo.rl.query_reward import format_reward, pad_class_probs
from tppo.text import parse_response


@pytest.mark.parametrize(
    ("response", "finished", "weight", "reward"),
    [
        ("a\nb\nc", True, 1, 0),
        ("a\nb", True, 2 / 3, -0.5),
        ("a", True, 1 / 3, -1.0),
        ("", True, 0, -3.5),
        ("a\nb\nc", False, 0, -2.0),
        ("one endless query", False, 0, -3.0),
        ("a\nb\nc\nd", True, 0, -2.0),
    ],
)
def test_format_reward(response, finished, weight, reward):
    config = RL(bad_format_reward=-2.0, missing_query_reward=-0.5)
    result = format_reward([parse_response(response, finished, 3)], config, Task(num_queries=3))
    assert result.weight.tolist() == pytest.approx([weight])
    assert result.reward.tolist() == pytest.approx([reward])
    config.format_weight = False
    assert format_reward([parse_response(response, finished, 3)], config, Task()).weight.tolist() == [1.0]


def test_padding_is_class_0_and_lengths_are_checked():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    probs = [np.array([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]], dtype=np.float32), np.array([[0.5, 0.5, 0.0]], np.float32)]
    padded = pad_class_probs(probs, mask)
    assert padded.shape == (2, 3, 3)
    assert padded[1, 1].tolist() == [1.0, 0.0, 0.0]
    assert padded[0, 0].tolist() == pytest.approx([0.1, 0.2, 0.7])
    with pytest.raises(AssertionError, match="one class distribution"):
        pad_class_probs([probs[0], probs[0]], mask)
