"""What a user's reward function sees, may return, and how its mistakes are named."""

from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from itertools import repeat

import numpy as np
import pytest
import torch

from tppo.core.common import UserError
from tppo.rl.guards import GuardError
from tppo.rl.reward_function import Scores, score
from tppo.rl.trainer import OUR_METRICS


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


def everything_one(samples):
    return [torch.ones(len(s.response_ids), requires_grad=True) for s in samples]


GIVEN = {
    "tensors with gradients": everything_one,
    "lists of tensors with gradients": lambda ss: [list(reward) for reward in everything_one(ss)],
    "bf16 tensors": lambda ss: [torch.ones(len(s.response_ids), dtype=torch.bfloat16) for s in ss],
    "a generator": lambda ss: (torch.ones(len(s.response_ids)) for s in ss),
    "generators in a generator": lambda ss: ((1.0 for _ in s.response_ids) for s in ss),
    "an iterator": lambda ss: iter([[True] * len(s.response_ids) for s in ss]),
    "booleans": lambda ss: [[np.bool_(True)] * len(s.response_ids) for s in ss],
    "integers of NumPy": lambda ss: [np.ones(len(s.response_ids), dtype=np.uint8) for s in ss],
    "an array of objects": lambda ss: np.array([np.ones(len(s.response_ids)) for s in ss] + [None], dtype=object)[:-1],
    "queues of tensors with gradients": lambda ss: [deque(reward) for reward in everything_one(ss)],
    "sequences of somebody's": lambda ss: [Own(torch.ones(1, requires_grad=True)[0], len(s.response_ids)) for s in ss],
    "a tuple": lambda ss: tuple([Fraction(1)] * len(s.response_ids) for s in ss),
    "Scores with a generator": lambda ss: Scores([1] * len(s.response_ids) for s in ss),
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
def test_what_can_be_read_as_numbers_is_read(make_trainer, given):
    rollout = rollout_of(make_trainer)
    mask = rollout.batch.response_mask
    rewards = score(GIVEN[given], rollout.samples, mask).rewards
    assert torch.equal(rewards, mask.float())
    assert not rewards.requires_grad


def test_one_tensor_for_all_responses(make_trainer):
    rollout = rollout_of(make_trainer)
    rewards = score(lambda ss: torch.arange(16.0, requires_grad=True), rollout.samples, rollout.batch.response_mask)
    assert rewards.rewards.sum(-1).tolist() == list(range(16))


def test_tensors_with_gradients_train(make_trainer):
    assert make_trainer(everything_one).step().metrics["reward_mean"] > 0


def in_itself():
    entries = [1.0]
    entries.append(entries)
    return entries


class Own(Sequence):
    """A sequence of somebody's, whose items never end though its length does."""

    def __init__(self, item, length=3):
        self.item, self.length = item, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.item


def broken_generator():
    yield 1.0
    raise KeyError("mine")


UNREADABLE = {
    "a list in itself": in_itself,
    "a meta tensor": lambda: torch.zeros(3, device="meta"),
    "a conjugate": lambda: torch.tensor([1j] * 3).conj(),
    "nested tensors": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
    "a sparse tensor": lambda: torch.zeros(3).to_sparse(),
    "masked values": lambda: np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]),
    "a masked value": lambda: np.ma.masked,
    "a masked value in a list": lambda: [1.0, np.ma.masked, 3.0],
    "an own sequence of texts": lambda: Own("1"),
    "a generator that fails": broken_generator,
}


@pytest.mark.parametrize("bad", UNREADABLE)
def test_what_cannot_be_read_names_the_sample(make_trainer, bad):
    rollout = rollout_of(make_trainer)

    def reward(samples):
        return [UNREADABLE[bad]() if row == 5 else 0.0 for row in range(len(samples))]

    with pytest.raises(UserError, match=r"no numbers for sample 5 \(prompt \d+: '.*Return one float, or a list of"):
        score(reward, rollout.samples, rollout.batch.response_mask)


def test_an_endless_iterator_is_too_long(make_trainer):
    rollout = rollout_of(make_trainer)
    mask, length = rollout.batch.response_mask, len(rollout.samples[0].response_ids)
    with pytest.raises(UserError, match="more than 16 rewards for 16 samples"):
        score(lambda ss: repeat(0.0), rollout.samples, mask)
    with pytest.raises(UserError, match="99 rewards for 16 samples"):
        score(lambda ss: [0.0] * 99, rollout.samples, mask)
    with pytest.raises(UserError, match=rf"shape \({length + 1},\) for sample 0 "):
        score(lambda ss: [repeat(0.0) for _ in ss], rollout.samples, mask)


