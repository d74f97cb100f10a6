"""Runs that an exception ends in the middle, in the test's own processes (`faults.py`: ranks that are killed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from tristage.training.metrics import RunLog, read_metrics


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    """Killed is raised on every rank where the line of training step `step` would be written."""
    write = RunLog.write

    def dying(log: RunLog, now: int, split: str, metrics: dict[str, float]) -> None:
        if (now, split) == (step, "train"):
            raise Killed
        write(log, now, split, metrics)

    return mock.patch.object(RunLog, "write", dying)


def untimed(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what is timed."""
    timed = ("time/", "throughput/", "memory/", "health/")
    return [{name: x for name, x in line.items() if not name.startswith(timed)} for line in read_metrics(path)]
