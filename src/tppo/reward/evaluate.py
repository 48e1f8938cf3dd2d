"""What a reward model knows of held-out users: losses, ranking, decisions, calibration, and whether it collapsed.

Shapes: N responses or tokens, B responses, T tokens, C = 3 classes (0 separator, 1 irrelevant, 2 relevant).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tppo.config import Reward
from tppo.reward import losses, metrics
from tppo.reward.align import RELEVANT
from tppo.reward.data import Item, Pair
from tppo.reward.models import (
    RewardModel,
    SentenceRewardModel,
    TokenRewardModel,
    sentence_probabilities,
    softmax,
)

COLLAPSED_STD = 0.02
"""Scores in [0, 1] that vary less than this tell no response from another: RL on them learns nothing."""


def evaluate(reward_model: RewardModel, items: Sequence[Item], settings: Reward) -> dict[str, Any]:
    """Held-out losses (without the class-ratio mask) and metrics; `auc` picks the checkpoint."""
    labels_N = np.array([item.label for item in items])
    if isinstance(reward_model, TokenRewardModel):
        logits = reward_model.response_logits([item.pair for item in items])
        own = _evaluate_tokens(logits, [item.classes for item in items], labels_N, settings)
        return {**own, **_evaluate_sentences(mean_relevances(logits), labels_N)}
    assert isinstance(reward_model, SentenceRewardModel)
    pairs = [item.pair for item in items]
    logits_N = reward_model.sentence_logits(pairs)
    readable_N = torch.tensor([len(pair.spans) > 0 for pair in pairs])
    loss = losses.sentence_loss(torch.from_numpy(logits_N), torch.tensor(labels_N), readable_N, settings.sentence_loss)
    sentences = _evaluate_sentences(sentence_probabilities(pairs, logits_N), labels_N)
    return {"loss": loss.item(), "auc": sentences["sentence_auc"], **sentences}


def sentence_scores(reward_model: RewardModel, pairs: Sequence[Pair], description: str | None = None) -> np.ndarray:
    """Either model's answer to the sentence-level question: (N,) in [0, 1]; of the token model its tokens' mean."""
    if isinstance(reward_model, SentenceRewardModel):
        return sentence_probabilities(pairs, reward_model.sentence_logits(pairs, description=description))
    return mean_relevances(reward_model.response_logits(pairs, description=description))


def sentence_check(scores_N: np.ndarray, labels_N: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    """Whether sentence-level scores on held-out responses tell a relevant one from an irrelevant one at all.

    Returns:
        sentence_auc {value, low, high} (95%, users drawn), score_std, collapsed (None: the held-out rows cannot tell),
        and why: the reasons, or what is missing.
    """
    auc = metrics.auc_interval(labels_N == 1, scores_N, users)
    std = float(scores_N.std())
    why = []
    if std < COLLAPSED_STD:
        why.append(f"held-out scores are nearly constant (standard deviation {std:.4f}, least {COLLAPSED_STD})")
    if auc.low is not None and auc.low <= 0.5:
        why.append(f"held-out sentence AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}] is not above chance")
    collapsed: bool | None = bool(why)
    if not why and auc.low is None:
        collapsed = None
        why.append("held-out rows hold one class or one user only, so the sentence AUC has no interval")
    return {"sentence_auc": auc.as_dict(), "score_std": std, "collapsed": collapsed, "why": "; ".join(why)}


def mean_relevances(logits: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) mean relevance of the tokens of N responses from the token model's logits (T_i, 3); 0 without tokens."""
    return np.array([metrics.response_relevance(softmax(logits_TC)) if len(logits_TC) else 0.0 for logits_TC in logits])


def _evaluate_sentences(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """The same columns for both models, so that their curves can share a chart."""
    relevant_N = labels_N == 1
    return {
        "sentence_auc": metrics.auc(relevant_N, scores_N),
        "sentence_f1": metrics.f1(relevant_N, scores_N > 0.5),
        "sentence_ece": metrics.calibration_error(relevant_N, scores_N),
        "sentence_std": float(scores_N.std()),
    }


def _evaluate_tokens(
    logits: Sequence[np.ndarray], classes: Sequence[Sequence[int]], labels_B: np.ndarray, settings: Reward
) -> dict[str, Any]:
    logits_BTC = pad_sequence([torch.tensor(logits_TC) for logits_TC in logits], batch_first=True)
    classes_BT = pad_sequence([torch.tensor(row, dtype=torch.long) for row in classes], batch_first=True)
    mask_BT = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in classes], batch_first=True)
    keep_BT = torch.ones_like(mask_BT)
    loss = losses.token_loss(logits_BTC, classes_BT, mask_BT, torch.tensor(labels_B), keep_BT, settings)
    probs_NC, classes_N = softmax(np.concatenate(logits)), np.concatenate([np.array(row, int) for row in classes])
    word_N = classes_N > 0
    relevance_N, relevant_N = metrics.word_relevance(probs_NC[word_N]), classes_N[word_N] == RELEVANT
    token_auc, each_class = metrics.auc(relevant_N, relevance_N), metrics.class_auc(classes_N, probs_NC)
    return {
        **losses.as_numbers(loss),
        "auc": token_auc,
        "token_auc": token_auc,
        "macro_auc": each_class.macro,
        "weighted_auc": each_class.weighted,
        "token_f1": metrics.f1(relevant_N, relevance_N > 0.5),
        "token_ece": metrics.calibration_error(relevant_N, relevance_N),
    }
