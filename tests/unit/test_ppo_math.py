"""tristage.algo.ppo: hand-worked numbers, the slow twins, and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tristage.algo.masking import masked_mean, masked_sum, zero_masked
from tristage.algo.ppo import (
    ImportanceKind,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    importance_weights,
    kl_estimate,
    shaped_rewards,
)

B, R = 5, 6
KINDS = ["k1", "k2", "k3"]


def random_case(seed: int, num: int) -> list[Tensor]:
    """num tensors [B,R] and a mask with responses of lengths 1, 2, 4, 5 and R (full)."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(B, R, generator=g) for _ in range(num)]
    lengths = torch.tensor([[1], [R], [4], [2], [5]])
    return [*tensors, torch.arange(R) < lengths]


def logprob_case(seed: int) -> list[Tensor]:
    """logprobs, ref_logprobs, mask, all [B,R]"""
    a, b, mask = random_case(seed, 2)
    return [-a.abs(), -b.abs(), mask]


def assert_close(result: Tensor, expected: object) -> None:
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-5, rtol=1e-5)


# importance_weights


@pytest.mark.parametrize("kind, expected", [("truncate", [1.5, 2.0, 0.25]), ("mask", [1.5, 0.0, 0.0])])
def test_a_ratio_beyond_the_cap_is_cut_or_left_out(kind: ImportanceKind, expected: list[float]) -> None:
    sampled = torch.tensor([[0.1, 0.1, 0.1]])
    logprobs = (sampled * torch.tensor([[1.5, 3.0, 0.25]])).log()
    assert_close(importance_weights(logprobs, sampled.log(), 2.0, kind), [expected])


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_importance_weights_match_the_oracle_and_have_no_gradient(kind: ImportanceKind) -> None:
    logprobs, sampled, _ = logprob_case(1)
    logprobs.requires_grad_(True)
    found = importance_weights(logprobs, sampled, 1.7, kind)
    expected = [
        [oracles.importance_weight(float(logprobs[b, t]), float(sampled[b, t]), 1.7, kind) for t in range(R)]
        for b in range(B)
    ]
    assert_close(found, expected)
    assert not found.requires_grad and found.isfinite().all()
    assert importance_weights(logprobs, logprobs.detach(), 1.7, kind).eq(1).all()


# kl_estimate


def test_kl_estimates_of_a_token_that_the_policy_finds_twice_as_likely() -> None:
    # Policy 1/2, reference 1/4: r = 1/2, log r = -ln 2.
    logprobs, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert kl_estimate(logprobs, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logprobs, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logprobs, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimates_match_the_oracle(kind: str) -> None:
    logprobs, ref, _ = logprob_case(0)
    expected = [
        [oracles.kl_estimate(float(logprobs[b, t]), float(ref[b, t]), kind) for t in range(R)]
        for b in range(B)
    ]
    assert_close(kl_estimate(logprobs, ref, kind), expected)


def test_k1_and_k3_average_to_the_exact_kl_over_the_policy() -> None:
    policy, ref = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    exact = (policy * (policy / ref).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy * kl_estimate(policy.log(), ref.log(), kind)).sum(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_of_equal_logprobs_is_exactly_zero(kind: str) -> None:
    logprobs, _, _ = logprob_case(0)
    assert torch.equal(kl_estimate(logprobs, logprobs.clone(), kind), torch.zeros(B, R))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(kind: str) -> None:
    gaps = torch.cat([torch.linspace(-30, 30, 101), torch.logspace(-8, 0, 50), -torch.logspace(-8, 0, 50)])
    assert torch.all(kl_estimate(torch.zeros_like(gaps), gaps, kind) >= 0)


def test_k3_is_exact_up_to_ten_and_constant_beyond() -> None:
    log_r = torch.tensor([9.9, 10.0, 11.0, 500.0, -9.9, -10.0, -11.0, -500.0])
    result = kl_estimate(torch.zeros(8), log_r.requires_grad_(), "k3")
    expected = [math.exp(x) - 1 - x for x in (9.9, 10.0, 10.0, 10.0, -9.9, -10.0, -10.0, -10.0)]
    torch.testing.assert_close(result, torch.tensor(expected))
    result.sum().backward()
    assert log_r.grad is not None and log_r.grad.isfinite().all()
    assert log_r.grad[[2, 3, 6, 7]].tolist() == [0, 0, 0, 0]


# shaped_rewards


def test_shaped_rewards_put_the_score_on_the_last_real_token() -> None:
    # KL per token: 0.5, -0.25, then masked; coefficient 0.1; score 2 on token 1: -0.05, 0.025 + 2, 0.
    rewards = shaped_rewards(
        scores=torch.tensor([2.0]),
        logprobs=torch.tensor([[-1.0, -1.0, -9.0]]),
        ref_logprobs=torch.tensor([[-1.5, -0.75, -3.0]]),
        mask=torch.tensor([[True, True, False]]),
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.025, 0.0]]))


