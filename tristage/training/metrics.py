"""Numbers of a run: weighted averages over ranks, to metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from tristage import dist
from tristage.config import RunSettings
from tristage.dist import progress, watchdog
from tristage.runs.record import lines_of, read_metrics
from tristage.runs.screen import Screen, TimeLeft, clock_of, short
from tristage.storage.durable import append_json, explain_disk_errors, replace_text
from tristage.training.alarms import Alarms
from tristage.training.board import Board
from tristage.training.trackers import Trackers

__all__ = ["Averages", "RunLog", "Stopwatch", "is_due", "read_metrics"]

LINE_SECONDS = 60.0  # without a line, after which a log gets one


class Averages:
    """Sums with their weights (tokens, rows), divided once, after the sums of all ranks are added up."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, name: str, total: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """Add `total`, a sum over `weight` tokens or rows, to the average called `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.sums[f"{name}/weight"] = self.sums.get(f"{name}/weight", 0.0) + float(weight)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """The averages over all ranks. A collective: every rank must have added the same names."""
        sums = dist.sum_over_ranks(self.sums, device)
        return {
            name: total / max(sums[f"{name}/weight"], 1.0)
            for name, total in sums.items()
            if not name.endswith("/weight")
        }


class RunLog:
    """Writes on rank 0, does nothing elsewhere: `with RunLog(...) as log: log.write(step, "train", {...})`.

    Args:
        first_step: the step that a resumed run continues from; later lines of an earlier attempt are dropped.
        alarms: the health monitor, which sees every line.
        trackers: they get every line.

    Raises:
        UserError: on rank 0, when metrics.jsonl or samples.jsonl cannot be written or was removed. TensorBoard, which
            shows the same numbers, is given up with a warning instead.
    """

    def __init__(
        self,
        output: Path,
        title: str,
        total_steps: int,
        first_step: int,
        alarms: Alarms | None = None,
        trackers: Trackers | None = None,
    ):
        self.output, self.title, self.total, self.first, self.alarms = output, title, total_steps, first_step, alarms
        self.trackers = trackers or Trackers((), output, {})
        self.left, self.said = TimeLeft(), time.monotonic()
        self.screen: Screen | None = None
        self.heldout: tuple[int, dict[str, float]] = (-1, {})

    @classmethod
    def of(cls, settings: RunSettings, title: str, total_steps: int, first_step: int) -> RunLog:
        """The log of a run, with its health monitor and the trackers that it names."""
        output = Path(settings.output)
        trackers = Trackers(settings.trackers, output, settings.model_dump(mode="json"))
        return cls(output, title, total_steps, first_step, Alarms(settings), trackers)

    def __enter__(self) -> RunLog:
        watchdog.may_save()
        progress.current.title, progress.current.total = self.title, self.total
        if dist.is_main():
            self.path = self.output / "metrics.jsonl"
            with explain_disk_errors(self.path):
                for name in ("metrics", "samples", "heldout", "health"):
                    _drop_lines_after(self.output / f"{name}.jsonl", self.first)
                if self.alarms is not None and self.path.is_file():
                    self.alarms.replay(read_metrics(self.path), lines_of(self.output / "health.jsonl"))
                self.file = open(self.path, "a", encoding="utf-8")
            self.board = Board(self.output / "tensorboard", self.first + 1 if self.first else 0)
            self.trackers.__enter__()
            if sys.stdout.isatty():
                self.screen = Screen(Console(), self.title, self.total).__enter__()
                self.screen.step, self.screen.phase = self.first, lambda: progress.current.phase
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if dist.is_main():
            if self.screen:
                self.screen.__exit__()
            with contextlib.suppress(OSError):  # of a line that could not be written, which was reported
                self.file.close()
            self.board.close()
            self.trackers.__exit__()

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same numbers to TensorBoard and to the terminal."""
        if split == "train":
            progress.finished(step)
        if not dist.is_main():
            return
        if self.alarms is not None:
            self.alarms.look(step, split, metrics)
            metrics = metrics | ({"health/alarms": len(self.alarms.holding)} if split == "train" else {})
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no nan
        line: dict[str, Any] = {"step": step, "split": split, **finite}
        with explain_disk_errors(self.path):
            self.path.stat()  # a removed file can be written for as long as it is open
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.board.write(step, split, metrics)
        self.trackers.write(step, split, metrics)
        if split != "train":
            earlier = self.heldout[1] if self.heldout[0] == step else {}
            self.heldout = (step, earlier | metrics)
        self._show(step, split, metrics)

    def is_last(self, step: int) -> bool:
        """Whether `step` ends the run."""
        return step == self.total

    def heldout_of(self, step: int) -> dict[str, float] | None:
        """The held-out metrics of a step, on rank 0, where they were written."""
        return self.heldout[1] if self.heldout[0] == step else None

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append to samples.jsonl, and show them in TensorBoard."""
        if dist.is_main() and samples:
            append_json(self.output / "samples.jsonl", [{"step": step, **_finite(sample)} for sample in samples])
            self.board.write_samples(step, samples)

    def write_rows(self, step: int, columns: dict[str, list[float]]) -> None:
        """A line of heldout.jsonl: a number per held-out row in each column, to six digits, null if not finite."""
        if dist.is_main():
            rounded = {name: [_six_digits(value) for value in column] for name, column in columns.items()}
            append_json(self.output / "heldout.jsonl", [{"step": step, **rounded}])

    def rows_before_training(self) -> dict[str, Any] | None:
        """The line of heldout.jsonl of step 0, on rank 0; None where the run did not start in this folder."""
        path = self.output / "heldout.jsonl"
        if not path.is_file():
            return None
        with open(path, encoding="utf-8") as file:
            first: dict[str, Any] = json.loads(file.readline() or '{"step": null}')
        return first if first["step"] == 0 else None

    def _show(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """On a terminal the display; elsewhere a line every twentieth of the run, and at least every minute."""
        if self.screen:
            self.screen.update(step, split, metrics)
        elif split != "train":
            print(f"{self.title} {step}/{self.total} held out: {short(metrics)}", flush=True)
        else:
            self.left.finished(step)
            now = time.monotonic()
            if step == self.total or is_due(max(1, self.total // 20), step) or now - self.said > LINE_SECONDS:
                left = clock_of(self.left.until(self.total))
                print(f"{self.title} {step}/{self.total} {short(metrics)} left {left}", flush=True)
                self.said = now


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every N steps happens after `step`; 0 is never."""
    return every > 0 and step % every == 0


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, at any depth: JSON has none of them."""
    if isinstance(value, dict):
        return {name: _finite(inside) for name, inside in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _six_digits(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep what was written up to `step`, so that a resumed run continues without duplicate lines.

    A line without its end is one that a killed run was writing. Lines are cut at line feeds alone: the text of
    samples may hold other separators, which `splitlines` would cut at.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step and step > 0]
        replace_text(path, "".join(kept))  # at once: a kill in the middle loses no line


class Stopwatch:
    """Seconds spent in named phases: `with watch("rollout"): ...`; `watch.take()` returns and clears them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str) -> _Phase:
        return _Phase(self, phase)

    def take(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}


class _Phase:
    def __init__(self, watch: Stopwatch, phase: str):
        self.watch, self.phase = watch, phase

    def __enter__(self) -> None:
        self.before = progress.current.enter(self.phase)
        self.mark = torch.profiler.record_function(self.phase)
        self.mark.__enter__()
        self.start = self._now()

    def __exit__(self, *exception: object) -> None:
        seconds = self.watch.seconds
        seconds[self.phase] = seconds.get(self.phase, 0.0) + self._now() - self.start
        self.mark.__exit__(None, None, None)
        progress.current.enter(self.before)

    def _now(self) -> float:
        if self.watch.device.type == "cuda":
            torch.cuda.synchronize(self.watch.device)
        return time.perf_counter()
