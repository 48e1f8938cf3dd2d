"""Every guard stops the update it belongs to, says what and where, and leaves weights and optimizer as they were."""

import pytest
import torch

from tppo.core.config import RL
from tppo.rl import guards
from tppo.rl import trainer as trainer_module
from tppo.rl.guards import GuardError, MaxKLExceeded

NAN = float("nan")
TWO_STEPS = {"minibatch_size": 8, "micro_batch_size": 8}


def nan_reward(trainer, monkeypatch, at_call):
    good = trainer.reward_fn
    trainer.reward_fn = lambda samples: [NAN if row == 3 else 0.0 for row in range(len(good(samples).rewards))]


def nan_from_hook(module, at_call):
    """The module's output has a NaN in its third row from the given call on."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) >= at_call:
            (output if torch.is_tensor(output) else output.logits)[3] = NAN

    module.register_forward_hook(hook)


def nan_logprob(trainer, monkeypatch, at_call):
    nan_from_hook(trainer.policy.lm, at_call)


def nan_value(trainer, monkeypatch, at_call):
    nan_from_hook(trainer.policy.value_head, at_call)


def nan_advantage(trainer, monkeypatch, at_call):
    whiten = trainer_module.whiten

    def broken(values, mask):
        values = whiten(values, mask).clone()
        values[3, 0] = NAN
        return values

    monkeypatch.setattr(trainer_module, "whiten", broken)


def nan_loss(trainer, monkeypatch, at_call):
    policy_loss, calls = trainer_module.policy_loss, []

    def broken(logprobs, *args):
        calls.append(1)
        result = policy_loss(logprobs, *args)
        return result._replace(loss=result.loss * NAN) if len(calls) >= at_call else result

    monkeypatch.setattr(trainer_module, "policy_loss", broken)


def nan_gradient(trainer, monkeypatch, at_call):
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * NAN if len(calls) >= at_call else gradient

    trainer.policy.lm.model.layers[0].mlp.up_proj.weight.register_hook(hook)


@pytest.mark.parametrize(
    ("inject", "at_call", "message"),
    [
        (nan_reward, 1, r"reward of update 2, sample 3 \(prompt \d+: '"),
        # Scored in the micro-batches of the minibatches: row 3 of the first one is another of the rollout.
        (nan_logprob, 1, r"log-probability of the policy of update 2, sample {scored} \(prompt \d+: '"),
        (nan_value, 1, r"value of update 2, sample {scored} \(prompt \d+: '"),
        (nan_advantage, 1, r"advantage of update 2, sample 3 \(prompt \d+: '"),
        (nan_loss, 1, r"loss of update 2, sample 0 \(prompt \d+: '"),
        (nan_gradient, 1, r"gradient of lm\.model\.layers\.0\.mlp\.up_proj\.weight, update 2, .*sample 0 \(prompt"),
        # In the second minibatch: the step of the first one is taken back.
        (nan_logprob, 4, r"log-probability of the policy of update 2, sample 3"),
        (nan_loss, 2, "loss of update 2, sample 0"),
        (nan_gradient, 2, r"gradient of lm\.model\.layers\.0\.mlp\.up_proj\.weight, update 2"),
    ],
)
def test_an_injected_nan_stops_the_update_and_changes_nothing(
    make_trainer, weights, assert_same, monkeypatch, inject, at_call, message
):
    trainer = make_trainer(**TWO_STEPS)
    trainer.step()
    before, coefficient = weights(trainer), trainer.kl_coef
    inject(trainer, monkeypatch, at_call)
    message = message.replace("{scored}", str(int(trainer._minibatches()[0][0][3])))
    with pytest.raises(GuardError, match=message) as stop:
        trainer.step()
    assert "unchanged" in str(stop.value)
    assert_same(weights(trainer), before)
    assert (trainer.update, trainer.kl_coef) == (1, coefficient)
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())


def test_a_stopped_update_can_be_made_again(make_trainer, timeless):
    """After the stop the same step gives what it would have given without it."""
    straight, stopped = make_trainer(**TWO_STEPS), make_trainer(**TWO_STEPS)
    for trainer in (straight, stopped):
        trainer.step()
    with pytest.MonkeyPatch.context() as patch:
        nan_loss(stopped, patch, 2)
        with pytest.raises(GuardError):
            stopped.step()
    assert timeless(stopped.step().metrics) == timeless(straight.step().metrics)


def test_dropout_is_named(make_trainer):
    trainer = make_trainer()
    trainer.policy.train()
    with pytest.raises(GuardError, match=r"update 1 the ratio .* must be 1.*policy\.train\(\) was called"):
        trainer.step()


def test_noise_inside_the_model_is_named(make_trainer):
    trainer = make_trainer()

    def noise(module, args, output):
        output.logits.add_(0.05 * torch.randn(21))

    trainer.policy.lm.register_forward_hook(noise)
    with pytest.raises(GuardError, match=r"noise inside its forward pass.*rl\.temperature=1"):
        trainer.step()


@pytest.mark.parametrize(
    ("temperature", "cause"),
    [(0.3, r"Sampling used a temperature below rl\.temperature=1, top-k, top-p"), (3.0, "a temperature above")],
)
def test_a_rollout_at_another_temperature_is_named(make_trainer, tiny_lm, monkeypatch, temperature, cause):
    generate = trainer_module.generate

    def other_temperature(*args, **kwargs):
        return generate(*args, **kwargs | {"temperature": temperature})

    # Random weights this large give a distribution that is far from uniform.
    lm = tiny_lm(initializer_range=0.3)
    settings = {"batch_size": 128, "minibatch_size": 128, "micro_batch_size": 128}
    make_trainer(lm=lm, **settings).step()
    monkeypatch.setattr(trainer_module, "generate", other_temperature)
    with pytest.raises(GuardError, match=cause):
        make_trainer(lm=lm, **settings).step()


def test_negative_kl_beyond_noise_is_named():
    """Samples of the reference, scored as if they were the policy's."""
    torch.manual_seed(0)
    mask = torch.ones(64, 4, dtype=torch.bool)
    policy, reference = torch.randn(50).log_softmax(-1), torch.randn(50).log_softmax(-1)
    entropy = torch.full((64, 4), -(policy.exp() * policy).sum().item())
    own = torch.multinomial(policy.exp(), 256, replacement=True).view(64, 4)
    guards.check_sampling(policy[own], entropy, (policy - reference)[own].sum(-1), mask, 1.0, 1)
    foreign = torch.multinomial(reference.exp(), 256, replacement=True).view(64, 4)
    with pytest.raises(GuardError, match=r"KL -\d.*a sampling copy with other weights"):
        guards.check_sampling(policy[foreign], entropy, (policy - reference)[foreign].sum(-1), mask, 1.0, 1)