def test_shaped_rewards_clip_the_score_and_not_the_kl() -> None:
    # KL 100 at coefficient 1 stays; scores 7 and -7 become 5 and -5.
    logprobs, ref = torch.zeros(2, 1), torch.full((2, 1), -100.0)
    mask = torch.ones(2, 1, dtype=torch.bool)
    rewards = shaped_rewards(torch.tensor([7.0, -7.0]), logprobs, ref, mask, kl_coef=1.0, clip_score=5.0)
    assert rewards.tolist() == [[-95.0], [-105.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_shaped_rewards_match_the_oracle(kind: str, seed: int) -> None:
    logprobs, ref, mask = logprob_case(seed)
    scores = torch.randn(B, generator=torch.Generator().manual_seed(seed)) * 3
    result = shaped_rewards(scores, logprobs, ref, mask, 0.1, 2.0, kind)
    assert_close(result, oracles.shaped_rewards(scores, logprobs, ref, mask, 0.1, 2.0, kind))


def test_rewards_of_a_response_add_up_to_score_minus_kl() -> None:
    logprobs, ref, mask = logprob_case(1)
    scores = torch.arange(B) - 2.0
    rewards = shaped_rewards(scores, logprobs, ref, mask, kl_coef=0.2)
    expected = scores - 0.2 * masked_sum(kl_estimate(logprobs, ref), mask, dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), expected)


def test_without_kl_and_without_clipping_only_the_score_is_left() -> None:
    logprobs, ref, mask = logprob_case(1)
    rewards = shaped_rewards(torch.full((B,), 9.0), logprobs, ref, mask, kl_coef=0.0)
    last = [0, 5, 3, 1, 4]  # lengths 1, 6, 4, 2, 5
    assert rewards.nonzero().tolist() == [[b, t] for b, t in enumerate(last)]
    assert rewards.sum().item() == 9 * B


# gae


def test_gae_of_a_two_token_response() -> None:
    # delta_1 = 4 - 2 = 2; delta_0 = 0 + 0.9 * 2 - 1 = 0.8; A_0 = 0.8 + 0.9 * 0.5 * 2 = 1.7; returns = A + V.
    values, rewards = torch.tensor([[1.0, 2.0, 8.0]]), torch.tensor([[0.0, 4.0, 8.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(values, rewards, mask, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.7, 2.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.7, 4.0, 0.0]]))


def test_gae_of_a_one_token_response_is_reward_minus_value() -> None:
    advantages, returns = gae(
        torch.tensor([[0.5]]), torch.tensor([[2.0]]), torch.tensor([[True]]), gamma=0.9, lam=0.9
    )
    assert advantages.item() == 1.5 and returns.item() == 2


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_matches_the_oracle(gamma: float, lam: float, seed: int) -> None:
    values, rewards, mask = random_case(seed, 2)
    advantages, returns = gae(values, rewards, mask, gamma, lam)
    expected_advantages, expected_returns = oracles.gae(values, rewards, mask, gamma, lam)
    assert_close(advantages, expected_advantages)
    assert_close(returns, expected_returns)


def test_gae_steps_over_holes_in_the_mask() -> None:
    values, rewards, _ = random_case(3, 2)
    mask = torch.rand(B, R, generator=torch.Generator().manual_seed(3)) < 0.6
    for result, expected in zip(
        gae(values, rewards, mask, 0.9, 0.8), oracles.gae(values, rewards, mask, 0.9, 0.8), strict=True
    ):
        assert_close(result, expected)


def test_gae_with_lambda_one_gives_the_sum_of_later_rewards_as_return() -> None:
    values, rewards, mask = random_case(4, 2)
    _, returns = gae(values, rewards, mask, gamma=1.0, lam=1.0)
    later = zero_masked(rewards, mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, zero_masked(later, mask), atol=1e-5, rtol=1e-5)


def test_gae_of_perfect_values_is_zero() -> None:
    _, rewards, mask = random_case(5, 2)
    later = zero_masked(rewards, mask).flip(1).cumsum(1).flip(1)
    advantages, _ = gae(later, rewards, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros(B, R), atol=1e-5, rtol=0)


def test_gae_does_not_depend_on_how_much_padding_follows() -> None:
    values, rewards, mask = random_case(6, 2)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (values, rewards, mask)]
    for narrow, wide in zip(gae(values, rewards, mask, 1.0, 0.95), gae(*wider, 1.0, 0.95), strict=True):
        assert torch.equal(wide[:, :R], narrow) and torch.all(wide[:, R:] == 0)


