"""What must not change the losses (float32, 1e-6): padding at either side, its token, an unfinished response."""

import pytest
import torch
import torch.nn.functional as F

from tppo.generate.engine import Generation
from tppo.rl.policy import TokenBatch, pad_batch
from tppo.rl.reward_function import make_sample
from tppo.rl.trainer import Rollout

EOS = 0
RESPONSES = [
    ([1, 2, 3, 4, 5, 6], [7, 5, EOS]),
    ([9], [3]),  # no end-of-sequence
    ([4, EOS, 4], [EOS]),  # the padding token inside a prompt, and as the whole response
    ([2, 2], [5, 5, 5, 8, 5]),
]


def rollout_of(tokenizer, left=0, right=0, pad_id=EOS):
    generations = [Generation(p, r, tokenizer.decode(r, skip_special_tokens=True), r[-1] == EOS) for p, r in RESPONSES]
    batch = pad_batch(generations, pad_id)
    ids = F.pad(batch.input_ids, (left, right), value=pad_id)
    attention = F.pad(batch.attention_mask, (left, right), value=False)
    mask = F.pad(batch.response_mask, (0, right), value=False)
    return Rollout([make_sample(tokenizer, g, i) for i, g in enumerate(generations)], TokenBatch(ids, attention, mask))


def losses(make_trainer, rollout, **settings):
    """Metrics of one update on this very rollout, and the weights after it."""
    trainer = make_trainer(batch_size=4, minibatch_size=4, **{"micro_batch_size": 4, **settings})
    trainer.step()  # so that policy and reference differ
    trainer._roll_out = lambda: rollout
    result = trainer.step()
    assert (result.rewards.rewards[~rollout.batch.response_mask] == 0).all()
    metrics = {name: v for name, v in result.metrics.items() if "seconds" not in name and "per_second" not in name}
    return metrics, list(trainer.policy.parameters())


@pytest.mark.parametrize("function", ["probe", "shared"])
@pytest.mark.parametrize(
    ("changed", "micro"),
    [({"left": 5}, 4), ({"right": 4}, 4), ({"left": 3, "right": 7}, 4), ({"pad_id": 11}, 4), ({}, 1), ({}, 2)],
)
def test_losses_do_not_depend_on_padding_or_batching(make_trainer, tokenizer, function, changed, micro):
    plain, weights = losses(make_trainer, rollout_of(tokenizer), value_function=function)
    other, other_weights = losses(
        make_trainer, rollout_of(tokenizer, **changed), value_function=function, micro_batch_size=micro
    )
    # Gradient norms are sums of many squares; everything else is held to 1e-6.
    assert other.pop("grad_norm") == pytest.approx(plain.pop("grad_norm"), rel=1e-5)
    assert other == pytest.approx(plain, abs=1e-6)
    for a, b in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
