"""tristage.algo.masking: hand-worked numbers, the slow twins, and what must hold for any input."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tristage.algo.masking import (
    correlation,
    masked_mean,
    masked_moments,
    masked_sum,
    position_ids,
    response_mask,
    whiten,
    zero_masked,
)

X = torch.tensor([[1.0, 2.0, 7.0], [6.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])  # real: 1, 2, 6


def random_case(seed: int, shape: tuple[int, ...] = (4, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3 + 1
    mask = torch.rand(shape, generator=generator) < 0.6
    mask.view(-1)[0] = True
    return x, mask


def test_masked_sum_adds_real_tokens_only() -> None:
    assert masked_sum(X, MASK).item() == 1 + 2 + 6
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 6]
    assert masked_sum(X, MASK, dim=0).tolist() == [7, 2, 0]
    assert masked_sum(X, MASK, dim=(0, 1)).item() == 9


def test_masked_mean_divides_by_the_number_of_real_tokens() -> None:
    assert masked_mean(X, MASK).item() == 3  # (1 + 2 + 6) / 3
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6]
    assert masked_mean(X, MASK, dim=0).tolist() == [3.5, 2, 0]  # (1 + 6) / 2, 2 / 1, nothing


def test_masked_mean_of_nothing_is_zero() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_mean(X, nothing).item() == 0
    assert masked_mean(X * torch.nan, nothing, dim=1).tolist() == [0, 0]


def test_masked_mean_of_a_comparison_is_a_fraction() -> None:
    assert masked_mean(X > 1.5, MASK).item() == pytest.approx(2 / 3)  # 2 and 6, out of 1, 2, 6


def test_masked_moments_are_the_mean_and_the_biased_variance() -> None:
    mean, var = masked_moments(X, MASK)
    assert mean.item() == 3
    assert var.item() == pytest.approx(14 / 3)  # (4 + 1 + 9) / 3


def test_whiten_scales_by_the_given_moments() -> None:
    # (1-3)/2, (2-3)/2, (6-3)/2 and 0 where masked
    white = whiten(X, MASK, torch.tensor(3.0), torch.tensor(4.0))
    torch.testing.assert_close(white, torch.tensor([[-1.0, -0.5, 0.0], [1.5, 0.0, 0.0]]))


def test_whiten_of_equal_values_is_zero_and_not_nan() -> None:
    x = torch.full((2, 3), 5.0)
    assert whiten(x, MASK, *masked_moments(x, MASK)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_sums_and_moments_match_the_oracle(seed: int) -> None:
    x, mask = random_case(seed)
    real = oracles.real_values(x, mask)
    mean, var = masked_moments(x, mask)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(real), abs=1e-5)
    assert masked_mean(x, mask).item() == pytest.approx(oracles.mean(real), abs=1e-6)
    assert mean.item() == pytest.approx(oracles.mean(real), abs=1e-6)
    assert var.item() == pytest.approx(oracles.variance(real), rel=1e-5, abs=1e-6)
    for row in range(4):
        total = math.fsum(oracles.real_values(x[row], mask[row]))
        assert masked_sum(x, mask, dim=1)[row].item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_whitened_tokens_have_mean_zero_and_variance_one(seed: int) -> None:
    x, mask = random_case(seed)
    mean, var = masked_moments(whiten(x, mask, *masked_moments(x, mask)), mask)
    assert mean.item() == pytest.approx(0, abs=1e-6)
    assert var.item() == pytest.approx(1, abs=1e-5)


def test_whiten_agrees_for_a_batch_and_for_its_halves_under_the_same_moments() -> None:
    x, mask = random_case(11)
    moments = masked_moments(x, mask)
    halves = [whiten(x[i : i + 2], mask[i : i + 2], *moments) for i in (0, 2)]
    assert torch.equal(whiten(x, mask, *moments), torch.cat(halves))


FUNCTIONS = {
    "zero_masked": zero_masked,
    "masked_sum": masked_sum,
    "masked_sum_dim": lambda x, mask: masked_sum(x, mask, dim=1),
    "masked_mean": masked_mean,
    "masked_mean_dim": lambda x, mask: masked_mean(x, mask, dim=1),
    "mean": lambda x, mask: masked_moments(x, mask)[0],
    "var": lambda x, mask: masked_moments(x, mask)[1],
    "whiten": lambda x, mask: whiten(x, mask, *masked_moments(x, mask)),
}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_slots_do_not_matter_even_when_they_are_nan(name: str, poison: float) -> None:
    x, mask = random_case(3)
    results, gradients = [], []
    for fill in (0.0, poison):
        leaf = torch.where(mask, x, fill).requires_grad_()
        result = FUNCTIONS[name](leaf, mask)
        (result**2).sum().backward()
        results.append(result.detach())
        gradients.append(leaf.grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.all(gradients[1][~mask] == 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_in_a_real_token_is_not_hidden(name: str) -> None:
    x, mask = random_case(3)
    x.view(-1)[0] = torch.nan
    assert FUNCTIONS[name](x, mask).isnan().any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_gives_float32_and_inputs_are_left_alone(name: str) -> None:
    x, mask = random_case(3)
    x = x.bfloat16()
    x_before, mask_before = x.clone(), mask.clone()
    assert FUNCTIONS[name](x, mask).dtype == torch.float32
    assert torch.equal(x, x_before) and torch.equal(mask, mask_before)
    assert FUNCTIONS[name](x.double(), mask).dtype == torch.float64


def test_masked_sum_of_many_bfloat16_ones_counts_them_all() -> None:
    ones = torch.ones(1001, dtype=torch.bfloat16)  # bfloat16 itself cannot hold 1001
    assert masked_sum(ones, ones.bool()).item() == 1001


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"x is \(2, 3\) but its mask is \(2, 1\)"):
        masked_sum(X, MASK[:, :1])


def test_response_mask_ends_with_the_first_eos() -> None:
    ids = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 5, 5, 5], [5, 6, 7, 2]])
    assert response_mask(ids, 2).tolist() == [
        [True, True, False, False],  # the second EOS is after the end
        [True, True, True, True],  # no EOS: cut off by the length
        [True, False, False, False],  # an answer of EOS alone
        [True, True, True, True],  # EOS in the last slot
    ]


def test_response_mask_keeps_the_sampled_eos_when_pad_is_eos() -> None:
    ids = torch.tensor([[5, 2, 2, 2], [2, 2, 2, 2]])
    assert response_mask(ids, 2).tolist() == [[True, True, False, False], [True, False, False, False]]


def test_response_mask_keeps_pad_ids_inside_a_response() -> None:
    pad = 0
    assert response_mask(torch.tensor([[pad, 5, pad, 2, pad]]), 2).tolist() == [
        [True, True, True, True, False]
    ]


def test_response_mask_stops_at_whichever_eos_comes_first() -> None:
    ids = torch.tensor([[5, 3, 2, 5], [5, 2, 3, 5]])
    expected = [[True, True, False, False], [True, True, False, False]]
    assert response_mask(ids, [2, 3]).tolist() == response_mask(ids, (3, 2)).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eos_ids", [[0], [1, 4]])
def test_response_mask_matches_the_oracle(seed: int, eos_ids: list[int]) -> None:
    ids = torch.randint(0, 6, (8, 9), generator=torch.Generator().manual_seed(seed))
    mask = response_mask(ids, eos_ids)
    assert mask.dtype == torch.bool
    assert mask.tolist() == oracles.response_mask(ids, eos_ids)


def test_correlation_by_hand_and_of_numbers_that_do_not_vary() -> None:
    # Deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6).
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 4, 4])).item() == pytest.approx(3 / 12**0.5)
    assert correlation(torch.arange(5.0), -torch.arange(5)).item() == pytest.approx(-1)
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert correlation(x, y).item() == pytest.approx(statistics.correlation(x.tolist(), y.tolist()))
    for constant in (torch.full((7,), 0.1), torch.zeros(0)):
        assert correlation(constant, torch.arange(len(constant))).item() == 0


def test_position_ids_count_from_the_first_real_token() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, True], [True, True, False, False]])
    # Right padding keeps the last position: nothing there is read, and the number stays inside the table.
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]
    assert position_ids(mask).dtype == torch.long


@pytest.mark.parametrize("seed", range(3))
def test_position_ids_match_the_oracle(seed: int) -> None:
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert position_ids(mask).tolist() == oracles.position_ids(mask)


def test_position_ids_do_not_depend_on_how_much_padding_is_on_the_left() -> None:
    mask = torch.tensor([[False, True, True]])
    wider = torch.nn.functional.pad(mask, (4, 0))
    assert position_ids(wider)[:, -2:].tolist() == position_ids(mask)[:, -2:].tolist() == [[0, 1]]
