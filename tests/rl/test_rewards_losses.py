"""Rewards, GAE and losses against verl 0.9.1, TRL 1.9.0, closed forms and properties."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.core.config import RL
from tppo.reward.metrics import Values, class_rewards, reward_values
from tppo.rl.losses import kl_estimate, policy_loss, value_loss
from tppo.rl.rewards import (
    FormatReward,
    RewardScale,
    apply_length_penalty,
    at_last_token,
    gae,
    length_weight,
    token_level_rewards,
    whiten,
)

ORACLES = Path(__file__).parent / "oracles"
PLAIN = FormatReward(weight=torch.ones(4), reward=torch.zeros(4))
FORMAT = FormatReward(weight=torch.tensor([1.0, 0.0, 0.5, 1.0]), reward=torch.tensor([0.0, -1.0, -0.5, 0.0]))
SCALE = RewardScale(suggested_length=6.0, relevant_word_share=0.2, relevant_response_share=0.3)
VERL = json.loads((ORACLES / "verl.json").read_text())
TRL = json.loads((ORACLES / "trl.json").read_text())


def tensors(source):
    inputs = {name: torch.tensor(value) for name, value in source["inputs"].items()}
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"].bool()
    return inputs


@pytest.mark.parametrize("case", VERL["cases"], ids=lambda case: f"gamma={case['gamma']},lambda={case['lam']}")
def test_equal_to_verl(case):
    x = tensors(VERL)
    mask = x["mask"]
    result = gae(x["rewards"], x["old_values"], mask, case["gamma"], case["lam"])
    torch.testing.assert_close(result.advantages, torch.tensor(case["advantages"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.returns, torch.tensor(case["returns"]), atol=1e-5, rtol=1e-5)
    whitened = whiten(result.advantages, mask)
    torch.testing.assert_close(whitened, torch.tensor(case["whitened"]), atol=1e-5, rtol=1e-5)
    policy = policy_loss(x["logprobs"], x["old_logprobs"], whitened, mask, 0.2, mask.sum())
    assert policy.loss.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert policy.clip_fraction.item() == pytest.approx(case["clip_fraction"], abs=1e-5)
    value = value_loss(x["values"], x["old_values"], result.returns, mask, 0.2, mask.sum())
    assert value.loss.item() == pytest.approx(case["value_loss"], abs=1e-5)
    assert value.clip_fraction.item() == pytest.approx(case["value_clip_fraction"], abs=1e-5)


def test_kl_and_whitening_equal_to_verl():
    x = tensors(VERL)
    torch.testing.assert_close(kl_estimate("k1", x["logprobs"], x["ref_logprobs"]), torch.tensor(VERL["k1"]))
    torch.testing.assert_close(
        whiten(x["rewards"], x["mask"]), torch.tensor(VERL["masked_whiten"]), atol=1e-5, rtol=1e-5
    )


def test_equal_to_trl():
    x = tensors(TRL)
    mask = torch.ones_like(x["rewards"], dtype=torch.bool)
    result = gae(x["rewards"], x["values"], mask, TRL["gamma"], TRL["lam"])
    torch.testing.assert_close(result.advantages, torch.tensor(TRL["advantages"]), atol=1e-5, rtol=1e-5)
    whitened = whiten(result.advantages, mask)
    torch.testing.assert_close(whitened, torch.tensor(TRL["whitened"]), atol=1e-5, rtol=1e-5)
    policy = policy_loss(x["new_logprobs"], x["mb_logprobs"], whitened, mask, 0.2, mask.sum())
    assert policy.loss.item() == pytest.approx(TRL["policy_loss"], abs=1e-5)
    value = value_loss(x["vpred"], x["values"], result.returns, mask, 0.2, mask.sum())
    assert value.loss.item() == pytest.approx(TRL["value_loss"], abs=1e-5)


def test_length_weight_is_half_at_its_half_point():
    weight = length_weight(30, suggested_length=12, alpha=2.0)
    assert weight[15 - 1].item() == pytest.approx(0.5)
    assert weight[:12].min() > 0.99
    assert weight[20:].max() < 1e-4


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=40), st.floats(1, 30), st.floats(0.1, 4))
def test_a_later_place_never_makes_a_token_better(rewards, suggested_length, alpha):
    reward_BT = torch.tensor([rewards])
    penalised = apply_length_penalty(reward_BT, suggested_length, alpha, "positive")
    assert (penalised <= reward_BT + 1e-6).all()
    same_reward = apply_length_penalty(torch.full_like(reward_BT, 1.5), suggested_length, alpha, "positive")
    assert (same_reward.diff() <= 1e-6).all()


def test_paper_penalty_makes_an_overlong_bad_token_better():
    """The trap that `positive` avoids."""
    rewards = torch.full((1, 20), -1.0)
    assert apply_length_penalty(rewards, 5, 2.0, "paper")[0, -1] > -0.01
    assert apply_length_penalty(rewards, 5, 2.0, "positive")[0, -1] == -1


def random_rollout(seed=0, batch=4, tokens=9):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(batch, tokens, 3, generator=generator).softmax(-1)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    mask = torch.arange(tokens)[None] < lengths[:, None]
    return probs, torch.rand(batch, generator=generator), mask


@given(st.integers(0, 10_000), st.sampled_from(["tppo", "ppo", "ppo_sum"]))
@settings(max_examples=60)
def test_no_reward_outside_the_response(seed, algorithm):
    probs, sentence, mask = random_rollout(seed)
    rewards = token_level_rewards(RL(algorithm=algorithm), probs, sentence, FORMAT, mask, SCALE)
    assert (rewards[~mask] == 0).all()


def test_placement_is_the_only_difference_between_tppo_and_ppo_sum():
    probs, _, mask = random_rollout()
    dense = token_level_rewards(RL(algorithm="tppo"), probs, None, FORMAT, mask, SCALE)
    sparse = token_level_rewards(RL(algorithm="ppo_sum"), probs, None, FORMAT, mask, SCALE)
    torch.testing.assert_close(dense.sum(-1), sparse.sum(-1))
    last = mask.sum(-1) - 1
    assert (sparse.gather(1, last[:, None])[:, 0] == sparse.sum(-1)).all()
    assert (sparse != 0).sum() == 4
    paid = FORMAT.weight > 0
    assert (dense[paid] != 0).sum() == mask[paid].sum()


@pytest.mark.parametrize("algorithm", ["tppo", "ppo", "ppo_sum"])
def test_an_unparseable_response_earns_nothing(algorithm):
    """Only losses are left to it, whatever its tokens; half the queries earn half of the gains."""
    probs, _, _ = random_rollout()
    mask = torch.ones(4, 9, dtype=torch.bool)
    sentence = torch.ones(4)
    config = RL(algorithm=algorithm, length_penalty_alpha=0)
    with_format = token_level_rewards(config, probs, sentence, FORMAT, mask, SCALE)
    plain = token_level_rewards(config, probs, sentence, PLAIN, mask, SCALE)
    torch.testing.assert_close(with_format[0], plain[0])
    assert with_format[1].max() <= 0
    assert with_format[1].sum() < plain[1].sum() - 1
    if algorithm != "ppo_sum":
        gains = plain[2].clamp(min=0).sum()
        torch.testing.assert_close(plain[2].sum() - with_format[2].sum(), 0.5 * gains + 0.5)


def test_sentence_reward_scale():
    _, _, mask = random_rollout()
    config = RL(algorithm="ppo", length_penalty_alpha=0, returns="matched", reward_values="centered")
    score = torch.tensor([0.0, 0.5, 1.0, 1.0])
    rewards = token_level_rewards(config, None, score, PLAIN, mask, SCALE)
    torch.testing.assert_close(rewards.sum(-1), torch.tensor([-6.0, 0.0, 6.0, 6.0]))
    config.returns = "as_is"
    rewards = token_level_rewards(config, None, score, PLAIN, mask, SCALE)
    torch.testing.assert_close(rewards.sum(-1), torch.tensor([-1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(("sentence_reward", "average"), [("rival", 0.2), ("token_mean", 0.3)])
def test_an_average_response_is_worth_nothing(sentence_reward, average):
    """The rival's scores average the share of relevant responses, the token model's means that of relevant words."""
    _, _, mask = random_rollout()
    config = RL(algorithm="ppo", sentence_reward=sentence_reward, length_penalty_alpha=0)
    scale = RewardScale(6.0, relevant_word_share=0.3, relevant_response_share=0.2)
    rewards = token_level_rewards(config, None, torch.full((4,), average), PLAIN, mask, scale)
    torch.testing.assert_close(rewards, torch.zeros_like(rewards))


def test_class_rewards():
    probs = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.5, 0.3, 0.2]]])
    torch.testing.assert_close(class_rewards(probs, Values(-1, 1), "expected"), torch.tensor([[0.5, 0.0, -0.1]]))
    torch.testing.assert_close(class_rewards(probs, Values(1, 2), "expected"), torch.tensor([[1.75, 0.0, 0.7]]))
    torch.testing.assert_close(class_rewards(probs, Values(-1, 1), "argmax"), torch.tensor([[1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="reward_estimator"):
        class_rewards(probs, Values(-1, 1), "sampled")


def test_reward_values():
    assert reward_values("paper", 0.2) == (1, 2)
    assert reward_values("centered", 0.2) == (-1, 1)
    irrelevant, relevant = reward_values("base_rate", 0.2)
    assert 0.2 * relevant + 0.8 * irrelevant == pytest.approx(0)
    assert relevant - irrelevant == 1
    with pytest.raises(ValueError, match="reward_values"):
        reward_values("other", 0.2)


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    rewards, values = torch.randn(2, 5) * mask, torch.randn(2, 5)
    result = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    torch.testing.assert_close(result.returns, to_go)
    torch.testing.assert_close(result.advantages, (to_go - values) * mask)


def test_policy_gradient_at_ratio_1_is_reinforce():
    logits = torch.randn(3, 4, requires_grad=True)
    advantages, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    policy_loss(logits, logits.detach(), advantages, mask, 0.2, 12).loss.backward()
    torch.testing.assert_close(logits.grad, -advantages / 12)


def test_at_last_token_needs_a_token():
    with pytest.raises(AssertionError, match="without any token"):
        at_last_token(torch.ones(1), torch.zeros(1, 3, dtype=torch.bool))
