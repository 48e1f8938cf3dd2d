"""Lemma 3.1 and Appendix B on a token MDP whose every response can be enumerated. docs/theory.md says what holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tests.helpers.tabular import (
    TokenMDP,
    at_last,
    expected_policy_loss,
    measure,
    objective,
    past_rewards,
    policy_values,
    soft_optimum,
)
from tppo.rl.losses import kl_estimate
from tppo.rl.rewards import gae

MDP = TokenMDP.build(vocabulary=3, horizon=4)
WIDE = TokenMDP.build(vocabulary=4, horizon=3)
FULL = TokenMDP.build(vocabulary=3, horizon=4, ends=False)
BETA = 0.4
seeds = st.integers(0, 2**31)


def problem(mdp, seed):
    """Random token rewards and a random reference."""
    generator = torch.Generator().manual_seed(seed)
    return mdp.random_rewards(generator), mdp.random_policy(generator), generator


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def distance(mdp, log_p_SV, log_q_SV):
    """Total variation between the two policies' distributions over responses."""
    return (mdp.probabilities(log_p_SV) - mdp.probabilities(log_q_SV)).abs().sum().item() / 2


def maximise(function, start):
    """Numerical maximum over softmax logits: BFGS, gradients by autograd. Returns log probabilities."""

    def negative(flat):
        logits = torch.tensor(flat.reshape(start.shape), requires_grad=True)
        value = -function(logits.log_softmax(-1))
        (gradient,) = torch.autograd.grad(value, logits)
        return value.item(), gradient.numpy().ravel()

    found = minimize(negative, start.numpy().ravel(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    return torch.from_numpy(found.x.reshape(start.shape)).log_softmax(-1)


@pytest.mark.parametrize("mdp", [MDP, WIDE, FULL])
def test_every_response_is_there_once(mdp):
    _, log_ref_SV, _ = problem(mdp, 0)
    assert mdp.probabilities(log_ref_SV).sum().item() == pytest.approx(1)
    rows = [tuple(row[mask].tolist()) for row, mask in zip(mdp.tokens_BT, mdp.mask_BT, strict=True)]
    assert len(set(rows)) == len(rows)
    if mdp is not FULL:
        assert all(0 not in row[:-1] for row in rows), "end-of-sequence ends"


class TestLemma:
    @pytest.mark.parametrize("seed", range(3))
    def test_equation_8_is_maximised_by_equation_9(self, seed):
        """The lemma as it stands: state by state, with the advantage of the reference held fixed."""
        rewards_SV, log_ref_SV, _ = problem(MDP, seed)
        values_S = policy_values(MDP, rewards_SV, log_ref_SV)
        advantages_SV = rewards_SV + MDP.next_values(values_S) - values_S[:, None]
        for log_ref_V, advantages_V in zip(log_ref_SV, advantages_SV, strict=True):

            def equation_8(log_pi_V, log_ref_V=log_ref_V, advantages_V=advantages_V):
                return (log_pi_V.exp() * (advantages_V - BETA * (log_pi_V - log_ref_V))).sum()

            weights_V = log_ref_V.exp() * torch.exp(advantages_V / BETA)
            equation_9 = weights_V / weights_V.sum()
            close(maximise(equation_8, torch.zeros(3, dtype=torch.float64)).exp(), equation_9, atol=1e-6)

    @pytest.mark.parametrize("mdp", [MDP, WIDE])
    def test_the_sequential_optimum_is_the_soft_bellman_backup(self, mdp):
        rewards_SV, log_ref_SV, _ = problem(mdp, 1)
        optimum = soft_optimum(mdp, rewards_SV, log_ref_SV, BETA)
        found = maximise(lambda log_pi: objective(mdp, log_pi, rewards_SV, log_ref_SV, BETA), log_ref_SV)
        assert distance(mdp, found, optimum.log_policy) < 1e-5
        value = objective(mdp, optimum.log_policy, rewards_SV, log_ref_SV, BETA)
        close(value, optimum.values[0])
        # The same optimum seen from whole responses: pi*(y) is proportional to pi_ref(y) exp(sum_t r_t / beta).
        weights_B = mdp.probabilities(log_ref_SV) * torch.exp(mdp.along(rewards_SV).sum(-1) / BETA)
        close(mdp.probabilities(optimum.log_policy), weights_B / weights_B.sum())

    @settings(deadline=None, max_examples=30)
    @given(seeds)
    def test_equation_9_is_one_step_of_improvement_not_the_optimum(self, seed):
        """With the advantage of the reference, as in the paper, Eq. 9 lies between the reference and the optimum."""
        rewards_SV, log_ref_SV, _ = problem(MDP, seed)
        values_S = policy_values(MDP, rewards_SV, log_ref_SV)
        advantages_SV = rewards_SV + MDP.next_values(values_S) - values_S[:, None]
        equation_9 = (log_ref_SV + advantages_SV / BETA).log_softmax(-1)
        optimum = soft_optimum(MDP, rewards_SV, log_ref_SV, BETA)
        at_reference, at_equation_9, at_optimum = (
            objective(MDP, log_pi, rewards_SV, log_ref_SV, BETA).item()
            for log_pi in (log_ref_SV, equation_9, optimum.log_policy)
        )
        assert at_reference <= at_equation_9 + 1e-9
        assert at_equation_9 <= at_optimum + 1e-9

    def test_the_gap_is_real_and_closes_with_one_token(self):
        gaps = []
        for mdp in (MDP, TokenMDP.build(vocabulary=3, horizon=1)):
            rewards_SV, log_ref_SV, _ = problem(mdp, 2)
            advantages_SV = rewards_SV + mdp.next_values(policy_values(mdp, rewards_SV, log_ref_SV))
            equation_9 = (log_ref_SV + advantages_SV / BETA).log_softmax(-1)
            optimum = soft_optimum(mdp, rewards_SV, log_ref_SV, BETA)
            gaps.append(distance(mdp, equation_9, optimum.log_policy))
        assert gaps[0] > 0.01
        assert gaps[1] < 1e-12

    @settings(deadline=None, max_examples=30)
    @given(seeds, st.floats(0, 1), st.floats(0.05, 3))
    def test_at_the_optimum_every_advantage_of_ours_is_zero(self, seed, lam, beta):
        """r_t - beta k1_t + V*(s_t+1) - V*(s_t) = 0 for every token, not on average: no gradient and no noise."""
        rewards_SV, log_ref_SV, _ = problem(MDP, seed)
        optimum = soft_optimum(MDP, rewards_SV, log_ref_SV, beta)
        kl_BT = kl_estimate("k1", MDP.along(optimum.log_policy), MDP.along(log_ref_SV))
        values_BT = MDP.values_along(optimum.values)
        found = gae(MDP.along(rewards_SV) - beta * kl_BT, values_BT, MDP.mask_BT, 1.0, lam)
        close(found.advantages, torch.zeros_like(values_BT))
        close(found.returns, values_BT)

    @pytest.mark.parametrize(("critic", "lam"), [("exact", 0.95), ("exact", 0.0), ("none", 1.0)])
    @pytest.mark.parametrize("placement", ["dense", "sparse"])
    def test_our_losses_converge_to_it(self, critic, lam, placement):
        """Rollout, KL in the reward, GAE, three clipped steps, again: as TokenPPOTrainer.step, but exact.

        Paying the sum at the last token changes what a token is paid, not the optimum.
        """
        rewards_SV, log_ref_SV, _ = problem(MDP, 3)
        optimum = soft_optimum(MDP, rewards_SV, log_ref_SV, BETA).log_policy
        paid_BT = MDP.along(rewards_SV)
        if placement == "sparse":
            paid_BT = at_last(paid_BT, MDP.mask_BT)
        logits_SV = log_ref_SV.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits_SV], lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        assert distance(MDP, log_ref_SV, optimum) > 0.3
        for _ in range(500):
            old_SV = logits_SV.detach().log_softmax(-1)
            kl_SV = kl_estimate("k1", old_SV, log_ref_SV)
            values_BT = torch.zeros_like(paid_BT)
            if critic == "exact":
                values_BT = MDP.values_along(policy_values(MDP, rewards_SV - BETA * kl_SV, old_SV))
                if placement == "sparse":
                    values_BT = (values_BT + past_rewards(MDP.along(rewards_SV))) * MDP.mask_BT
            advantages_BT = gae(paid_BT - BETA * MDP.along(kl_SV), values_BT, MDP.mask_BT, 1.0, lam).advantages
            for _ in range(3):
                optimizer.zero_grad()
                expected_policy_loss(MDP, logits_SV.log_softmax(-1), old_SV, advantages_BT, 0.2).backward()
                optimizer.step()
            schedule.step()
        assert distance(MDP, logits_SV.detach().log_softmax(-1), optimum) < 0.01


def pair(mdp, rewards_BT, log_policy_SV, critic, gamma=1.0, lam=1.0):
    """Estimators from dense rewards and from their sum at the last token, at the same policy."""
    zeros_BT = torch.zeros_like(rewards_BT)
    dense_BT, sparse_BT = zeros_BT, zeros_BT
    if critic is not None:
        dense_BT = mdp.values_along(critic)
        sparse_BT = (dense_BT + past_rewards(rewards_BT)) * mdp.mask_BT
    return (
        measure(mdp, log_policy_SV, rewards_BT, dense_BT, gamma, lam),
        measure(mdp, log_policy_SV, at_last(rewards_BT, mdp.mask_BT), sparse_BT, gamma, lam),
    )


class TestDenseAgainstSparse:
    @settings(deadline=None, max_examples=30)
    @given(seeds)
    def test_the_moments_are_those_of_the_estimator(self, seed):
        """`measure` against the definition: the gradient of every response by autograd, one at a time."""
        rewards_SV, log_policy_SV, _ = problem(WIDE, seed)
        advantages_BT = gae(WIDE.along(rewards_SV), torch.zeros(WIDE.mask_BT.shape), WIDE.mask_BT, 1.0, 0.9).advantages
        gradients = []
        for row in range(len(advantages_BT)):
            logits = log_policy_SV.clone().requires_grad_()
            (advantages_BT[row] * WIDE.along(logits.log_softmax(-1))[row]).sum().backward()
            gradients.append(logits.grad)
        gradients_B, probabilities_B = torch.stack(gradients).flatten(1), WIDE.probabilities(log_policy_SV)
        mean = probabilities_B @ gradients_B
        noise = (probabilities_B[:, None] * (gradients_B - mean) ** 2).sum()
        found = measure(WIDE, log_policy_SV, WIDE.along(rewards_SV), torch.zeros(WIDE.mask_BT.shape), 1.0, 0.9)
        close(found.gradient.flatten(), mean)
        assert found.noise == pytest.approx(noise.item(), rel=1e-6)

    @settings(deadline=None, max_examples=30)
    @given(seeds)
    def test_same_expectation_without_a_critic(self, seed):
        """lambda = 1: past rewards do not depend on the next token, so leaving them out changes no expectation."""
        rewards_SV, log_policy_SV, _ = problem(MDP, seed)
        dense, sparse = pair(MDP, MDP.along(rewards_SV), log_policy_SV, None)
        close(dense.gradient, sparse.gradient)
        logits_SV = log_policy_SV.clone().requires_grad_()
        no_kl = objective(MDP, logits_SV.log_softmax(-1), rewards_SV, log_policy_SV, 0.0)
        close(dense.gradient, torch.autograd.grad(no_kl, logits_SV)[0])

    @settings(deadline=None, max_examples=30)
    @given(seeds, st.floats(0, 1))
    def test_with_an_exact_critic_they_are_one_estimator(self, seed, lam):
        """Advantages agree token by token, so gradient, norm, variance and noise do: Eq. 19 and B.2 cannot hold."""
        rewards_SV, log_policy_SV, _ = problem(MDP, seed)
        rewards_BT = MDP.along(rewards_SV)
        values_BT = MDP.values_along(policy_values(MDP, rewards_SV, log_policy_SV))
        dense = gae(rewards_BT, values_BT, MDP.mask_BT, 1.0, lam)
        sparse_values_BT = (values_BT + past_rewards(rewards_BT)) * MDP.mask_BT
        sparse = gae(at_last(rewards_BT, MDP.mask_BT), sparse_values_BT, MDP.mask_BT, 1.0, lam)
        close(dense.advantages, sparse.advantages)

    @settings(deadline=None, max_examples=30)
    @given(seeds, st.integers(0, 3))
    def test_variance_without_a_critic_differs_by_the_past(self, seed, t):
        """Var(sparse A_t) - Var(dense A_t) = Var(C_t) + 2 Cov(C_t, G_t): C_t the rewards before t, G_t the others."""
        rewards_SV, log_policy_SV, _ = problem(FULL, seed)
        rewards_BT = FULL.along(rewards_SV)
        zeros_BT = torch.zeros_like(rewards_BT)
        dense_B = gae(rewards_BT, zeros_BT, FULL.mask_BT, 1.0, 1.0).advantages[:, t]
        sparse_B = gae(at_last(rewards_BT, FULL.mask_BT), zeros_BT, FULL.mask_BT, 1.0, 1.0).advantages[:, t]
        p, past_B = FULL.probabilities(log_policy_SV).numpy(), past_rewards(rewards_BT)[:, t]
        covariance = np.cov(np.stack([dense_B, sparse_B, past_B]), aweights=p, ddof=0)
        assert covariance[1, 1] - covariance[0, 0] == pytest.approx(covariance[2, 2] + 2 * covariance[2, 0], abs=1e-9)

    @settings(deadline=None, max_examples=30)
    @given(seeds)
    def test_dense_varies_less_when_tokens_are_paid_independently(self, seed):
        """Rewards and policy that depend on the position only: the covariance is 0, so the variance can only fall."""
        generator = torch.Generator().manual_seed(seed)
        position_S = FULL.states_BT.new_zeros(FULL.shape[0])
        position_S[FULL.states_BT] = torch.arange(4).expand_as(FULL.states_BT)
        rewards_SV = torch.randn(4, 3, generator=generator, dtype=torch.float64)[position_S]
        log_policy_SV = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)[position_S]
        p = FULL.probabilities(log_policy_SV).numpy()
        rewards_BT = FULL.along(rewards_SV)
        zeros_BT = torch.zeros_like(rewards_BT)
        dense_BT = gae(rewards_BT, zeros_BT, FULL.mask_BT, 1.0, 1.0).advantages
        sparse_BT = gae(at_last(rewards_BT, FULL.mask_BT), zeros_BT, FULL.mask_BT, 1.0, 1.0).advantages
        for t in range(4):
            dense, sparse = (np.cov(advantages_BT[:, t], aweights=p, ddof=0) for advantages_BT in (dense_BT, sparse_BT))
            assert dense <= sparse + 1e-12
            assert (sparse - dense > 1e-9) == (t > 0)

    def test_dense_can_vary_more(self):
        """Rewards that cancel, r_1 = +-1 and then -r_1: the sum is always 0, so the sparse reward is silent and right
        (nothing is to be learnt), while the dense one pays noise."""
        mdp = TokenMDP.build(vocabulary=2, horizon=2, ends=False)
        signs_S = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
        rewards_SV = -signs_S[:, None].repeat(1, 2)
        rewards_SV[0] = torch.tensor([1.0, -1.0])
        even_SV = torch.full(mdp.shape, 0.5, dtype=torch.float64).log()
        dense, sparse = pair(mdp, mdp.along(rewards_SV), even_SV, None)
        close(dense.gradient, sparse.gradient)
        assert sparse.advantage_variance == sparse.noise == 0
        assert dense.advantage_variance > 0.4
        assert dense.noise > 0.2

    def test_discounting_and_lambda_without_a_critic_change_the_expectation(self):
        """What App. B describes (gamma^(H-t), Eq. 21-22) needs gamma < 1, or lambda < 1 with a critic that knows
        nothing: the sparse signal is then weaker at early tokens, and so is its variance, against B.2."""
        rewards_SV, log_policy_SV, _ = problem(FULL, 5)
        for gamma, lam in ((0.5, 1.0), (1.0, 0.5)):
            dense, sparse = pair(FULL, FULL.along(rewards_SV), log_policy_SV, None, gamma, lam)
            plain, _ = pair(FULL, FULL.along(rewards_SV), log_policy_SV, None)
            assert (dense.gradient - sparse.gradient).norm() > 0.05
            # State 0 is the first token: its sparse return is the undiscounted one times 0.5^3.
            close(sparse.gradient[0], plain.gradient[0] * 0.5**3)
