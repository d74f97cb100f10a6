"""AdamW: one fused pass, the same as torch's plain loop, and the same wherever a ZeRO stage places an element."""

from __future__ import annotations

import torch
from torch import nn

from tristage.config import OptimizerSettings
from tristage.engine.optimizer import _adamw

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
NO_OFFLOAD: dict[str, dict[str, str]] = {"zero_optimization": {}}


class Weights(nn.Module):
    """Matrices, so that all of them decay."""

    def __init__(self, *matrices: torch.Tensor) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(matrix.clone() for matrix in matrices)


def trained(optimizer: torch.optim.Optimizer, weights: Weights, sizes: list[int], steps: int = 20) -> torch.Tensor:
    """All weights after `steps`, flattened; gradients of many sizes are drawn for the flattened weights."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        drawn = torch.randn(sum(sizes), generator=generator) * 10 ** torch.randn((), generator=generator)
        for matrix, gradient in zip(weights.matrices, drawn.split(sizes), strict=True):
            matrix.grad = gradient.view_as(matrix).clone()
        optimizer.step()
    return torch.cat([matrix.detach().view(-1) for matrix in weights.matrices])


def start(sizes: list[int]) -> Weights:
    drawn = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    return Weights(*(part.view(1, -1) for part in drawn.split(sizes)))


def fused(sizes: list[int]) -> torch.Tensor:
    weights = start(sizes)
    return trained(_adamw(weights, NO_OFFLOAD, SETTINGS), weights, sizes)


def test_the_optimizer_is_torchs_plain_adamw_to_rounding() -> None:
    sizes = [7000, 26]
    weights = start(sizes)
    plain = torch.optim.AdamW(
        weights.matrices,
        lr=SETTINGS.learning_rate,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        fused=False,
        foreach=False,
    )
    torch.testing.assert_close(fused(sizes), trained(plain, weights, sizes), atol=1e-6, rtol=1e-6)


def test_an_elements_place_does_not_change_its_result() -> None:
    """As in the flat partitions of ZeRO, whose borders are inside parameters."""
    whole = fused([7026])
    for sizes in ([3, 5, 10, 7008], [3513, 3513], [1000, 6026]):
        assert torch.equal(fused(sizes), whole)


def test_one_step_is_one_call_per_group() -> None:
    weights = start([300, 700])
    optimizer = _adamw(weights, NO_OFFLOAD, SETTINGS)
    for matrix in weights.matrices:
        matrix.grad = torch.ones_like(matrix)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert {event.key: event.count for event in profile.key_averages()}["aten::_fused_adamw_"] == 1
