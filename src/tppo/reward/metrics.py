"""What a reward model knows of held-out users: losses, ranking (AUC), decisions (F1), calibration (ECE), collapse.

A number that the data cannot give (an AUC over a single class, the F1 of no positives) is None, never 0.5.

Shapes: N responses or tokens, B responses, T tokens, U users, C = 3 classes (0 separator, 1 irrelevant, 2 relevant).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tppo.core.config import Reward
from tppo.core.stats import ClusterBootstrap, IntervalEstimate, percentile_interval
from tppo.reward import losses
from tppo.reward.align import IRRELEVANT, RELEVANT
from tppo.reward.data import Item, Pair
from tppo.reward.models import RewardModel, SentenceRewardModel, TokenRewardModel, sentence_probabilities

COLLAPSED_STD = 0.02
"""Scores in [0, 1] that vary less than this tell no response from another: RL on them learns nothing."""


def evaluate(reward_model: RewardModel, items: Sequence[Item], settings: Reward) -> dict[str, Any]:
    """Held-out losses (without the class-ratio mask) and metrics; `auc` picks the checkpoint.

    The columns of whole responses are the same for both models, so that their curves can share a chart.
    """
    labels_N = np.array([item.label for item in items])
    if isinstance(reward_model, TokenRewardModel):
        logits = reward_model.response_logits(items)
        scores_N = mean_relevances(logits)
        own = _evaluate_tokens(logits, items, labels_N, settings)
    else:
        assert isinstance(reward_model, SentenceRewardModel)
        logits_N = reward_model.sentence_logits(items)
        scores_N = sentence_probabilities(items, logits_N)
        readable_N = torch.tensor([len(item.spans) > 0 for item in items])
        loss = losses.sentence_loss(
            torch.from_numpy(logits_N), torch.tensor(labels_N), readable_N, settings.sentence_loss
        )
        own = {"loss": loss.item(), "auc": auc(labels_N == 1, scores_N)}
    return {**own, **_quality("sentence", labels_N == 1, scores_N), "sentence_std": float(scores_N.std())}


def _quality(name: str, relevant_N: np.ndarray, scores_N: np.ndarray) -> dict[str, float | None]:
    """How well scores in [0, 1] rank, decide at 0.5, and tell the chance of being relevant."""
    return {
        f"{name}_auc": auc(relevant_N, scores_N),
        f"{name}_f1": f1(relevant_N, scores_N > 0.5),
        f"{name}_ece": calibration_error(relevant_N, scores_N),
    }


def _evaluate_tokens(
    logits: Sequence[np.ndarray], items: Sequence[Item], labels_B: np.ndarray, settings: Reward
) -> dict[str, Any]:
    logits_BTC = pad_sequence([torch.tensor(logits_TC) for logits_TC in logits], batch_first=True)
    classes_BT = pad_sequence([torch.tensor(item.classes, dtype=torch.long) for item in items], batch_first=True)
    mask_BT = pad_sequence([torch.ones(len(item.classes), dtype=torch.bool) for item in items], batch_first=True)
    keep_BT = torch.ones_like(mask_BT)
    loss = losses.token_loss(logits_BTC, classes_BT, mask_BT, torch.tensor(labels_B), keep_BT, settings)
    probs_NC, classes_N = softmax(np.concatenate(logits), axis=-1), classes_BT[mask_BT].numpy()
    word_N = classes_N > 0
    relevance_N, relevant_N = word_relevance(probs_NC[word_N]), classes_N[word_N] == RELEVANT
    words = _quality("token", relevant_N, relevance_N)
    macro_auc, weighted_auc = class_auc(classes_N, probs_NC)
    classes = {"macro_auc": macro_auc, "weighted_auc": weighted_auc}
    return {**losses.as_numbers(loss), "auc": words["token_auc"], **classes, **words}


def sentence_scores(reward_model: RewardModel, pairs: Sequence[Pair], description: str | None = None) -> np.ndarray:
    """Either model's answer to the sentence-level question: (N,) in [0, 1]; of the token model its tokens' mean."""
    if isinstance(reward_model, SentenceRewardModel):
        return sentence_probabilities(pairs, reward_model.sentence_logits(pairs, description))
    return mean_relevances(reward_model.response_logits(pairs, description))


def sentence_check(scores_N: np.ndarray, labels_N: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    """Whether sentence-level scores on held-out responses tell a relevant one from an irrelevant one at all.

    Returns:
        sentence_auc {value, low, high} (95%, users drawn), score_std, collapsed (None: the held-out rows cannot tell),
        and why: the reasons, or what is missing.
    """
    found = auc_interval(labels_N == 1, scores_N, users)
    std = float(scores_N.std())
    why = []
    if std < COLLAPSED_STD:
        why.append(f"held-out scores are nearly constant (standard deviation {std:.4f}, least {COLLAPSED_STD})")
    if found.low is not None and found.low <= 0.5:
        why.append(f"held-out sentence AUC {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] is not above chance")
    collapsed: bool | None = bool(why)
    if not why and found.low is None:
        collapsed = None
        why.append("held-out rows hold one class or one user only, so the sentence AUC has no interval")
    return {"sentence_auc": found.as_dict(), "score_std": std, "collapsed": collapsed, "why": "; ".join(why)}


def word_relevance(probs_NC: np.ndarray) -> np.ndarray:
    """(N,) chance of class 2 among classes 1 and 2, in [0, 1]."""
    words_N = probs_NC[:, IRRELEVANT] + probs_NC[:, RELEVANT]
    return np.divide(probs_NC[:, RELEVANT], words_N, out=np.zeros_like(words_N), where=words_N > 0)


def response_relevance(probs_TC: np.ndarray) -> float:
    """One number for a response from its tokens' class probabilities, in [0, 1].

    The token model's answer to the sentence-level question: the mean relevance of its tokens, each counted by
    how likely it is a word token at all. A response without words is irrelevant: 0.
    """
    _, irrelevant, relevant = probs_TC.sum(axis=0, dtype=np.float64)
    words = irrelevant + relevant
    # Rounded: of a model that says the same of every token, sums over more or fewer tokens would differ in their last
    # digits, and an AUC would rank that noise.
    return round(float(relevant / words), 6) if words > 0 else 0.0


def mean_relevances(logits: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) `response_relevance` of N responses from the token model's logits (T_i, C); 0 without tokens."""
    return np.array([response_relevance(softmax(row_TC, axis=-1)) if len(row_TC) else 0.0 for row_TC in logits])