@pytest.mark.parametrize("bad", [None, "1.5", {"reward": 1}, [None], ["1"], 1j, [[1.0], [2.0, 3.0]], 10**400, object()])
def test_what_is_no_number_names_the_sample(make_trainer, bad):
    rollout = rollout_of(make_trainer)

    def reward(samples):
        return [bad if row == 5 else 0.0 for row in range(len(samples))]

    with pytest.raises(UserError, match=r"no numbers for sample 5 \(prompt \d+: '.*Return one float, or a list of"):
        score(reward, rollout.samples, rollout.batch.response_mask)


@pytest.mark.parametrize("bad", [[], [[0.5]], np.zeros((2, 2)), torch.zeros(1, 99)])
def test_a_wrong_shape_names_the_sample(make_trainer, bad):
    rollout = rollout_of(make_trainer)
    with pytest.raises(UserError, match=r"shape \(.*\) for sample 2 "):
        score(lambda ss: [0.0, 0.0, bad] + [0.0] * 13, rollout.samples, rollout.batch.response_mask)


@pytest.mark.parametrize(
    "bad", [None, 1.0, "0123456789abcdef", dict.fromkeys(range(16), 0.0), set(range(16)), torch.tensor(1.0)]
)
def test_what_is_no_list_of_rewards_says_what_to_return(make_trainer, bad):
    rollout = rollout_of(make_trainer)
    with pytest.raises(UserError, match=rf"returned {type(bad).__name__} as rewards: return a list .* 16 samples"):
        score(lambda ss: bad, rollout.samples, rollout.batch.response_mask)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (Scores([0.0] * 16, {"mine": "much"}), "the metric 'mine'"),
        (Scores([0.0] * 16, {"mine": [1.0, 2.0]}), "the metric 'mine' of shape"),
        (Scores([0.0] * 16, None), "returned NoneType as metrics: return a dict"),
        (Scores([0.0] * 16, [("mine", 1.0)]), "returned list as metrics: return a dict"),
        (Scores([0.0] * 16, {1: 1.0, "1": 2.0}), "two metrics that are written '1'"),
        (Scores([0.0] * 16, classes=[[1]] * 15), "15 classes for 16"),
        (Scores([0.0] * 16, classes=[[1] * 99] * 16), "classes of sample 0 "),
        (Scores([0.0] * 16, classes=[None] * 16), "no numbers as classes of sample 0 "),
    ],
)
def test_extras_that_do_not_fit_are_named(make_trainer, scores, message):
    rollout = rollout_of(make_trainer)
    with pytest.raises(UserError, match=message):
        score(lambda ss: scores, rollout.samples, rollout.batch.response_mask)


@pytest.mark.parametrize("bad", [float("nan"), 1.7, float("inf"), 10**30])
def test_a_class_is_an_integer(make_trainer, bad):
    rollout = rollout_of(make_trainer)
    mask = rollout.batch.response_mask

    def classes_of(value):
        classes = [[value] * len(s.response_ids) for s in rollout.samples]
        return score(lambda ss: Scores([0.0] * len(ss), classes=classes), rollout.samples, mask).classes

    with pytest.raises(UserError, match="no integers as classes of sample 0 "):
        classes_of(bad)
    assert classes_of(16_777_217)[0][0] == 16_777_217, "float32 has no such number"
    assert classes_of(2.0)[0][0] == 2


def test_a_metric_with_our_name_does_not_steer_training(make_trainer):
    with pytest.raises(UserError, match=r"names that are ours, \['kl'\]"):
        make_trainer(lambda ss: Scores([0.0] * len(ss), {"kl": 0.0})).step()


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_every_metric_of_ours_is_refused_from_a_reward_function(make_trainer, dense_reward, placement):
    settings = {"kl_placement": placement, "kl_estimator": "k2", "batch_size": 4, "minibatch_size": 4}
    trainer = make_trainer(dense_reward, **settings, micro_batch_size=4)
    written = trainer.step().metrics
    assert next(iter(written)) == "update"
    assert OUR_METRICS - {"kl_loss"} <= written.keys()
    assert written.keys() - OUR_METRICS == {"good"}, "each other name is the reward function's"
    for name in sorted(OUR_METRICS):
        trainer.reward_fn = lambda ss, name=name: Scores([0.0] * len(ss), {name: 0.75})
        with pytest.raises(UserError, match=rf"names that are ours, \['{name}'\]"):
            trainer.step()
    assert trainer.update == 1


def test_metrics_of_tensors_are_written_as_numbers(make_trainer):
    metrics = (
        make_trainer(lambda ss: Scores([0.0] * len(ss), {"mine": torch.tensor(0.5, requires_grad=True)})).step().metrics
    )
    assert metrics["mine"] == 0.5
    assert type(metrics["mine"]) is float
