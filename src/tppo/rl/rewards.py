"""From class probabilities to advantages: everything between the reward model and the policy loss.

Pure tensor functions. Shapes: B responses, T response tokens, 3 classes (0 masked, 1 irrelevant, 2 relevant).
`response_mask_BT` is True on the generated tokens, end-of-sequence included; outside it every reward,
advantage and return is exactly 0.

Why the rewards depart from the paper (numbers as in `tppo.rl.trainer`):
1. With 1 and 2 every token pays and more is better; with -1/+1 and one word in ten relevant almost every token costs
   and the policy learns to say less. Centred on the share of relevant words in the labelled SFT responses, a token is
   worth 0 on average at the start.
2. The expected value tells a doubtful token from a sure one.
3. A shrunk negative reward would be a gain.
4. Nobody is shown an unparseable response, and without the weight one endless query of relevant words paid best:
   separators and end-of-sequence are worth 0 and only take up room. (Seen on AOL: after 28 updates 97% of the responses
   were one query that ran into the token limit.) Weight and costs are the same for every algorithm.
5. Then one `kl_coef` means the same for both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tppo.core.config import RL
from tppo.reward.metrics import class_rewards, reward_values


class FormatReward(NamedTuple):
    """What keeping to the task is worth, the same for every algorithm."""

    weight: Tensor
    """(B,) in [0, 1], multiplies positive rewards."""
    reward: Tensor
    """(B,), added at the last token."""


class RewardScale(NamedTuple):
    """What the rewards are measured in, fixed before training: shares and lengths of the labelled SFT responses."""

    suggested_length: float
    """sl of Eq. 4, in policy tokens."""
    relevant_word_share: float
    relevant_response_share: float


def length_weight(num_tokens: int, suggested_length: float, alpha: float) -> Tensor:
    """Eq. 4 at the positions l = 1..T: about 1 up to `suggested_length`, 1/2 at suggested_length + 6/alpha."""
    position_T = torch.arange(1, num_tokens + 1, dtype=torch.float64)
    return torch.sigmoid(6 - alpha * (position_T - suggested_length)).float()


def apply_length_penalty(rewards_BT: Tensor, suggested_length: float, alpha: float, on: str) -> Tensor:
    """Eq. 5: R' = lwp(l) R, on positive rewards only (`on="positive"`) or on all (`on="paper"`)."""
    if alpha == 0:
        return rewards_BT
    weighted_BT = rewards_BT * length_weight(rewards_BT.shape[1], suggested_length, alpha).to(rewards_BT.device)
    return torch.where(rewards_BT > 0, weighted_BT, rewards_BT) if on == "positive" else weighted_BT


def at_last_token(value_B: Tensor, response_mask_BT: Tensor) -> Tensor:
    """Place one value per response at its last token, (B,) -> (B, T). Every response has at least one token."""
    assert response_mask_BT.any(-1).all(), "a response without any token"
    last_B1 = response_mask_BT.sum(-1, keepdim=True) - 1
    return torch.zeros_like(response_mask_BT, dtype=value_B.dtype).scatter_(1, last_B1, value_B[:, None])


def token_level_rewards(
    config: RL,
    class_probs_BT3: Tensor | None,
    sentence_score_B: Tensor | None,
    format_reward: FormatReward,
    response_mask_BT: Tensor,
    scale: RewardScale,
) -> Tensor:
    """The reward of every token without KL, (B, T). Only this function knows which algorithm is running.

    - tppo: the token rewards where they arise.
    - ppo_sum: their sum at the last token (same information, sparse placement).
    - ppo: the sentence-level score in [0, 1] (by `sentence_reward`: the rival's, or the token model's mean) at the
      last token, on the same value scale as a token (`reward_values`) and, with `returns="matched"`, times the
      suggested length, so that the best return is as large as tppo's and one beta means the same for both.
    """
    if config.algorithm == "ppo":
        assert sentence_score_B is not None
        # What an SFT response scores on average: its chance of relevance, or its share of relevant words.
        rival = config.sentence_reward == "rival"
        average = scale.relevant_response_share if rival else scale.relevant_word_share
        low, high = reward_values(config.reward_values, average)
        times = scale.suggested_length if config.returns == "matched" else 1.0
        rewards_BT = at_last_token((low + (high - low) * sentence_score_B) * times, response_mask_BT)
    else:
        assert class_probs_BT3 is not None
        values = reward_values(config.reward_values, scale.relevant_word_share)
        rewards_BT = class_rewards(class_probs_BT3, values, config.reward_estimator)
    rewards_BT = apply_length_penalty(
        rewards_BT * response_mask_BT, scale.suggested_length, config.length_penalty_alpha, config.length_penalty_on
    )
    rewards_BT = torch.where(rewards_BT > 0, rewards_BT * format_reward.weight[:, None], rewards_BT)
    if config.algorithm == "ppo_sum":
        rewards_BT = at_last_token(rewards_BT.sum(-1), response_mask_BT)
    return rewards_BT + at_last_token(format_reward.reward, response_mask_BT)


def length_penalty_rewards(config: RL, response_mask_BT: Tensor, finished_B: Tensor, max_tokens: int) -> Tensor:
    """Penalties for length that go with any reward function, (B, T), at the last token.

    `missing_eos_penalty` for a response the token limit ended; `overlong_penalty` in proportion to how far the
    response reaches into the last `overlong_buffer` tokens before the limit (DAPO, Yu et al. 2025, Eq. 13).
    """
    length_B = response_mask_BT.sum(-1)
    into_buffer_B = (length_B - (max_tokens - config.overlong_buffer)).clamp(min=0) / config.overlong_buffer
    penalty_B = config.missing_eos_penalty * ~finished_B + config.overlong_penalty * into_buffer_B
    return at_last_token(-penalty_B, response_mask_BT)


class Advantages(NamedTuple):
    advantages: Tensor
    """(B, T), 0 outside the response."""
    returns: Tensor
    """(B, T), targets of the value function, 0 outside the response."""


def gae(rewards_BT: Tensor, values_BT: Tensor, response_mask_BT: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016) over the response tokens.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}; the value after the last token
    is 0: the episode is over, also when the token limit ended it.
    """
    values_BT = values_BT * response_mask_BT
    rewards_BT = rewards_BT * response_mask_BT
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * lam * next_advantage_B) * response_mask_BT[:, t]
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return Advantages(advantages_BT, (advantages_BT + values_BT) * response_mask_BT)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (values_BT * mask_BT).sum() / mask_BT.sum()


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and (unbiased) variance 1 over the masked entries, 0 elsewhere (as verl's `masked_whiten`)."""
    count = mask_BT.sum()
    mean = masked_mean(values_BT, mask_BT)
    if count < 2:
        return (values_BT - mean) * mask_BT
    variance = masked_mean((values_BT - mean) ** 2, mask_BT) * count / (count - 1)
    return (values_BT - mean) * torch.rsqrt(variance + 1e-8) * mask_BT
