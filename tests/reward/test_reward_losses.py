"""Eq. 1-3 against closed forms, and the properties of the class-ratio mask."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.reward.losses import class_ratio_mask, expected_relevance, global_loss, local_loss, sentence_loss, total_loss


def batch(seed: int = 0, b: int = 4, t: int = 7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(0, 3, (b, t), generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    labels = torch.randint(0, 2, (b,), generator=generator)
    return logits, classes, mask, labels


def test_local_loss_is_weighted_cross_entropy_of_the_gold_class():
    logits, classes, mask, _ = batch()
    keep = torch.ones_like(mask)
    keep[0] = False
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    total = weight_sum = 0.0
    for b, t in torch.nonzero(mask & keep).tolist():
        row, gold = logits[b, t].tolist(), int(classes[b, t])
        log_prob = row[gold] - math.log(sum(math.exp(x) for x in row))
        total -= float(weights[gold]) * log_prob
        weight_sum += float(weights[gold])
    loss = local_loss(logits, classes, mask, weights, keep)
    assert loss.item() == pytest.approx(total / weight_sum, rel=1e-12)
    valid = mask & keep
    expected = F.cross_entropy(logits[valid], classes[valid], weight=weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_local_loss_ignores_masked_tokens_and_survives_none():
    logits, classes, mask, _ = batch()
    weights, keep = torch.ones(3, dtype=torch.float64), torch.ones_like(mask)
    local_loss(logits, classes, mask, weights, keep).backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask].abs().sum(-1) > 0).all()
    nothing = local_loss(logits, classes, torch.zeros_like(mask), weights, keep)
    nothing.backward()
    assert nothing.item() == 0


def test_local_loss_matches_finite_differences():
    logits, classes, mask, _ = batch()
    keep = torch.ones_like(mask)
    keep[1] = False
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: local_loss(x, classes, mask, weights, keep), logits)


def test_local_loss_does_not_depend_on_batch_size():
    logits, classes, mask, _ = batch()
    weights, keep = torch.ones(3, dtype=torch.float64), torch.ones_like(mask)
    once = local_loss(logits, classes, mask, weights, keep)
    double = [torch.cat([x, x]) for x in (logits, classes, mask, keep)]
    twice = local_loss(double[0], double[1], double[2], weights, double[3])
    assert once.item() == pytest.approx(twice.item())


def test_expected_relevance_is_the_two_way_softmax():
    logits, *_ = batch()
    two_way = logits[..., 1:].softmax(-1)
    torch.testing.assert_close(expected_relevance(logits), two_way[..., 1])
    moved = logits.detach().clone()
    moved[..., 0] += 5
    torch.testing.assert_close(expected_relevance(moved), expected_relevance(logits.detach()))


def test_global_loss_by_hand():
    """One response: tokens of gold class 0, 1, 2 and one masked; probability of relevance 0.5 and 0.75."""
    logits = torch.zeros(2, 4, 3)
    logits[0, 2, 2] = math.log(3)
    classes = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    labels = torch.tensor([1, 1])
    # mean over the two word tokens of response 0; response 1 has no word and is left out
    expected = ((0.5 + 0.75) / 2 - 1) ** 2
    assert global_loss(logits, classes, mask, labels, "expected").item() == pytest.approx(expected)
    hard = ((0 + 1) / 2 - 1) ** 2
    assert global_loss(logits, classes, mask, labels, "straight_through").item() == pytest.approx(hard)


@pytest.mark.parametrize("estimator", ["expected", "straight_through"])
def test_global_loss_has_a_gradient(estimator):
    """The paper's argmax has none. It reaches classes 1 and 2 of word tokens and nothing else."""
    logits, classes, mask, labels = batch()
    global_loss(logits, classes, mask, labels, estimator).backward()
    words = mask & (classes > 0)
    assert (logits.grad[words][:, 1:].abs() > 0).float().mean() > 0.5  # all but those of a perfect mean
    assert (logits.grad[..., 0] == 0).all()
    assert (logits.grad[~words] == 0).all()


def test_global_loss_descends():
    logits, classes, mask, labels = batch()
    classes[:, 0], mask[:, 0] = 2, True
    before = global_loss(logits, classes, mask, labels, "expected")
    before.backward()
    after = global_loss(logits - 0.1 * logits.grad, classes, mask, labels, "expected")
    assert after < before


def test_global_loss_matches_finite_differences():
    logits, classes, mask, labels = batch()
    assert torch.autograd.gradcheck(lambda x: global_loss(x, classes, mask, labels, "expected"), logits)


