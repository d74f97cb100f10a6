"""Who this rank is, and what ranks exchange: reductions, gathers, barriers."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast
import torch
import torch.distributed as torch_dist
from tristage.dist import watchdog, progress



F = TypeVar("F", bound=Callable[..., Any])


def _watched(collective: F) -> F:
    """Mark the rank as waiting, so that the watchdog can tell which rank is late."""

    @functools.wraps(collective)
    def watched(*arguments: Any, **named: Any) -> Any:
        with progress.phase(f"{collective.__name__}, waiting for the others"):
            return collective(*arguments, **named)

    return cast(F, watched)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def node_suffix() -> str:
    """" (rank 3 on HOST)" on other ranks than 0; otherwise empty."""
    return f" (rank {rank()} on {platform.node()})" if rank() != 0 else ""


def is_main() -> bool:
    return rank() == 0


def print0(*words: object) -> None:
    """Print on rank 0 only, at once."""
    if is_main():
        print(*words, flush=True)


@_watched
def sum_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum of each named number over ranks, in float64. Every rank must pass the same names."""
    return _reduce_named(values, device, torch_dist.ReduceOp.SUM)


@_watched
def max_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Largest of each named number over ranks; like sum_over_ranks."""
    return _reduce_named(values, device, torch_dist.ReduceOp.MAX)


def _reduce_named(values: Mapping[str, float], device: torch.device, operation: Any) -> dict[str, float]:
    names = sorted(values)
    numbers = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    if world_size() > 1:
        torch_dist.all_reduce(numbers, operation)
    return dict(zip(names, numbers.tolist(), strict=True))


@_watched
def all_gather_rows(x: torch.Tensor) -> torch.Tensor:
    """[b, ...] on each rank -> [ranks * b, ...] on every rank, in rank order. b must agree."""
    if world_size() == 1:
        return x
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    parts = [torch.empty_like(wire) for _ in range(world_size())]
    torch_dist.all_gather(parts, wire.contiguous())
    return torch.cat(parts).to(x.dtype)


@_watched
def gather_objects(item: Any) -> list[Any]:
    """Every rank's small Python object, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(items, item)
    return items


@_watched
def broadcast(x: torch.Tensor, source: int) -> None:
    """Overwrite x on every rank with that of rank `source`."""
    if world_size() > 1:
        torch_dist.broadcast(x, source)


@_watched
def barrier() -> None:
    if world_size() > 1:
        torch_dist.barrier()
