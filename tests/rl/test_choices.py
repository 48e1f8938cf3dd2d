"""Every training option does what it says."""

import math

import pytest
import torch

from tppo.core.config import RL
from tppo.rl import policy
from tppo.rl.losses import kl_estimate, next_kl_coef, policy_loss
from tppo.rl.policy import copy_weights, reference_copy, response_logprobs
from tppo.rl.rewards import length_penalty_rewards


def distributions(size=7):
    torch.manual_seed(1)
    return torch.randn(size, dtype=torch.float64, requires_grad=True), torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimators_against_the_exact_kl(kind, unbiased):
    """Expectation over the whole vocabulary, and the gradient of the expected estimate at fixed samples."""
    logits, ref_logits = distributions()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    expectation = (logp.exp() * kl_estimate(kind, logp, ref)).sum()
    assert (expectation.item() == pytest.approx(exact.item())) == unbiased
    if kind != "k1":
        assert (kl_estimate(kind, logp, ref) >= 0).all()
    (of_samples,) = torch.autograd.grad((logp.exp().detach() * kl_estimate(kind, logp, ref)).sum(), logits)
    (of_kl,) = torch.autograd.grad((logits.softmax(-1) * (logits.log_softmax(-1) - ref)).sum(), logits)
    if kind == "k1":
        assert of_samples.abs().max() < 1e-12, "why k1 is no loss"
    if kind == "k2":
        torch.testing.assert_close(of_samples, of_kl)
    with pytest.raises(ValueError, match="kl_estimator"):
        kl_estimate("k4", logp, ref)


def test_k3_does_not_overflow():
    assert kl_estimate("k3", torch.tensor([-500.0]), torch.tensor([-1.0])).isfinite().all()


def test_adaptive_coefficient_is_zieglers():
    """beta (1 + 0.2 n/h) far above the target, proportional near it, as Ziegler et al. 2019 have it."""
    assert next_kl_coef(0.1, 60.0, 6.0, 10000, 256) == pytest.approx(0.1 * (1 + 0.2 * 256 / 10000))
    assert next_kl_coef(0.1, 0.0, 6.0, 10000, 256) == pytest.approx(0.1 * (1 - 0.2 * 256 / 10000))
    assert next_kl_coef(0.1, 6.6, 6.0, 10000, 256) == pytest.approx(0.1 * (1 + 0.1 * 256 / 10000))
    assert next_kl_coef(0.1, 60.0, 0.0, 10000, 256) == 0.1


def test_adaptive_coefficient_in_training(make_trainer):
    trainer = make_trainer(kl_target=0.05, kl_horizon=32)
    rows = [trainer.step().metrics for _ in range(5)]
    assert rows[1]["kl_coef"] == pytest.approx(0.01 * 0.9), "KL was 0, below the target"
    assert trainer.kl_coef > rows[-1]["kl_coef"], "KL is above it by now"


