"""What PPO can do beside its plain form: hand-worked numbers, the slow twins, settings that exclude each other."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import step3_ppo.build
import step3_ppo.train
from step3_ppo.config import PPOConfig
from step3_ppo.engines import check_models
from step3_ppo.rewards import decode, load_functions
from step3_ppo.rollout import Control, _advantages, shape_scores
from tests.helpers import oracles, tiny
from tristage.algo.masking import masked_moments, masked_sum, zero_masked
from tristage.algo.ppo import (
    KLController,
    RunningMoments,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    huber_value_loss,
    shaped_rewards,
)
from tristage.answering.scorers import load_function, score_texts
from tristage.config import load_config
from tristage.errors import UserError
from tristage.models.tokenizer import load_tokenizer

CLIPS = [(0.2, None, None), (0.2, 0.35, None), (0.2, None, 1.3), (0.1, 0.5, 3.0), (0.3, 0.1, 1.01)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_shape(seed: int) -> tuple[int, int]:
    rng = random.Random(seed)
    return rng.randint(1, 6), rng.randint(1, 9)


def random_case(seed: int, num: int) -> list[Tensor]:
    """num tensors [B,R] in float64, B and R random, and a mask with responses of any length from 1."""
    rows, columns = random_shape(seed)
    g = generator(seed)
    tensors = [torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(num)]
    return [*tensors, torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=g)]


def elementwise(function: Callable[..., float], *tensors: Tensor) -> Tensor:
    """A function of floats on every slot of tensors of one shape."""
    flat = [function(*slot) for slot in zip(*(x.reshape(-1).tolist() for x in tensors), strict=True)]
    return torch.tensor(flat, dtype=torch.float64).reshape(tensors[0].shape)


def assert_close(result: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


# -- clip_high and dual_clip -------------------------------------------------------------------------------


def test_the_upper_clip_may_be_another_one() -> None:
    # ratio 1.5, A = 1: gains 1.3, the upper clip's. ratio 0.5, A = -1: costs 0.8, the lower clip's.
    # ratio 1.25 is inside the upper clip and gains all of itself; so its gradient is -ratio.
    logprobs = torch.tensor([1.5, 0.5, 1.25]).log().requires_grad_()
    loss = clipped_policy_loss(logprobs, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2, clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.8, -1.25]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, -1.25]))


def test_dual_clip_bounds_what_a_negative_advantage_costs() -> None:
    # ratio 5, c = 3: A = -2 costs 6 and not 10, without a gradient. A = 2 gains 1.2 * 2 as ever.
    # ratio 2.5 is under c: A = -2 costs 5.
    logprobs = torch.tensor([5.0, 5.0, 2.5]).log().requires_grad_()
    loss = clipped_policy_loss(logprobs, torch.zeros(3), torch.tensor([-2.0, 2.0, -2.0]), 0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([6.0, -2.4, 5.0]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, 5.0]))


@pytest.mark.parametrize("clip, clip_high, dual_clip", CLIPS)
@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_and_its_gradient_match_the_oracle(
    clip: float, clip_high: float | None, dual_clip: float | None, seed: int
) -> None:
    logprobs, old, advantages, _ = random_case(seed, 3)
    high = clip if clip_high is None else clip_high

    def loss(logprob: float, old_logprob: float, advantage: float) -> float:
        return oracles.policy_loss(logprob, old_logprob, advantage, clip, high, dual_clip)

    leaf = logprobs.clone().requires_grad_()
    result = clipped_policy_loss(leaf, old, advantages, clip, clip_high, dual_clip)
    assert_close(result, elementwise(loss, logprobs, old, advantages))
    result.sum().backward()
    slopes = elementwise(lambda x, o, a: oracles.slope(lambda y: loss(y, o, a), x), logprobs, old, advantages)
    assert leaf.grad is not None
    assert_close(leaf.grad, slopes, 1e-6)


def test_both_clips_are_off_by_default_and_far_ones_change_nothing() -> None:
    logprobs, old, advantages, _ = random_case(1, 3)
    plain = clipped_policy_loss(logprobs, old, advantages, 0.2)
    assert torch.equal(plain, clipped_policy_loss(logprobs, old, advantages, 0.2, 0.2, None))
    assert torch.equal(plain, clipped_policy_loss(logprobs, old, advantages, 0.2, None, 1e9))


def test_dual_clip_keeps_a_broken_ratio_at_a_bounded_loss() -> None:
    logprobs = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = clipped_policy_loss(logprobs, torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.2, dual_clip=3.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([3.0, 0.8]))
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0, 0]


# -- Huber's loss ------------------------------------------------------------------------------------------


def test_huber_loss_is_square_near_and_linear_far() -> None:
    # delta 2: error 1 -> 0.5; error -2 -> 2, the border; error 5 -> 2 * (5 - 1) = 8 with slope 2.
    values = torch.tensor([1.0, -2.0, 5.0, -5.0], requires_grad=True)
    loss = huber_value_loss(values, torch.zeros(4), delta=2.0)
    torch.testing.assert_close(loss, torch.tensor([0.5, 2.0, 8.0, 8.0]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1.0, -2.0, 2.0, -2.0]))


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_huber_loss_and_its_gradient_match_the_oracle(delta: float, seed: int) -> None:
    values, returns, _ = random_case(seed, 2)
    leaf = values.clone().requires_grad_()
    result = huber_value_loss(leaf, returns, delta)
    assert_close(result, elementwise(lambda v, r: oracles.huber_loss(v, r, delta), values, returns))
    result.sum().backward()
    slopes = elementwise(lambda v, r: oracles.slope(lambda x: oracles.huber_loss(x, r, delta), v), values, returns)
    assert leaf.grad is not None
    assert_close(leaf.grad, slopes, 1e-6)


def test_huber_loss_with_a_far_delta_is_the_squared_one() -> None:
    values, returns, _ = random_case(2, 2)
    assert torch.equal(huber_value_loss(values, returns, 1e6), clipped_value_loss(values, values, returns, None))


# -- gae where a response was cut off ----------------------------------------------------------------------


def test_a_response_that_was_cut_off_is_worth_its_last_state_s_value_afterwards() -> None:
    # gamma 0.9, lam 0.5, final value 10: delta_1 = 4 + 0.9 * 10 - 2 = 11, delta_0 = 0 + 0.9 * 2 - 1 = 0.8,
    # A_0 = 0.8 + 0.45 * 11 = 5.75. The row that ended has final value 0: delta 3 - 1.
    values, rewards = torch.tensor([[1.0, 2.0], [1.0, 7.0]]), torch.tensor([[0.0, 4.0], [3.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages, returns = gae(values, rewards, mask, 0.9, 0.5, torch.tensor([10.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[5.75, 11.0], [2.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[6.75, 13.0], [3.0, 0.0]]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("seed", range(4))
def test_gae_with_final_values_matches_the_oracle(gamma: float, lam: float, seed: int) -> None:
    values, rewards, mask = random_case(seed, 2)
    final = torch.randn(len(values), generator=generator(seed), dtype=torch.float64)
    expected = oracles.gae_cut_off(values, rewards, mask, gamma, lam, final)
    for result, slow in zip(gae(values, rewards, mask, gamma, lam, final), expected, strict=True):
        assert_close(result, slow)


def test_final_values_of_zero_are_none() -> None:
    values, rewards, mask = random_case(3, 2)
    nothing = torch.zeros(len(values))
    with_zeros, without = gae(values, rewards, mask, 0.9, 0.8, nothing), gae(values, rewards, mask, 0.9, 0.8)
    assert all(torch.equal(one, other) for one, other in zip(with_zeros, without, strict=True))


def test_final_values_come_after_the_last_real_token_however_much_padding_follows() -> None:
    values, rewards, mask = random_case(4, 2)
    final = torch.arange(1.0, len(values) + 1)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (values, rewards, mask)]
    for narrow, wide in zip(
        gae(values, rewards, mask, 0.9, 0.8, final), gae(*wider, 0.9, 0.8, final), strict=True
    ):
        assert torch.equal(wide[:, : narrow.shape[1]], narrow) and torch.all(wide[:, narrow.shape[1] :] == 0)


# -- advantages from groups --------------------------------------------------------------------------------


def test_rloo_is_less_the_mean_of_the_others() -> None:
    # 1 - (2 + 6) / 2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5; the group of two: 5 - 9 and 9 - 5. Rows come mixed.
    rewards, group = torch.tensor([1.0, 5.0, 2.0, 9.0, 6.0]), torch.tensor([7, 3, 7, 3, 7])
    torch.testing.assert_close(group_advantages(rewards, group, "rloo"), torch.tensor([-3.0, -4.0, -1.5, 4.0, 4.5]))


def test_grpo_standardises_within_the_group() -> None:
    # 1, 2, 3: mean 2, unbiased deviation 1. 0, 4: mean 2, deviation sqrt(8).
    rewards, group = torch.tensor([1.0, 0.0, 2.0, 4.0, 3.0]), torch.tensor([0, 1, 0, 1, 0])
    expected = torch.tensor([-1.0, -2 / math.sqrt(8), 0.0, 2 / math.sqrt(8), 1.0])
    torch.testing.assert_close(group_advantages(rewards, group, "grpo"), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize("seed", range(4))
def test_group_advantages_match_the_oracle(kind: Any, seed: int) -> None:
    g = generator(seed)
    sizes = torch.randint(2, 6, (int(torch.randint(1, 6, (1,), generator=g)),), generator=g)
    group = torch.arange(10, 10 + len(sizes)).repeat_interleave(sizes)
    group = group[torch.randperm(len(group), generator=g)]
    rewards = torch.randn(len(group), generator=g, dtype=torch.float64) * 3
    epsilon = 1e-4 if kind == "grpo" else 0.0
    assert_close(group_advantages(rewards, group, kind), oracles.group_advantages(rewards, group, kind, epsilon))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -123.456, 1e6])
def test_responses_of_equal_reward_have_no_advantage(kind: Any, constant: float) -> None:
    rewards = torch.tensor([constant] * 3 + [1.0, 2.0])
    result = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1]), kind)
    assert result[:3].abs().max() <= 1e-6 * max(1.0, abs(constant)) and (kind == "rloo" or not result[:3].any())
    assert result[4] > 0.5


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_group_advantages_add_up_to_zero_and_know_no_other_group(kind: Any) -> None:
    rewards, group = torch.randn(12, generator=generator(0)), torch.arange(12) % 3
    result = group_advantages(rewards, group, kind)
    for number in range(3):
        assert result[group == number].sum().item() == pytest.approx(0, abs=1e-5)
    moved = torch.where(group == 0, rewards * 5 - 1, rewards)
    assert torch.equal(group_advantages(moved, group, kind)[group != 0], result[group != 0])


def test_grpo_does_not_depend_on_the_scale_of_rewards_and_rloo_is_linear_in_it() -> None:
    rewards, group = torch.randn(8, generator=generator(1)), torch.arange(8) // 4
    scaled = rewards * 100 + 7
    for kind, factor in (("grpo", 1.0), ("rloo", 100.0)):
        one, other = (group_advantages(x, group, kind) for x in (rewards, scaled))  # type: ignore[arg-type]
        torch.testing.assert_close(other, one * factor, atol=1e-3, rtol=1e-3)


def test_an_unknown_group_baseline_names_the_choices() -> None:
    with pytest.raises(ValueError, match="must be 'rloo' or 'grpo', got 'mean'"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "mean")  # type: ignore[arg-type]


# -- slots outside the mask, and dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_outside_the_mask_of_gae_does_not_matter_even_when_nan(poison: float) -> None:
    values, rewards, mask = random_case(7, 2)
    final = torch.arange(1.0, len(values) + 1)
    results, gradients = [], []
    for fill in (0.0, poison):
        leaves = [torch.where(mask, x, fill).requires_grad_() for x in (values, rewards)]
        result = torch.stack(gae(*leaves, mask, 0.9, 0.8, final))
        (result**2).sum().backward()
        results.append(result.detach())
        gradients.append([leaf.grad for leaf in leaves])
    assert torch.equal(*results) and torch.all(results[1][:, ~mask] == 0)
    for clean, poisoned in zip(*gradients, strict=True):
        assert torch.equal(clean, poisoned) and torch.all(poisoned[~mask] == 0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_losses_of_zeroed_inputs_have_no_value_and_no_gradient_outside_the_mask(poison: float) -> None:
    raw, other, advantages, mask = random_case(8, 3)
    sums, gradients = [], []
    for fill in (0.0, poison):
        leaf = torch.where(mask, raw, fill).requires_grad_()
        x = zero_masked(leaf, mask)
        loss = clipped_policy_loss(x, other, advantages, 0.2, 0.3, 1.5) + huber_value_loss(x, other, 0.5)
        total = masked_sum(loss, mask)
        total.backward()
        sums.append(total.item())
        gradients.append(leaf.grad)
    assert sums[0] == sums[1] and torch.equal(*gradients) and torch.all(gradients[1][~mask] == 0)


GROUP = torch.tensor([0, 0, 1, 1])
DTYPES: list[Callable[..., Tensor]] = [
    lambda a, b, c: clipped_policy_loss(a, b, c, 0.2, 0.3, 1.5),
    lambda a, b, c: huber_value_loss(a, b, 0.5),
    lambda a, b, c: gae(a, b, torch.ones(4, 6, dtype=torch.bool), 1.0, 0.9, c[:, 0])[0],
    lambda a, b, c: group_advantages(a[:, 0], GROUP, "rloo"),
    lambda a, b, c: group_advantages(a[:, 0], GROUP, "grpo"),
]


@pytest.mark.parametrize("function", DTYPES)
def test_bfloat16_is_computed_in_float32_and_inputs_are_left_alone(function: Callable[..., Tensor]) -> None:
    inputs = [torch.randn(4, 6, generator=generator(i)).bfloat16() for i in range(3)]
    before = [x.clone() for x in inputs]
    result = function(*inputs)
    assert result.dtype == torch.float32 and torch.equal(result, function(*(x.float() for x in inputs)))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# -- the KL coefficient ------------------------------------------------------------------------------------


def test_the_kl_coefficient_rises_above_the_target_and_falls_below() -> None:
    # Target 6, 64 responses, horizon 640: K = 0.1. KL 6.6 is 10 % over: 0.1 * 1.01. KL 5.4 is 10 % under: * 0.99.
    controller = KLController(0.1, target=6.0, horizon=640.0)
    controller.update(6.6, 64)
    assert controller.coef == pytest.approx(0.101)
    controller.update(5.4, 64)
    assert controller.coef == pytest.approx(0.101 * 0.99)
    controller.update(6.0, 64)
    assert controller.coef == pytest.approx(0.101 * 0.99)


@pytest.mark.parametrize("kl, coef", [(12.0, 0.102), (1e9, 0.102), (0.0, 0.098), (-50.0, 0.098)])
def test_an_iteration_counts_for_a_fifth_at_most(kl: float, coef: float) -> None:
    controller = KLController(0.1, target=6.0, horizon=640.0)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(coef)


def test_a_kl_that_is_no_number_leaves_the_coefficient_alone() -> None:
    controller = KLController(0.1, target=6.0)
    for kl in (math.nan, math.inf, -math.inf):
        controller.update(kl, 64)
    assert controller.coef == 0.1


def test_without_a_target_the_coefficient_is_fixed() -> None:
    controller = KLController(0.1)
    controller.update(100.0, 64)
    assert controller.coef == 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_coefficients_match_the_oracle_and_survive_a_state_dict(seed: int) -> None:
    rng = random.Random(seed)
    kls = [rng.uniform(-1, 15) for _ in range(12)]
    target, responses, horizon = rng.uniform(1, 8), rng.randint(1, 512), rng.uniform(100, 10_000)
    controller, found = KLController(0.2, target, horizon), []
    for kl in kls:
        resumed = KLController(0.9, target, horizon)
        resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))  # as a checkpoint keeps it
        resumed.update(kl, responses)
        found.append(resumed.coef)
        controller = resumed
    assert found == pytest.approx(oracles.adaptive_kl_coef(0.2, kls, target, responses, horizon))


# -- running moments ---------------------------------------------------------------------------------------


def test_running_moments_of_two_batches() -> None:
    # 1, 3 and then 5, 7: mean 4, squares 9 + 1 + 1 + 9 = 20, deviation sqrt(20 / 3).
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, pytest.approx(math.sqrt(2)))
    moments.update(torch.tensor([5.0, 7.0]))
    assert (moments.count, moments.mean, moments.std) == (4, 4.0, pytest.approx(math.sqrt(20 / 3)))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_running_moments_equal_numpy_s_over_everything_seen_and_survive_a_state_dict(seed: int, offset: float) -> None:
    g, moments, seen = generator(seed), RunningMoments(), []
    for _ in range(10):
        batch = torch.randn(int(torch.randint(1, 40, (1,), generator=g)), generator=g) * 3 + offset
        seen.append(batch.double().numpy())
        moments.update(batch)
        resumed = RunningMoments()
        resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
        moments = resumed
        everything = np.concatenate(seen)
        assert moments.count == len(everything)
        assert moments.mean == pytest.approx(everything.mean(), rel=1e-12, abs=1e-12)
        if len(everything) > 1:
            assert moments.std == pytest.approx(everything.std(ddof=1), rel=1e-9)


def test_running_moments_pass_over_what_is_no_number() -> None:
    moments = RunningMoments()
    for batch in ([math.nan, 1.0, math.inf], [math.nan], [], [-math.inf, 3.0]):
        moments.update(torch.tensor(batch))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, pytest.approx(math.sqrt(2)))


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6, 1 / 3])
def test_the_deviation_of_equal_numbers_is_one_so_that_dividing_by_it_is_safe(constant: float) -> None:
    moments = RunningMoments()
    assert moments.std == 1
    for size in (1, 3, 7, 50, 11):
        moments.update(torch.full((size,), constant))
        assert moments.std == 1


# -- scores and advantages of step 3 -----------------------------------------------------------------------


def settings_of(folder: Path, *overrides: str) -> PPOConfig:
    return tiny.ppo_config(folder, "actor", "reward", "rows.jsonl", 0, *overrides)


def test_the_penalty_comes_before_the_scale_and_the_scale_before_the_clip(tmp_path: Path) -> None:
    # 3 and 1, the second without EOS and penalty 2: 3, -1. Deviation sqrt(8): 1.06, -0.354. Clip 1: 1, -0.354.
    settings = settings_of(tmp_path, "ppo.missing_eos_penalty=2", "ppo.scale_reward=true", "ppo.reward_clip=1")
    control = Control.of(settings.ppo)
    scores = shape_scores(torch.tensor([3.0, 1.0]), torch.tensor([True, False]), settings.ppo, control)
    torch.testing.assert_close(scores, torch.tensor([3.0, -1.0]) / math.sqrt(8))
    nothing, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
    rewards = shaped_rewards(scores, nothing, nothing, mask, 0.1, settings.ppo.reward_clip)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 1.0], [-1 / math.sqrt(8), 0.0]]))
    # The second iteration divides by the deviation of all four: 3, -1, 5, 5 have mean 3 and squares 0 + 16 + 4 + 4.
    again = shape_scores(torch.tensor([5.0, 5.0]), torch.tensor([True, True]), settings.ppo, control)
    torch.testing.assert_close(again, torch.tensor([5.0, 5.0]) / math.sqrt(24 / 3))


def test_scores_are_left_alone_by_default(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    scores, control = torch.tensor([30.0, -1.0, 2.0]), Control.of(settings.ppo)
    assert torch.equal(shape_scores(scores, torch.tensor([True, False, False]), settings.ppo, control), scores)
    assert control.scores.count == 0


def test_control_survives_a_checkpoint_s_json(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path, "ppo.scale_reward=true", "ppo.adaptive_kl_target=2", "ppo.kl_coef=0.3", "ppo.adaptive_kl_horizon=50"
    )
    control, resumed = Control.of(settings.ppo), Control.of(settings.ppo)
    control.kl.update(3.0, 16)
    shape_scores(torch.tensor([3.0, 1.0, 7.0]), torch.ones(3, dtype=torch.bool), settings.ppo, control)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert resumed.kl.coef == control.kl.coef == pytest.approx(0.3 * (1 + 0.2 * 16 / 50))
    assert (resumed.scores.count, resumed.scores.mean, resumed.scores.std) == (
        3, control.scores.mean, control.scores.std
    )  # fmt: skip


def advantages_of(folder: Path, seed: int, *overrides: str) -> tuple[list[Tensor], Any, Tensor]:
    """((rewards, values, mask, group), what _advantages makes of them, final values)."""
    g = generator(seed)
    rewards, values = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    mask = torch.arange(5) < torch.tensor([[1], [5], [3], [2], [5], [4]])
    rewards, values = (torch.where(mask, x, torch.nan) for x in (rewards, values))
    group, after = torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, generator=g)
    settings = settings_of(folder, *overrides)
    final = after if settings.ppo.bootstrap else None
    return [rewards, values, mask, group], _advantages(rewards, values, final, mask, group, settings.ppo), after


@pytest.mark.parametrize("bootstrap", [False, True])
def test_advantages_of_gae_are_whitened_unless_that_is_off(tmp_path: Path, bootstrap: bool) -> None:
    words = ["ppo.gamma=0.9", "ppo.lam=0.8", f"ppo.bootstrap={bootstrap}"]
    (rewards, values, mask, _), (plain, returns, moments), after = advantages_of(
        tmp_path, 0, *words, "ppo.whiten=false"
    )
    expected = gae(values, rewards, mask, 0.9, 0.8, after if bootstrap else None)
    assert torch.equal(plain, expected[0]) and torch.equal(returns, expected[1])
    _, (white, same_returns, same_moments), _ = advantages_of(tmp_path, 0, *words)
    assert torch.equal(returns, same_returns) and moments == same_moments == masked_moments(plain, mask)
    torch.testing.assert_close(white, torch.where(mask, (plain - moments[0]) / moments[1].sqrt(), 0.0))
    assert [float(x) for x in masked_moments(white, mask)] == pytest.approx([0, 1], abs=1e-5)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_advantages_of_groups_stand_on_real_tokens_alone(tmp_path: Path, kind: Any) -> None:
    words = (f"ppo.advantage={kind}", "critic=null", "rollout.samples=2", "rollout.prompts=8")
    (rewards, _, mask, group), (advantages, returns, moments), _ = advantages_of(tmp_path, 1, *words)
    one = group_advantages(masked_sum(rewards, mask, dim=1), group, kind)
    for row in range(len(mask)):
        assert advantages[row].tolist() == [float(one[row]) if real else 0.0 for real in mask[row].tolist()]
    assert not returns.any() and moments == masked_moments(advantages, mask)


# -- reward functions --------------------------------------------------------------------------------------

SCORERS = """
NUMBER = 3