def auc(positive_N: np.ndarray, scores_N: np.ndarray) -> float | None:
    """Chance that a random positive (True) scores above a random negative; a tie counts half (Mann-Whitney U).

    Exact up to one division, so that two orders with as many pairs won have the same AUC and the better checkpoint is
    never chosen by rounding; scikit-learn's sum of trapezoids is not (it differs in the last digit in 1 of 4 cases).
    """
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return None
    rank_sum = rankdata(scores_N)[positive_N].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def class_auc(classes_N: np.ndarray, probs_NC: np.ndarray) -> tuple[float | None, float | None]:
    """Macro and weighted mean of each gold class's AUC against the rest; None when fewer than two are present.

    In the macro mean every class present counts alike, in the weighted one by its share (the paper's Figures 6 and 10).
    """
    present, counts = np.unique(classes_N, return_counts=True)
    if len(present) < 2:
        return None, None
    each = np.array([auc(classes_N == c, probs_NC[:, c]) for c in present], dtype=float)
    return float(each.mean()), float(np.average(each, weights=counts))


def auc_interval(
    positive_N: np.ndarray, scores_N: np.ndarray, users: Sequence[str], draws: int = 1000, seed: int = 0
) -> IntervalEstimate:
    """AUC with its 95% bootstrap interval; users (N,) are drawn, since responses to one user resemble each other."""
    value = auc(positive_N, scores_N)
    if value is None:
        return IntervalEstimate(None, None, None)
    bootstrap = ClusterBootstrap(users, draws, seed)
    if bootstrap.clusters < 2:
        return IntervalEstimate(value, None, None)
    drawn = []
    for times_U in bootstrap.drawn_totals(np.eye(bootstrap.clusters)):
        rows = np.repeat(np.arange(len(scores_N)), times_U[bootstrap.cluster_of_N].astype(int))
        drawn.append(auc(positive_N[rows], scores_N[rows]))
    # None, of a draw of one class, becomes NaN.
    return percentile_interval(value, np.array(drawn, dtype=float), bootstrap.clusters)


def f1(positive_N: np.ndarray, predicted_N: np.ndarray) -> float | None:
    """Harmonic mean of precision and recall; None when there is nothing to find and nothing was found."""
    found = int(positive_N.sum()) + int(predicted_N.sum())
    return float(2 * (positive_N & predicted_N).sum() / found) if found else None


def calibration_error(positive_N: np.ndarray, probs_N: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error: |predicted - observed| share of positives, mean over equal-width bins."""
    if not len(probs_N):
        return None
    which_N = np.minimum((probs_N * bins).astype(int), bins - 1)
    gap = np.bincount(which_N, weights=probs_N - positive_N, minlength=bins)
    return float(np.abs(gap).sum() / len(probs_N))


class Values(NamedTuple):
    """What an irrelevant and a relevant token (or response) is worth."""

    irrelevant: float
    relevant: float


def reward_values(kind: str, relevant_share: float) -> Values:
    """`base_rate`: 0 on average when `relevant_share` are relevant. `centered`: -1/+1. `paper`: 1/2."""
    if kind == "base_rate":
        return Values(-relevant_share, 1.0 - relevant_share)
    if kind == "centered":
        return Values(-1.0, 1.0)
    if kind == "paper":
        return Values(1.0, 2.0)
    raise ValueError(f"unknown rl.reward_values {kind!r}: use 'base_rate', 'centered' or 'paper'")


def class_rewards(class_probs_BT3: Tensor, values: Values, estimator: str) -> Tensor:
    """Reward of every token from its class probabilities, (B, T, 3) -> (B, T); class 0 is worth 0.

    `expected`: sum_c p_c value_c. `argmax`: the value of the most likely class (the paper's R_phi).
    """
    value_3 = torch.tensor([0.0, *values], dtype=class_probs_BT3.dtype)
    if estimator == "argmax":
        return value_3[class_probs_BT3.argmax(-1)]
    if estimator == "expected":
        return class_probs_BT3 @ value_3
    raise ValueError(f"unknown rl.reward_estimator {estimator!r}: use 'expected' or 'argmax'")