@pytest.mark.parametrize("settings", [{"kl_placement": "loss", "kl_estimator": "k3"}, {"kl_estimator": "k1"}])
def test_kl_holds_the_policy_where_it_is_placed(make_trainer, settings):
    free = make_trainer(kl_coef=0.0, **settings)
    held = make_trainer(kl_coef=10.0, **settings)
    for trainer in (free, held):
        rows = [trainer.step().metrics for _ in range(8)]
        assert ("kl_loss" in rows[-1]) == (settings.get("kl_placement") == "loss")
        trainer.last_kl = rows[-1]["kl"]
    assert held.last_kl < 0.5 * free.last_kl


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    logprobs = torch.tensor([[2.0, 2.0, -2.0]])
    advantages, mask = torch.tensor([[-1.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)

    def losses(dual_clip):
        return [
            policy_loss(
                logprobs[:, i : i + 1], torch.zeros(1, 1), advantages[:, i : i + 1], mask[:, :1], 0.2, 1, dual_clip
            ).loss.item()
            for i in range(3)
        ]

    assert losses(0.0) == pytest.approx([math.exp(2), -1.2, 0.8])
    assert losses(3.0) == pytest.approx([3.0, -1.2, 0.8])


def test_penalties_for_length():
    mask = torch.arange(8)[None] < torch.tensor([[3], [6], [8], [8]])
    finished = torch.tensor([True, True, True, False])
    config = RL(missing_eos_penalty=0.5, overlong_penalty=2.0, overlong_buffer=4)
    rewards = length_penalty_rewards(config, mask, finished, 8)
    assert rewards.sum(-1).tolist() == [0.0, -1.0, -2.0, -2.5]
    assert (rewards != 0).sum(-1).tolist() == [0, 1, 1, 1]
    assert rewards[1, 5] == -1.0
    assert (rewards[~mask] == 0).all()


def test_penalties_reach_the_reward_of_any_reward_function(make_trainer):
    plain, strict = make_trainer(), make_trainer(missing_eos_penalty=3.0)
    results = [trainer.step() for trainer in (plain, strict)]
    unfinished = sum(not sample.finished for sample in results[0].rollout.samples)
    assert unfinished
    difference = results[0].metrics["reward_mean"] - results[1].metrics["reward_mean"]
    assert difference == pytest.approx(3.0 * unfinished / 16)


def test_critic_warmup_trains_the_value_only(make_trainer):
    for function in ("probe", "shared", "separate"):
        trainer = make_trainer(critic_warmup=1, value_function=function)
        before = {name: p.clone() for name, p in trainer.policy.lm.named_parameters()}
        value_before = {name: t.clone() for name, t in trainer.policy.value_head.state_dict().items()}
        trainer.step()
        assert all(torch.equal(before[name], p) for name, p in trainer.policy.lm.named_parameters())
        after = trainer.policy.value_head.state_dict()
        assert any(not torch.equal(value_before[name], after[name]) for name in after)
        trainer.step()
        assert any(not torch.equal(before[name], p) for name, p in trainer.policy.lm.named_parameters())


def test_the_probe_is_the_ridge_solution_and_forgets(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(policy, "RIDGES", (1e-9,))
    probe, true = policy.ValueProbe(6), torch.randn(6)
    hidden = torch.randn(400, 6)
    probe.load_state_dict(probe.fitted(hidden, hidden @ true + 2.0))
    torch.testing.assert_close(probe(hidden), hidden @ true + 2.0, atol=1e-4, rtol=0)
    for _ in range(40):
        probe.load_state_dict(probe.fitted(hidden, hidden @ -true))
    torch.testing.assert_close(probe(hidden), hidden @ -true, atol=1e-2, rtol=0)


def test_the_probe_stays_at_the_mean_when_there_is_nothing_to_learn():
    """Ten tokens a rollout for 64 units: a plain fit would predict noise."""
    torch.manual_seed(0)
    probe = policy.ValueProbe(64)
    for _ in range(10):
        probe.load_state_dict(probe.fitted(torch.randn(10, 64), torch.randn(10) + 3))
    predicted = probe(torch.randn(500, 64))
    assert predicted.std() < 0.3
    assert predicted.mean().item() == pytest.approx(3, abs=0.5)


def test_the_probe_explains_a_known_reward(make_trainer, tiny_lm):
    """Returns that depend on the state: the prompt's last letter says what the response is worth."""

    def reward(samples):
        return [float(s.prompt_ids[-1] > 10) for s in samples]

    lm = tiny_lm(initializer_range=0.3)
    trainer = make_trainer(reward, lm=lm, learning_rate=0.0, batch_size=64, minibatch_size=64, micro_batch_size=64)
    rows = [trainer.step().metrics for _ in range(6)]
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["explained_variance"] > 0.2


@pytest.mark.parametrize("function", ["shared", "separate"])
def test_trained_value_functions_learn(make_trainer, function):
    trainer = make_trainer(
        lambda samples: [[1.0] * len(s.response_ids) for s in samples],
        value_function=function, learning_rate=1e-3, value_learning_rate=3e-2, critic_warmup=100, value_clip_range=9.0,
    )  # fmt: skip
    rows = [trainer.step().metrics for _ in range(25)]
    assert rows[-1]["value_loss"] < 0.5 * rows[0]["value_loss"]
    assert rows[-1]["kl"] == 0 or function == "shared"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora(make_trainer, precision):
    """No second model: the reference is the policy with its adapters off, the sampling copy has them merged."""
    trainer = make_trainer(tuning="lora", lora_r=4, precision=precision, learning_rate=2e-2)
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    assert trainer.reference is None
    frozen = {name: p.clone() for name, p in trainer.policy.lm.named_parameters() if not p.requires_grad}
    rows = [trainer.step().metrics for _ in range(6)]
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0.01
    assert all(torch.equal(frozen[n], p) for n, p in trainer.policy.lm.named_parameters() if n in frozen)
    copy_weights(trainer.policy.lm, trainer.rollout_model)
    batch = trainer._roll_out().batch
    with torch.no_grad():
        merged, _ = response_logprobs(trainer.rollout_model.float(), batch, 1.0)
        adapted, _ = response_logprobs(trainer.policy.lm, batch, 1.0)
    torch.testing.assert_close(merged, adapted, atol=1e-4 if precision == "fp32" else 0.1, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_smaller_and_the_same_to_the_last_bit(tiny_lm, make_trainer, tied):
    lm = tiny_lm(tie_word_embeddings=tied)
    reference = reference_copy(lm, "bf16")
    dtypes = {name: p.dtype for name, p in reference.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["model.embed_tokens.weight"] == torch.float32
    batch = make_trainer()._roll_out().batch
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a, _ = response_logprobs(lm, batch, 1.0)
        b, _ = response_logprobs(reference, batch, 1.0)
    assert torch.equal(a, b)
    held, whole = (sum(p.nbytes for p in model.parameters()) for model in (reference, lm))
    assert held < 0.7 * whole