def length(prompts, responses):
    return [len(response) for response in responses]

def short(prompts, responses):
    return [1.0]

def odd(prompts, responses):
    return [float("nan") for _ in responses]

def failing(prompts, responses):
    raise KeyError("colour")

def words(prompts, responses):
    return ["many" for _ in responses]

def exiting(prompts, responses):
    raise SystemExit("enough\\nof this")

def interrupted(prompts, responses):
    raise KeyboardInterrupt

def shrinking(prompts, responses):
    prompts.clear()
    return [float(len(responses.pop()))]

def model(prompts, responses):
    return [0.0 for _ in responses]
"""


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of scorers, and a second one with the same functions."""
    for name in ("scorers_of_a_test", "more_scorers_of_a_test"):
        (tmp_path / f"{name}.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "scorers_of_a_test"


def test_a_function_is_loaded_by_module_and_name(scorers: str) -> None:
    function = load_function(f"{scorers}:length", "ppo.yaml", "grader")
    found = score_texts(function, ["a", "b"], ["", "four"], "grader").scores
    assert found.tolist() == [0, 4] and found.dtype == torch.float32


@pytest.mark.parametrize("name", ["no_such_module:length", "%s:lenght", "%s", "length", ":length", ".%s:length", "%s:"])
def test_a_function_that_cannot_be_imported_is_one_sentence(scorers: str, name: str) -> None:
    name = name.replace("%s", scorers)
    with pytest.raises(UserError) as caught:
        load_function(name, "ppo.yaml", "reward.functions")
    message = str(caught.value)
    assert message.startswith(f"ppo.yaml: key `reward.functions`: {name} cannot be imported (")
    assert message.endswith("); write module:function") and "\n" not in message


def test_what_is_no_function_is_one_sentence(scorers: str) -> None:
    with pytest.raises(UserError, match="^ppo.yaml: key `grader`: .*:NUMBER is not a function; write module:function$"):
        load_function(f"{scorers}:NUMBER", "ppo.yaml", "grader")


@pytest.mark.parametrize(
    "function, sentence",
    [
        ("short", "grader must give one finite number for each of 2 responses, gave [1.0]"),
        ("odd", "grader must give one finite number for each of 2 responses, gave [nan, nan]"),
        ("failing", "grader failed on 2 responses (KeyError: 'colour')"),
        ("words", "grader gave what is not a list of numbers (ValueError: could not convert string to float: 'many')"),
        ("exiting", "grader failed on 2 responses (SystemExit: enough of this)"),
        ("shrinking", "grader must give one finite number for each of 2 responses, gave [1.0]"),
    ],
)
def test_a_function_that_fails_is_one_sentence(scorers: str, function: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        score_texts(load_function(f"{scorers}:{function}", "ppo.yaml", "grader"), ["a", "b"], ["c", "d"], "grader")
    assert str(caught.value) == sentence


def test_a_function_cannot_change_the_texts_that_others_read(scorers: str) -> None:
    prompts, responses = ["a"], ["four"]
    function = load_function(f"{scorers}:shrinking", "ppo.yaml", "grader")
    found = score_texts(function, prompts, responses, "grader").scores
    assert found.tolist() == [4] and (prompts, responses) == (["a"], ["four"])


def test_an_interrupt_inside_a_function_stays_an_interrupt(scorers: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        score_texts(load_function(f"{scorers}:interrupted", "ppo.yaml", "grader"), ["a"], ["b"], "grader")


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_whatever_a_module_raises_at_import_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, sentence: str
) -> None:
    name = f"broken_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_function(f"{name}:f", "ppo.yaml", "grader")
    assert f"ppo.yaml: key `grader`: {name}:f cannot be imported ({sentence}" in str(caught.value)
    assert "\n" not in str(caught.value)


def reward_of(*functions: str) -> str:
    listed = ", ".join(f"{{function: '{name}', weight: {i + 0.5}}}" for i, name in enumerate(functions))
    return f"reward.functions=[{listed}]"


@pytest.mark.parametrize("words, sentence", [
    ("[999]", "key `rollout.stop_token_ids`: 999 is outside the vocabulary of actor.model ({sft}); give ids below "),
    ("[-1]", "key `rollout.stop_token_ids.0`: give 0 or more; got -1"),
    ("[end]", "key `rollout.stop_token_ids.0`: give a whole number; got \"end\""),
])  # fmt: skip
def test_a_stop_token_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path, words: str, sentence: str) -> None:
    sft = tiny.write_model(tmp_path / "sft")
    path = tiny.write_yaml(tmp_path / "ppo.yaml", tiny.ppo_values(tmp_path / "out", sft, sft, "prompts.jsonl"))
    by_rule = "reward={functions: [{function: 'tests.helpers.rewards:constant'}]}"
    with pytest.raises(UserError) as caught:
        check_models(load_config(PPOConfig, ["--config", path, f"rollout.stop_token_ids={words}", by_rule]))
    assert str(caught.value).startswith(f"{path}: {sentence.format(sft=sft)}")


@pytest.mark.parametrize("family, words, sentence", [
    ("bloom", "rollout.backend=static",
     "key `rollout.backend`: static does not know a bloom model ({sft}): it takes no position_ids; set it to padded"),
    ("gemma2", "rollout.backend=static",
     "key `rollout.backend`: static does not know a gemma2 model ({sft}): its attention slides over 8 tokens"),
    ("llama", "rollout.cuda_graphs=true", "key `rollout.cuda_graphs` needs a GPU; remove it"),
])  # fmt: skip
def test_a_backend_that_cannot_sample_here_is_refused(tmp_path: Path, family: str, words: str, sentence: str) -> None:
    sft = tiny.write_model(tmp_path / "sft", family)
    path = tiny.write_yaml(tmp_path / "ppo.yaml", tiny.ppo_values(tmp_path / "out", sft, sft, "prompts.jsonl"))
    by_rule = "reward={functions: [{function: 'tests.helpers.rewards:constant'}]}"
    with pytest.raises(UserError) as caught:
        check_models(load_config(PPOConfig, ["--config", path, words, by_rule]))
    assert str(caught.value).startswith(f"{path}: {sentence.format(sft=sft)}")


def test_other_stop_tokens_of_the_actors_generation_config_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = tiny.write_model(tmp_path / "sft")
    tokenizer, settings = load_tokenizer(sft), settings_of(tmp_path, f"actor.model={sft}")
    eos = tokenizer.eos_token_id
    for listed, words, missing in (
        (None, [], None), (eos, [], None), ([eos, 7, 9], [], "[7, 9]"),
        ([eos, 7, 9], ["rollout.stop_token_ids=[7]"], "[9]"), ([7], ["rollout.stop_token_ids=[9, 7]"], None),
    ):  # fmt: skip
        if listed is not None:
            (Path(sft) / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        settings = settings_of(tmp_path, f"actor.model={sft}", *words)
        step3_ppo.train.note_other_stop_ids(settings, tokenizer)
        said = capsys.readouterr().out
        assert said == "" if missing is None else f"rollout.stop_token_ids={missing}" in said and said.count("\n") == 1


def test_reward_terms_have_the_names_and_weights_of_their_functions(tmp_path: Path, scorers: str) -> None:
    settings = settings_of(tmp_path, reward_of(f"{scorers}:length", f"more_{scorers}:short"))
    terms, _ = load_functions(settings)
    assert [(term.name, term.settings.weight) for term in terms] == [("length", 0.5), ("short", 1.5)]
    assert terms[0].function([], ["four"]) == [4]


def test_two_reward_functions_of_one_name_are_refused(tmp_path: Path, scorers: str) -> None:
    settings = settings_of(tmp_path, reward_of(f"{scorers}:length", f"more_{scorers}:length"))
    with pytest.raises(UserError) as caught:
        load_functions(settings)
    assert str(caught.value) == (
        f"{settings.file}: key `reward.functions`: two functions are called alike; rename one of them"
    )


def test_a_function_with_the_name_of_the_reward_model_s_part_is_refused(tmp_path: Path, scorers: str) -> None:
    settings = settings_of(tmp_path, reward_of(f"{scorers}:model"))
    with pytest.raises(UserError) as caught:
        load_functions(settings)
    assert str(caught.value) == (
        f"{settings.file}: key `reward.functions`: `model` names another number of the reward; rename the function"
    )


def test_decoding_leaves_out_what_is_padding_and_special(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.write_model(tmp_path / "model"))
    rows = [[7, 8, 9], [10]]  # words: the special tokens come first
    ids = torch.full((2, max(map(len, rows)) + 2), rows[0][0])  # what is masked out is a word, too
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
        mask[i, : len(row) + 1] = True
    texts = [tokenizer.decode(row).strip() for row in rows]
    assert all(texts) and decode(tokenizer, ids, mask) == texts and decode(tokenizer, ids, mask, [1]) == texts[1:]


# -- settings ----------------------------------------------------------------------------------------------

GROUPS = ("critic=null", "rollout.prompts=8", "rollout.samples=2")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["ppo.advantage=rloo", "rollout.prompts=8", "rollout.samples=2"],
            "ppo.advantage rloo has no critic; remove `critic` or set it to null",
        ),
        (
            ["ppo.advantage=grpo", "critic=null"],
            "ppo.advantage grpo compares responses to one prompt; set rollout.samples to 2 or more",
        ),
        (["critic=null"], "key `critic` is missing; give it, or `value_head`, or set `ppo.advantage` to rloo or grpo"),
        (
            ["reward.model=null"],
            "key `reward.model` is missing; give step 2's final folder, or `reward.functions`",
        ),
        (
            ["ppo.advantage=rloo", "critic=null", "rollout.prompts=5", "rollout.samples=3"],
            "rollout.prompts x rollout.samples 15 is not a multiple of ppo.minibatch 8; change one of them",
        ),
        (
            ["reward={own_tokenizer: true, functions: [{function: 'a.b:c'}]}"],
            "key `reward.own_tokenizer` is of the reward model, and there is none; remove it",
        ),
        (["ppo.dual_clip=1"], "key `ppo.dual_clip`: give a number above 1; got 1"),
        (["ppo.clip_high=0"], "key `ppo.clip_high`: give a number above 0; got 0"),
        (["ema.decay=1"], "key `ema.decay`: give a number below 1; got 1"),
        (["ppo.kl_in=both"], "key `ppo.kl_in`: write 'reward' or 'loss'; got \"both\""),
    ],
)
def test_settings_that_exclude_each_other_are_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    path = tiny.write_yaml(tmp_path / "ppo.yaml", tiny.ppo_values(tmp_path, "actor", "reward", "rows.jsonl"))
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, ["--config", path, *words])
    assert str(caught.value) == f"{path}: {sentence}"