def test_straight_through_passes_the_gradient_of_the_expectation():
    """Of a squared error 2 (mean - label) d mean: both estimators share d mean and differ in the mean only."""
    logits, classes, mask, _ = batch()
    classes[:, 0], mask[:, 0] = 2, True
    words = mask & (classes > 0)
    for row in range(len(logits)):
        mean, gradient = [], []
        for estimator in ("expected", "straight_through"):
            one = logits[row : row + 1].detach().requires_grad_()
            loss = global_loss(one, classes[[row]], mask[[row]], torch.tensor([0]), estimator)
            loss.backward()
            mean.append(loss.sqrt().item())  # the label is 0
            gradient.append(one.grad[words[[row]]])
        torch.testing.assert_close(gradient[0] * mean[1], gradient[1] * mean[0])


def test_global_loss_of_no_words_is_zero():
    logits, classes, mask, labels = batch()
    loss = global_loss(logits, torch.zeros_like(classes), mask, labels, "expected")
    loss.backward()
    assert loss.item() == 0


def test_total_loss_is_the_weighted_sum():
    loss = total_loss(torch.tensor(2.0), torch.tensor(0.5), 0.4, 0.6)
    assert loss.total.item() == pytest.approx(1.1)
    assert (loss.local.item(), loss.global_.item()) == (2.0, 0.5)


@pytest.mark.parametrize(("local", "global_"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_part_without_weight_gives_no_gradient(local, global_):
    """The ends of the ablation: the gradient is the other part's alone, and class 0 is untrained without Eq. 1."""
    logits, classes, mask, labels = batch()
    weights, keep = torch.ones(3, dtype=torch.float64), torch.ones_like(mask)
    parts = local_loss(logits, classes, mask, weights, keep), global_loss(logits, classes, mask, labels, "expected")
    (alone,) = torch.autograd.grad(parts[0] if local else parts[1], logits, retain_graph=True)
    (both,) = torch.autograd.grad(total_loss(*parts, local, global_).total, logits)
    torch.testing.assert_close(both, alone)
    assert bool((both[..., 0] == 0).all()) == (local == 0)


def test_sentence_loss():
    logits, labels = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1, 0, 0])
    keep = torch.tensor([True, True, False])
    bce = (math.log(1 + math.exp(-0.3)) + math.log(1 + math.exp(-1.0))) / 2
    assert sentence_loss(logits, labels, keep, "bce").item() == pytest.approx(bce, rel=1e-5)
    mse = ((1 / (1 + math.exp(-0.3)) - 1) ** 2 + (1 / (1 + math.exp(1.0))) ** 2) / 2
    assert sentence_loss(logits, labels, keep, "mse").item() == pytest.approx(mse, rel=1e-5)


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_sentence_loss_gradient(kind):
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    labels, keep = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(lambda x: sentence_loss(x, labels, keep, kind), logits)
    sentence_loss(logits, labels, keep, kind).backward()
    assert logits.grad[0] < 0 < logits.grad[1], "towards the labels"
    assert logits.grad[2] == 0, "a response the balance left out"
    nothing = sentence_loss(logits, labels, torch.zeros(3, dtype=torch.bool), kind)
    nothing.backward()
    assert nothing.item() == 0


rows = st.lists(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=12, max_size=12), min_size=1, max_size=8)


@given(rows=rows, flip=st.booleans(), ratio=st.floats(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_class_ratio_mask_properties(rows, flip, ratio, seed):
    classes = torch.tensor(rows)
    if flip:
        classes = torch.where(classes > 0, 3 - classes, 0)
    mask = torch.rand(classes.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    keep = class_ratio_mask(classes, mask, ratio, torch.Generator().manual_seed(seed))
    again = class_ratio_mask(classes, mask, ratio, torch.Generator().manual_seed(seed))
    assert torch.equal(keep, again), "seeded"
    counts = {c: int((mask & (classes == c)).sum()) for c in (1, 2)}
    kept = {c: int((mask & keep & (classes == c)).sum()) for c in (1, 2)}
    minority, majority = sorted((1, 2), key=lambda c: counts[c])
    assert kept[minority] == counts[minority], "the minority is never dropped"
    assert keep[~mask | (classes == 0)].all(), "nor separators, nor what is masked anyway"
    bound = int(ratio * max(counts[minority], 1))
    assert kept[majority] == min(counts[majority], bound), "no more is dropped than needed"


def test_class_ratio_of_zero_drops_nothing():
    classes = torch.ones(4, 50, dtype=torch.long)
    mask = torch.ones_like(classes, dtype=torch.bool)
    assert not class_ratio_mask(classes, mask, 3.0, torch.Generator()).all()
    assert class_ratio_mask(classes, mask, 0, torch.Generator()).all()


def test_class_ratio_mask_draws_anew():
    classes = torch.ones(4, 50, dtype=torch.long)
    classes[0, :5] = 2
    mask = torch.ones_like(classes, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    first, second = (class_ratio_mask(classes, mask, 3.0, generator) for _ in range(2))
    assert not torch.equal(first, second)
