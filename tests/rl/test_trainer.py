"""The PPO loop on a tiny model: what must hold at the first step, what must not depend on batching, and learning."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tppo.config import RL
from tppo.policy.generate import Generation
from tppo.rl.checkpoint import keep_rows_until, load_newest_checkpoint, save_checkpoint
from tppo.rl.policy import PolicyWithValue, response_logprobs
from tppo.rl.rollout import pad_batch
from tppo.rl.trainer import RewardResult, TokenPPOTrainer

LETTERS = [chr(ord("a") + i) for i in range(20)]
GOOD = 5  # the id of the token the rewards below like


@pytest.fixture
def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<eos>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def tiny_lm(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=21,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        attention_dropout=0.3,  # must be off in RL, or the first ratio is not 1
    )
    return LlamaForCausalLM(config).eval()


def dense_reward(rollout):
    """+1 for each token that is GOOD, paid where it stands."""
    width = rollout.batch.response_mask.shape[1]
    good = (rollout.batch.input_ids[:, -width:] == GOOD) & rollout.batch.response_mask
    return RewardResult(good.float(), {"good": good.float().sum(-1).mean().item()})


def make_trainer(tokenizer, reward_fn=dense_reward, **settings):
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
    lm = tiny_lm()
    prompts = [[1 + (i * j) % 20 for j in range(1, 3 + i % 4)] for i in range(24)]
    return TokenPPOTrainer(
        PolicyWithValue(lm),
        copy.deepcopy(lm),
        copy.deepcopy(lm),
        tokenizer,
        prompts,
        reward_fn,
        config,
        max_response_tokens=8,
        seed=3,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_any_step_kl_is_zero_and_the_ratio_one(tokenizer, precision):
    metrics = make_trainer(tokenizer, precision=precision).step().metrics
    assert metrics["kl"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["update"] == 1


def test_dropout_would_be_caught(tokenizer):
    trainer = make_trainer(tokenizer)
    trainer.policy.train()
    with pytest.raises(AssertionError, match="dropout"):
        trainer.step()


@pytest.mark.parametrize("algorithm", ["dense", "sparse"])
def test_learns(tokenizer, algorithm):
    def sparse_reward(rollout):
        dense = dense_reward(rollout)
        total = dense.rewards.sum(-1, keepdim=True)
        last = rollout.batch.response_mask.sum(-1, keepdim=True) - 1
        return RewardResult(torch.zeros_like(dense.rewards).scatter_(1, last, total), dense.metrics)

    trainer = make_trainer(tokenizer, dense_reward if algorithm == "dense" else sparse_reward, batch_size=64)
    rows = [trainer.step().metrics for _ in range(20)]
    assert rows[0]["good"] < 1
    assert sum(row["good"] for row in rows[-3:]) / 3 > 3
    assert rows[-1]["kl"] > 0.5


def test_same_seed_same_numbers_and_accumulation_does_not_matter(tokenizer):
    whole = make_trainer(tokenizer)
    again = make_trainer(tokenizer)
    parts = make_trainer(tokenizer, micro_batch_size=2)
    for _ in range(3):
        rows = [trainer.step().metrics for trainer in (whole, again, parts)]
        timeless = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
        assert timeless[0] == timeless[1]
        assert timeless[0] == pytest.approx(timeless[2], abs=1e-5)


def test_value_gradient_setting(tokenizer):
    for detach, touched in ((True, False), (False, True)):
        lm = tiny_lm()
        policy = PolicyWithValue(lm, detach_value=detach)
        torch.nn.init.ones_(policy.value_head.weight)
        batch = pad_batch([Generation([1, 2], [3, 0], "b", True)], 0)
        policy(batch, 1.0, "fp32").values.sum().backward()
        assert (lm.model.layers[0].mlp.up_proj.weight.grad is not None) == touched
        assert policy.value_head.weight.grad is not None


def test_padding_changes_no_logprob():
    """Left and right padding, pad = eos: the numbers of a response alone and in a batch."""
    lm = tiny_lm()
    generations = [
        Generation([1, 2, 3, 4, 5, 6], [7, 8, 0], "", True),
        Generation([9], [3], "", False),
        Generation([4, 0, 4], [0], "", True),
        Generation([2, 2], [5, 5, 5, 5, 5], "", False),
    ]
    together, _ = response_logprobs(lm, pad_batch(generations, 0), 1.0)
    for row, generation in enumerate(generations):
        alone, _ = response_logprobs(lm, pad_batch([generation], 0), 1.0)
        length = len(generation.response_ids)
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-6, rtol=0)
        assert (together[row, length:] == 0).all()
        ids = torch.tensor([generation.prompt_ids + generation.response_ids])
        logits = lm(ids).logits[0, len(generation.prompt_ids) - 1 : -1].log_softmax(-1)
        plain = logits.gather(1, torch.tensor(generation.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(alone[0], plain, atol=1e-6, rtol=0)


def test_trimming_leaves_nothing_but_padding_out():
    generations = [Generation([1, 2, 3], [4, 0], "", True), Generation([5], [6, 7, 8, 0], "", True)]
    batch = pad_batch(generations, 0)
    assert batch.input_ids.shape == (2, 7)
    alone = batch.rows(slice(1, 2)).trimmed()
    assert alone.input_ids.tolist() == [[5, 6, 7, 8, 0]]
    assert batch.rows(slice(0, 1)).trimmed().input_ids.tolist() == [[1, 2, 3, 4, 0]]
    assert batch.trimmed().input_ids.shape == (2, 7)


def test_resume_gives_the_same_weights_and_metrics(tokenizer, tmp_path):
    straight = make_trainer(tokenizer)
    expected = [straight.step().metrics for _ in range(4)]
    first = make_trainer(tokenizer)
    for _ in range(2):
        first.step()
    save_checkpoint(first, tmp_path)
    resumed = make_trainer(tokenizer)
    assert load_newest_checkpoint(resumed, tmp_path)
    for row in expected[2:]:
        metrics = resumed.step().metrics
        assert {k: v for k, v in metrics.items() if not k.startswith("seconds")} == {
            k: v for k, v in row.items() if not k.startswith("seconds")
        }
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_older_checkpoints_go_and_half_written_ones_are_ignored(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer)
    trainer.step()
    save_checkpoint(trainer, tmp_path)
    trainer.step()
    save_checkpoint(trainer, tmp_path)
    (tmp_path / "tmp-checkpoint-3").mkdir()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    fresh = make_trainer(tokenizer)
    assert load_newest_checkpoint(fresh, tmp_path)
    assert fresh.update == 2


def test_rows_after_a_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"update": u}) + "\n" for u in (1, 2, 3)) + '{"upda')
    keep_rows_until(path, 2)
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 2]


def test_nan_reward_stops_before_the_weights_change(tokenizer):
    def broken(rollout):
        rewards = torch.zeros(rollout.batch.response_mask.shape)
        rewards[3, 0] = float("nan")
        return RewardResult(rewards, {})

    trainer = make_trainer(tokenizer, broken)
    before = copy.deepcopy(trainer.policy.state_dict())
    with pytest.raises(FloatingPointError, match="sample 3 of update 0"):
        trainer.step()
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.state_dict().items())


def test_reward_of_the_wrong_shape_is_named(tokenizer):
    with pytest.raises(ValueError, match="expected"):
        make_trainer(tokenizer, lambda rollout: RewardResult(torch.zeros(16, 99), {})).step()


def test_batch_sizes_must_divide(tokenizer):
    with pytest.raises(ValueError, match=r"multiple of rl\.minibatch_size"):
        make_trainer(tokenizer, minibatch_size=5)


def test_every_prompt_is_used_once_an_epoch(tokenizer):
    trainer = make_trainer(tokenizer)
    seen = [i for update in range(3) for i in trainer.prompt_index(update)]
    assert sorted(seen[:24]) == list(range(24))
    assert sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]
