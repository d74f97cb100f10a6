"""Sums, means, moments and whitening over real tokens, and the masks that say which tokens are real.

Letters: B rows, T positions of prompt and response, R response positions, ... any shape.

A mask is bool and True on a real token. What stands in a masked slot never matters, nan and inf included: it
does not touch the value, and its gradient is exactly 0. Multiplying by the mask would not do: nan * 0 is nan.
Results are float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WHITEN_EPSILON = 1e-8  # keeps the scale finite when every real token has the same value


def at_least_float32(x: Tensor) -> Tensor:
    """x [...] -> [...] in float32, or in float64 where x already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [...], mask [...] -> [...] at least float32: x on real tokens, 0 elsewhere.

    The shapes must be equal: a mask that broadcasts would make sums and counts disagree without a word.
    """
    assert x.shape == mask.shape, f"x is {tuple(x.shape)} but its mask is {tuple(mask.shape)}"
    return torch.where(mask, at_least_float32(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """x [...], mask [...] -> sum over the real tokens, of all dimensions or of `dim`."""
    return zero_masked(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """x [...], mask [...] -> mean over the real tokens, of all dimensions or of `dim`; 0 if there is none."""
    return masked_sum(x, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x [...], mask [...] -> (mean [], var []) over real tokens; the variance is biased (divides by n)."""
    real = zero_masked(x, mask)  # before the square, whose gradient at a masked nan would be 0 * nan
    mean = masked_mean(real, mask)
    return mean, masked_mean((real - mean) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """x [...], mask [...], mean [], var [] -> [...]: (x - mean) / sqrt(var + 1e-8), 0 where masked.

    The moments are arguments so that they can be those of the tokens of all ranks.
    """
    return zero_masked((zero_masked(x, mask) - mean) * torch.rsqrt(var + _WHITEN_EPSILON), mask)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """x [B], y [B] -> [] float64: Pearson's; 0 where either does not vary."""
    dx, dy = x.double() - x.double().mean(), y.double() - y.double().mean()
    spread = (dx.square().sum() * dy.square().sum()).sqrt()
    vary = (x != x[:1]).any() & (y != y[:1]).any()  # of equal numbers, rounding leaves a spread above 0
    return torch.where(vary, (dx * dy).sum() / spread, 0.0)


def response_mask(ids: Tensor, eos_ids: int | Sequence[int]) -> Tensor:
    """ids [B,R] -> bool [B,R]: True up to and including the first EOS, the whole row when there is none.

    Pad is never looked at, so that it may have the id of EOS. With 2 as EOS and as pad:
    [5, 2, 2, 2] -> [True, True, False, False]: the model learns from the EOS that it sampled.
    """
    eos = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    is_eos = torch.isin(ids, torch.tensor(eos, dtype=ids.dtype, device=ids.device)).long()
    num_eos_before = is_eos.cumsum(dim=-1) - is_eos
    return num_eos_before == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """attention_mask [B,T] -> long [B,T]: 0, 1, 2, ... from the first real token on; 0 on left padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