@pytest.mark.parametrize(
    "words",
    [
        ["ppo.advantage=rloo", *GROUPS],
        ["ppo.advantage=grpo", *GROUPS, "reward={functions: [{function: 'a.b:c'}]}"],
        ["reward={functions: [{function: 'a.b:c', weight: -1}]}"],
        ["rollout.samples=2", "rollout.prompts=8"],
    ],
)
def test_settings_that_go_together_load(tmp_path: Path, words: list[str]) -> None:
    settings = settings_of(tmp_path, *words)
    assert settings.responses == 16 and settings.total_steps == 12
    assert (settings.critic_path is None) == (settings.critic is None)


def test_without_a_reward_model_the_critic_starts_as_the_actor(tmp_path: Path) -> None:
    assert settings_of(tmp_path).critic_path == "reward"
    assert settings_of(tmp_path, "critic.model=own").critic_path == "own"
    assert settings_of(tmp_path, "reward={functions: [{function: 'a.b:c'}]}").critic_path == "actor"
    # the reward model reads other tokens
    assert settings_of(tmp_path, "reward.own_tokenizer=true").critic_path == "actor"
    assert settings_of(tmp_path, "reward.own_tokenizer=true", "critic.model=own").critic_path == "own"


@pytest.mark.parametrize("iterations, steps", [(0, 0), (1, 4), (2, 8), (9, 12)])
def test_warm_up_iterations_are_counted_in_optimizer_steps(tmp_path: Path, iterations: int, steps: int) -> None:
    settings = settings_of(tmp_path, f"critic.warmup_iterations={iterations}")  # 3 iterations of 2 epochs of 2 steps
    assert (settings.warmup_steps, settings.total_steps) == (steps, 12)
    assert settings_of(tmp_path, "ppo.advantage=rloo", *GROUPS).warmup_steps == 0


@pytest.mark.parametrize("warmup, share, start", [(0, 0, 0), (0, 0.5, 6), (1, 0, 4), (1, 0.5, 8), (1, 0.3, 6)])
def test_the_moving_average_starts_at_its_share_of_the_actor_s_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int, share: float, start: int
) -> None:
    # 12 steps, numbered from the run's start; the actor's are the last 8 where the critic warms up for an iteration.
    settings = settings_of(tmp_path, f"critic.warmup_iterations={warmup}", f"ema={{decay: 0.9, start: {share}}}")
    monkeypatch.setattr(step3_ppo.build, "WeightAverage", lambda engine, decay, start: (engine, decay, start))
    assert step3_ppo.build.make_average(settings, "actor") == ("actor", 0.9, start)


def test_blocks_of_text_divide_over_ranks(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "pretraining={data: text.jsonl, blocks: 6}")
    assert settings.plan(1).accumulation == 4 and settings.pretraining_plan(1).accumulation == 3
    with pytest.raises(UserError, match="pretraining.blocks, ppo.micro_batch: 6 rows don't divide .* on 2 ranks"):
        settings.plan(2)
