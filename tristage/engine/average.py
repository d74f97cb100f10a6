"""A moving average of an engine's weights in float32, distributed over the ranks, that can replace the weights.

Under ZeRO-3 a rank averages its own partition of each parameter; else each parameter is averaged by one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tristage import dist
from tristage.engine import refresh_persistent
from tristage.storage.pieces import Piece, PieceReader


class WeightAverage:
    """At each optimizer step average <- decay * average + (1 - decay) * weights; until step `start` a copy."""

    def __init__(self, engine: Any, decay: float, start: int = 0) -> None:
        self.engine, self.decay, self.start = engine, decay, start
        self.partitioned = engine.zero_optimization_stage() == 3
        self.averages = {name: self._own(p).detach().float().clone() for name, p in self._averaged_here()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]

    def _averaged_here(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this rank averages."""
        ranks = 1 if self.partitioned else dist.world_size()
        return [pair for i, pair in enumerate(self._parameters()) if i % ranks == (dist.rank() if ranks > 1 else 0)]

    def _own(self, parameter: Any) -> torch.Tensor:
        return parameter.ds_tensor if self.partitioned else parameter.data  # type: ignore[no-any-return]

    @torch.no_grad()
    def update(self, step: int, skipped: bool) -> None:
        """Call after optimizer step `step` (0-based); a skipped step is not counted."""
        if skipped:
            return
        for name, parameter in self._averaged_here():
            weights = self._own(parameter).float()
            if step < self.start:
                self.averages[name].copy_(weights)
            else:
                self.averages[name].lerp_(weights, 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the average as the engine's weights, for evaluation and export. A collective; do not train inside."""
        kept = {name: self._own(p).detach().cpu().clone() for name, p in self._parameters()}
        self._write()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters():
                    self._own(parameter).copy_(kept[name])
            refresh_persistent(self.engine)

    @torch.no_grad()
    def _write(self) -> None:
        for i, (name, parameter) in enumerate(self._parameters()):
            own = self._own(parameter)
            if name in self.averages:
                own.copy_(self.averages[name])
            if not self.partitioned:
                dist.broadcast(own, source=i % dist.world_size())
        refresh_persistent(self.engine)

    def pieces(self) -> list[Piece]:
        """This rank's share, for the checkpoint: any number of ranks and any ZeRO stage can read it."""
        own = self._averaged_here()
        return [Piece(n, *self._place(p), self.averages[n].view(-1)[: self._unpadded_numel(p)]) for n, p in own]

    def restore(self, pieces: PieceReader) -> None:
        """Read the averages of a checkpoint. Raises UserError if they are of another model."""
        for name, parameter in self._averaged_here():
            start, _ = self._place(parameter)
            pieces.read(name, start, self.averages[name].view(-1)[: self._unpadded_numel(parameter)])

    def _place(self, parameter: Any) -> tuple[int, int]:
        """(first element that this rank averages, elements of the entire parameter)."""
        if not self.partitioned:
            return 0, parameter.numel()
        rank: int = self.engine.optimizer._get_param_partition_rank(parameter)
        return min(rank * parameter.ds_tensor.numel(), parameter.ds_numel), parameter.ds_numel

    def _unpadded_numel(self, parameter: Any) -> int:
        """Elements of this rank's share without padding."""
        start, total = self._place(parameter)
        return min(int(self._own(parameter).numel()), total - start)