@pytest.mark.parametrize(
    ("error", "place", "setting"),
    [
        ("real", "scoring", r"rl\.micro_batch_size \(now 16\)"),
        (MemoryError(), "scoring", r"rl\.micro_batch_size \(now 16\)"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1"),
            "update",
            r"rl\.micro_batch_size",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "rollout", r"rl\.batch_size \(now 16\)"),
    ],
)
def test_out_of_memory_names_the_setting_to_lower(error, place, setting):
    def work():
        with guards.phase(place, RL(batch_size=16), {}):
            if error == "real":
                torch.empty(1 << 60)
            raise error

    with pytest.raises(GuardError, match=rf"out of memory in the {place}: lower {setting}"):
        work()


def test_other_runtime_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), guards.phase("update", RL(), {}):
        raise RuntimeError("shapes do not match")


def test_out_of_memory_in_the_second_minibatch_takes_the_first_back(make_trainer, weights, assert_same):
    trainer = make_trainer(**TWO_STEPS)
    trainer.step()
    before, calls = weights(trainer), []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == 4:
            torch.empty(1 << 60)

    trainer.policy.lm.register_forward_hook(hook)
    with pytest.raises(GuardError, match=r"out of memory in the update: lower rl\.micro_batch_size \(now 8\)"):
        trainer.step()
    assert_same(weights(trainer), before)


@pytest.mark.parametrize("seed", range(10))
def test_a_hackable_reward_is_halted_within_one_rollout_of_max_kl(make_trainer, weights, assert_same, seed):
    """The reward pays for one letter. What is saved is the policy of the last rollout within the limit."""
    trainer = make_trainer(seed=seed, max_kl=2.0, learning_rate=5e-3, kl_coef=0.0)
    kls, saved, before, facts = [], None, None, {}
    for _ in range(60):
        before = weights(trainer)
        try:
            result = trainer.step()
        except MaxKLExceeded as halt:
            facts = halt.facts
            break
        kls.append(result.metrics["kl"])
        saved = {name: p.clone() for name, p in trainer.rollout_model.named_parameters()}
    else:
        pytest.fail("never halted")
    assert facts["kl"] > 2.0
    assert facts["before_update"] == len(kls) + 1
    assert max(kls) <= 2.0
    assert kls[0] == 0
    assert_same(weights(trainer), before)
    model, update = trainer.policy_to_save(halted=True)
    assert update == len(kls) - 1
    assert_same(dict(model.named_parameters()), saved)


def test_best_metric_keeps_the_policy_with_the_best_rollout(make_trainer):
    trainer, rows = make_trainer(best_metric="good", batch_size=32), []
    for _ in range(6):
        rows.append(trainer.step().metrics["good"])
    assert trainer.policy_to_save()[1] == rows.index(max(rows))
    lowest = make_trainer(best_metric="-response_length")
    lengths = [lowest.step().metrics["response_length"] for _ in range(4)]
    assert lowest.policy_to_save()[1] == lengths.index(min(lengths))
    with pytest.raises(GuardError.__base__, match=r"best_metric='goods' is no metric.*'good'"):
        make_trainer(best_metric="goods").step()