# losses


def test_policy_loss_at_ratio_one_is_minus_the_advantage() -> None:
    logprobs, advantages, _ = random_case(0, 2)
    assert torch.equal(clipped_policy_loss(logprobs, logprobs.clone(), advantages, 0.2), -advantages)


def test_policy_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # clip 0.2. ratio 1.5: A=1 gains 1.2 (clipped), A=-1 costs 1.5 (not clipped).
    #           ratio 0.5: A=1 gains 0.5 (not clipped), A=-1 costs 0.8 (clipped).
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss = clipped_policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    loss.sum().backward()
    # d(-ratio * A) / d(logprob) = -ratio * A where not clipped, 0 where clipped
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))


def test_policy_gradient_at_ratio_one_is_that_of_reinforce() -> None:
    logprobs, advantages, _ = random_case(1, 2)
    leaf = logprobs.clone().requires_grad_()
    clipped_policy_loss(leaf, logprobs, advantages, 0.2).sum().backward()
    torch.testing.assert_close(leaf.grad, -advantages)


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_matches_the_oracle(clip: float) -> None:
    logprobs, old, advantages, _ = random_case(2, 3)
    expected = [
        [
            oracles.clipped_policy_loss(
                float(logprobs[b, t]), float(old[b, t]), float(advantages[b, t]), clip
            )
            for t in range(R)
        ]
        for b in range(B)
    ]
    assert_close(clipped_policy_loss(logprobs, old, advantages, clip), expected)


def test_policy_loss_stays_finite_for_broken_log_ratios() -> None:
    logprobs = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    loss = clipped_policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    loss.sum().backward()
    assert loss[2].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert loss.isfinite().all() and logprobs.grad is not None and logprobs.grad.isfinite().all()


def test_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # old 0, clip 0.2. v=1, R=2: 0.5 * max(1, 1.8^2) = 1.62. v=1, R=0: 0.5 * max(1, 0.2^2) = 0.5.
    # v=0.1 is inside the clip: 0.5 * (0.1 - 1)^2 = 0.405. v=-1, R=-2: as the first.
    values = torch.tensor([1.0, 1.0, 0.1, -1.0], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(4), torch.tensor([2.0, 0.0, 1.0, -2.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([1.62, 0.5, 0.405, 1.62]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -0.9, 0.0]))  # v - R, or 0 if clipped


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    values, old, returns, _ = random_case(3, 3)
    expected = [[0.5 * (float(values[b, t]) - float(returns[b, t])) ** 2 for t in range(R)] for b in range(B)]
    assert_close(clipped_value_loss(values, old, returns, None), expected)
    torch.testing.assert_close(
        clipped_value_loss(values, old, returns, 1e6), clipped_value_loss(values, old, returns, None)
    )


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_value_loss_matches_the_oracle(clip: float) -> None:
    values, old, returns, _ = random_case(4, 3)
    expected = [
        [
            oracles.clipped_value_loss(float(values[b, t]), float(old[b, t]), float(returns[b, t]), clip)
            for t in range(R)
        ]
        for b in range(B)
    ]
    assert_close(clipped_value_loss(values, old, returns, clip), expected)


# explained_variance


def test_explained_variance_of_a_half_right_critic() -> None:
    # returns 1, 3, 5: variance 8/3. errors 0, 1, 2: variance 2/3. 1 - (2/3) / (8/3) = 0.75.
    returns, values = torch.tensor([[1.0, 3.0, 5.0, 99.0]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(0.75)


def test_explained_variance_is_one_when_perfect_zero_when_constant_and_negative_when_worse() -> None:
    returns, mask = random_case(5, 1)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full((B, R), 0.7), returns, mask).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3, abs=1e-4)  # 1 - 2^2


@pytest.mark.parametrize("constant", [0.0, 0.1, -123.456, 1e6])
def test_explained_variance_of_constant_returns_is_zero(constant: float) -> None:
    values, mask = random_case(5, 1)
    assert explained_variance(values, torch.full((B, R), constant), mask).item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_explained_variance_matches_the_oracle(seed: int) -> None:
    values, returns, mask = random_case(seed, 2)
    errors, real = oracles.real_values(returns - values, mask), oracles.real_values(returns, mask)
    expected = 1 - oracles.variance(errors) / oracles.variance(real)
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=1e-4)


