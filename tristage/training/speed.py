"""Tokens and rows per second, model FLOP/s and the share of the device's peak that they are, and peak memory."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Mapping, Sequence

import torch

from tristage import dist
from tristage.config import RunSettings
from tristage.machine.peaks import TERA, peak_flops
from tristage.models.flops import ModelFlops, Work, model_flops

GIB = 2**30


class Speed:
    """A run's models, for what their work takes.

    Of the FLOPs rank 0 alone makes metrics: "throughput/<phase>_tflops", per rank and second, and on a GPU that
    machine.peaks knows "throughput/<phase>_mfu", model FLOPs utilisation, in bf16 and fp16.
    """

    def __init__(self, settings: RunSettings, device: torch.device) -> None:
        self.device = device
        self.models: dict[str, ModelFlops] = {}
        if dist.is_main():
            found = {spec.name: model_flops(spec) for spec in settings.engine_specs()}
            self.models = {name: flops for name, flops in found.items() if flops is not None}
        self.peak = None
        if device.type == "cuda" and settings.precision != "float32":
            self.peak = peak_flops(torch.cuda.get_device_name(device))

    def step(self, work: Sequence[Work], seconds: Mapping[str, float], reference: bool = False) -> dict[str, float]:
        """Metrics of an optimizer step of steps 1 and 2 over the `work` of this rank's micro-batches; with `reference`
        the engine of that name did the same forwards. A collective.
        """
        own = [sum(numbers) for numbers in zip(*map(dataclasses.astuple, work), strict=True)]
        of_ranks, took = self.of_all_ranks(*own), seconds["time/step"]
        total = Work(*of_ranks[:, :-1].sum(dim=0).tolist())
        flops = self.training("model", total) + reference * self.forward("reference", total)
        return self.utilisation("", flops, took) | {
            "throughput/tokens_per_second": total.tokens / took,
            "throughput/samples_per_second": total.rows / took,
            "memory/peak_gib": float(of_ranks[:, -1].max()),
        }

    def of_all_ranks(self, *numbers: float) -> torch.Tensor:
        """[ranks, numbers + 1] float64: the numbers of each rank, and its peak memory in GiB. A collective."""
        row = torch.tensor([[*numbers, peak_gib(self.device)]], dtype=torch.float64, device=self.device)
        return dist.all_gather_rows(row)

    def forward(self, name: str, work: Work) -> float:
        """FLOPs of an engine's forward; 0 where they are not known."""
        return self.models[name].forward(work) if name in self.models else 0.0

    def training(self, name: str, work: Work) -> float:
        """FLOPs of its forward and backward."""
        return self.models[name].forward_and_backward(work) if name in self.models else 0.0

    def utilisation(self, phase: str, flops: float, seconds: float) -> dict[str, float]:
        """The metrics of one phase, in which all ranks did `flops` together."""
        if not flops or not seconds:
            return {}
        per_rank = flops / seconds / dist.world_size()
        metrics = {f"throughput/{phase}tflops": per_rank / TERA}
        return metrics | ({} if self.peak is None else {f"throughput/{phase}mfu": per_rank / self.peak})


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held so far: of the GPU, or resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
