"""Numbers of a run: weighted averages over ranks, to metrics.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tristage import dist
from tristage.dist import progress, watchdog
from tristage.runs.record import read_metrics
from tristage.storage.durable import append_json, explain_disk_errors, replace_text
from tristage.training.alarms import Alarms

__all__ = ["Averages", "RunLog", "Stopwatch", "is_due", "read_metrics"]

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
        shown: metrics of the progress line, full name -> short name.
        alarms: the health monitor, which sees every line.

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
        shown: dict[str, str],
        alarms: Alarms | None = None,
    ):
        self.output, self.title, self.total, self.first, self.shown = output, title, total_steps, first_step, shown
        self.alarms = alarms
        self.started = time.monotonic()
        self.latest: dict[str, float] = {}
        self.heldout: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> RunLog:
        watchdog.may_save()
        if dist.is_main():
            self.path = self.output / "metrics.jsonl"
            with explain_disk_errors(self.path):
                for name in ("metrics", "samples", "heldout", "health"):
                    _drop_lines_after(self.output / f"{name}.jsonl", self.first)
                if self.alarms is not None and self.path.is_file():
                    self.alarms.replay(read_metrics(self.path))
                self.file = open(self.path, "a", encoding="utf-8")
            self.board = Board(self.output / "tensorboard", self.first + 1 if self.first else 0)
            self.bar = _bar(self.title, self.total, self.first) if sys.stdout.isatty() else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if dist.is_main():
            if self.bar:
                self.bar.stop()
            with contextlib.suppress(OSError):  # of a line that could not be written, which was reported
                self.file.close()
            self.board.close()

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same numbers to TensorBoard; training lines move the bar."""
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
        self.board.write(step, {f"{split}/{name}": value for name, value in metrics.items()})
        if split == "train":
            self.latest.update(metrics)
            self._show_progress(step)
        else:
            earlier = self.heldout[1] if self.heldout[0] == step else {}
            self.heldout = (step, earlier | metrics)
            self._say(f"{self.title} {step}/{self.total} held out: {self._short(metrics)}")

    def is_last(self, step: int) -> bool:
        """Whether `step` ends the run."""
        return step == self.total

    def heldout_of(self, step: int) -> dict[str, float] | None:
        """The held-out metrics of a step, on rank 0, where they were written."""
        return self.heldout[1] if self.heldout[0] == step else None

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append to samples.jsonl."""
        if dist.is_main():
            append_json(self.output / "samples.jsonl", [{"step": step, **sample} for sample in samples])

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

    def _show_progress(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, numbers=self._short(self.latest))
        elif step == self.total or step % max(1, self.total // 20) == 0:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (self.total - step)
            self._say(f"{self.title} {step}/{self.total} {self._short(self.latest)} left {_clock(left)}")

    def _short(self, metrics: dict[str, float]) -> str:
        known = [name for name in self.shown if name in metrics]
        return " ".join(f"{self.shown.get(name, name)} {metrics[name]:.4g}" for name in known or metrics)

    def _say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line)
        else:
            print(line, flush=True)


class Board:
    """TensorBoard's event file. One that cannot be written is given up with a warning: metrics.jsonl has its numbers.

    A thread of TensorBoard's writes. Its error would be printed with a traceback by threading.excepthook, and is raised
    again by later calls.
    """

    def __init__(self, folder: Path, purge_step: int):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        self.hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        from torch.utils.tensorboard import SummaryWriter  # rank 0 alone needs it

        with self._giving_up():
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One point of each metric."""
        with self._giving_up():
            if self.writer is not None:
                for name, value in metrics.items():
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._giving_up():
            if self.writer:
                self.writer.close()
        threading.excepthook = self.hook

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self.hook(arguments)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever TensorBoard's thread met
            self.writer = None
            print(f"warning: {self.folder}: {error}; no more is written for TensorBoard in this run", flush=True)


def _bar(title: str, total: int, first: int) -> Progress:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    bar = Progress(*columns, TimeRemainingColumn())
    bar.add_task(title, total=total, completed=first, numbers="")
    bar.start()
    return bar


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every N steps happens after `step`; 0 is never."""
    return every > 0 and step % every == 0


def _six_digits(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