# what holds for all of them


def run_shaped_rewards(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return shaped_rewards(torch.ones(B), a, b, mask, 0.1, 5.0, "k3")


def run_advantages(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return gae(a, b, mask, 0.9, 0.8)[0]


def run_returns(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return gae(a, b, mask, 0.9, 0.8)[1]


MASKED: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    run_shaped_rewards,
    run_advantages,
    run_returns,
    explained_variance,
]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("function", MASKED)
def test_slots_outside_the_mask_do_not_matter_even_when_nan(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], poison: float
) -> None:
    first, second, mask = random_case(7, 2)
    results, gradients = [], []
    for fill in (0.0, poison):
        leaves = [torch.where(mask, x, fill).requires_grad_() for x in (first, second)]
        result = function(*leaves, mask)
        (result**2).sum().backward()
        results.append(result.detach())
        gradients.append([x.grad for x in leaves])
    assert torch.equal(results[0], results[1])
    for clean, poisoned in zip(*gradients, strict=True):
        assert torch.equal(clean, poisoned)
        assert torch.all(poisoned[~mask] == 0)
    assert results[0].ndim == 0 or torch.all(results[0][~mask] == 0)


def test_losses_of_zeroed_inputs_have_no_gradient_outside_the_mask() -> None:
    # The way to use them when padding may hold nan: zero the inputs, sum under the mask.
    raw, other, advantages, mask = random_case(8, 3)
    leaf = torch.where(mask, raw, torch.nan).requires_grad_()
    x = zero_masked(leaf, mask)
    loss = clipped_policy_loss(x, other, advantages, 0.2) + clipped_value_loss(x, other, advantages, 0.2)
    masked_mean(loss, mask).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and torch.all(leaf.grad[~mask] == 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, mask: kl_estimate(a, b, "k3"),
        lambda a, b, c, mask: shaped_rewards(c[:, 0], a, b, mask, 0.1, 1.0),
        lambda a, b, c, mask: gae(a, b, mask, 1.0, 0.95)[1],
        lambda a, b, c, mask: clipped_policy_loss(a, b, c, 0.2),
        lambda a, b, c, mask: clipped_value_loss(a, b, c, 0.2),
        lambda a, b, c, mask: clipped_value_loss(a, b, c, None),
        lambda a, b, c, mask: explained_variance(a, b, mask),
    ],
)
def test_bfloat16_is_computed_in_float32_and_inputs_are_left_alone(function: Callable[..., Tensor]) -> None:
    *tensors, mask = random_case(9, 3)
    inputs = [*(x.bfloat16() for x in tensors), mask]
    before = [x.clone() for x in inputs]
    result = function(*inputs)
    assert result.dtype == torch.float32
    assert torch.equal(result, function(*(x.float() for x in inputs[:3]), mask))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("function", [kl_estimate, lambda a, b, kind: run_with_kind(a, b, kind)])
def test_an_unknown_kl_kind_names_the_choices(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="must be 'k1', 'k2' or 'k3', got 'k4'"):
        function(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def run_with_kind(a: Tensor, b: Tensor, kind: str) -> Tensor:
    mask = torch.ones(1, 1, dtype=torch.bool)
    return shaped_rewards(torch.zeros(1), a, b, mask, 0.1, kind=kind)  # type: ignore[arg-type]
