"""A torch profile of a few steps of rank 0: OUT/profile/trace_rank0.json, and a table of what took the time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tristage import dist
from tristage.config import RunSettings
from tristage.storage.durable import explain_disk_errors

ROWS = 40  # of the table


def profiled(steps: Iterable[int], settings: RunSettings) -> Iterator[int]:
    """The same steps; those of the setting `profile` run under torch's profiler on rank 0, with all that the loop does
    in them.
    """
    first, last = settings.profile_steps or (None, None)
    profiler: Any = None
    for step in steps:
        if step == first and dist.is_main():
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            profiler = profile(activities=activities)
            profiler.start()
        yield step
        if profiler is not None and step == last:
            _write(profiler, Path(settings.output) / "profile")
            profiler = None
    if profiler is not None:  # the run ended first
        _write(profiler, Path(settings.output) / "profile")


def _write(profiler: Any, folder: Path) -> None:
    profiler.stop()
    with explain_disk_errors(folder):
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace_rank0.json"))
        (folder / "table.json").write_text(json.dumps(_table(profiler), indent=1), encoding="utf-8")
    dist.print0(f"profile: {folder / 'trace_rank0.json'}, and the operations that took longest in table.json")


def _table(profiler: Any) -> list[dict[str, Any]]:
    """The operations that took longest, by the time of the device (of the CPU, where there is no other) without what
    they call.
    """
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "self_seconds": event.self_cpu_time_total / 1e6,
            "device_seconds": event.self_device_time_total / 1e6,
        }
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: (-row["device_seconds"], -row["self_seconds"]))[:ROWS]
