"""Numbers of a run: weighted averages over ranks, to metrics.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from tristage import dist, watchdog
from tristage.durable import replace_text


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
        first_step: where a resumed run goes on; later lines of an earlier attempt are dropped.
        shown: metrics of the progress line, full name -> short name.
    """

    def __init__(self, output: Path, title: str, total_steps: int, first_step: int, shown: dict[str, str]):
        self.output, self.title, self.total, self.first, self.shown = output, title, total_steps, first_step, shown
        self.started = time.monotonic()
        self.latest: dict[str, float] = {}
        self.heldout: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> RunLog:
        watchdog.may_save()
        if dist.is_main():
            _drop_lines_after(self.output / "metrics.jsonl", self.first)
            _drop_lines_after(self.output / "samples.jsonl", self.first)
            _drop_lines_after(self.output / "health.jsonl", self.first)
            self.file = open(self.output / "metrics.jsonl", "a", encoding="utf-8")
            purge_step = self.first + 1 if self.first else 0
            self.board = SummaryWriter(str(self.output / "tensorboard"), purge_step=purge_step)
            self.bar = _bar(self.title, self.total, self.first) if sys.stdout.isatty() else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if dist.is_main():
            if self.bar:
                self.bar.stop()
            self.file.close()
            self.board.close()

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same numbers to TensorBoard; training lines move the bar."""
        if split == "train":
            watchdog.finished(step)
        if not dist.is_main():
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no nan
        line: dict[str, Any] = {"step": step, "split": split, **finite}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(f"{split}/{name}", value, step)
        if split == "train":
            self.latest.update(metrics)
            self._show_progress(step)
        else:
            self.heldout = (step, metrics)
            self._say(f"{self.title} {step}/{self.total} held out: {self._short(metrics)}")

    def heldout_of(self, step: int) -> dict[str, float] | None:
        """The held-out metrics of a step, on rank 0, where they were written."""
        return self.heldout[1] if self.heldout[0] == step else None

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append to samples.jsonl."""
        if dist.is_main():
            with open(self.output / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)

    def _show_progress(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, numbers=self._short(self.latest))
        elif step == self.total or step % max(1, self.total // 20) == 0:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (self.total - step)
            self._say(f"{self.title} {step}/{self.total} {self._short(self.latest)} left {_clock(left)}")

    def _short(self, metrics: dict[str, float]) -> str:
        return " ".join(f"{short} {metrics[name]:.4g}" for name, short in self.shown.items() if name in metrics)

    def _say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line)
        else:
            print(line, flush=True)


def _bar(title: str, total: int, first: int) -> Progress:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    bar = Progress(*columns, TimeRemainingColumn())
    bar.add_task(title, total=total, completed=first, numbers="")
    bar.start()
    return bar


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep what was written up to `step`, so that a resumed run continues without duplicate lines.

    A line without its end is one that a killed run was writing. Lines are cut at line feeds alone: the text of
    samples may hold other separators, which `splitlines` would cut at.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step and step > 0]
        replace_text(path, "".join(kept))  # at once: a kill in the middle loses no line


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: {"step": int, "split": "train" | "heldout", name: number, ...}."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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
        self.before = watchdog.progress.enter(self.phase)
        self.start = self._now()

    def __exit__(self, *exception: object) -> None:
        seconds = self.watch.seconds
        seconds[self.phase] = seconds.get(self.phase, 0.0) + self._now() - self.start
        watchdog.progress.enter(self.before)

    def _now(self) -> float:
        if self.watch.device.type == "cuda":
            torch.cuda.synchronize(self.watch.device)
        return time.perf_counter()
