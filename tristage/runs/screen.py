"""What a terminal shows of a run while it goes on: progress, the numbers that matter, where the time goes.

The launcher follows the run's files; rank 0 draws itself where it has the terminal (`deepspeed --module ...`).
Elsewhere the same numbers come as plain lines.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What a line shows of a step's metrics, in this order: name -> short name.
SHOWN = {
    "sft/loss": "loss",
    "sft/perplexity": "perplexity",
    "reward_model/loss": "loss",
    "reward_model/accuracy": "accuracy",
    "reward_model/length_baseline": "longer-wins",
    "dpo/loss": "loss",
    "dpo/accuracy": "accuracy",
    "dpo/margin": "margin",
    "dpo/length_baseline": "longer-wins",
    "objective/score": "score",
    "objective/kl": "kl",
    "objective/grade": "grade",
    "objective/win_rate": "win-rate",
    "rollout/length": "length",
    "throughput/tokens_per_second": "tokens/s",
    "memory/peak_gib": "GiB",
}
PHASES = ("rollout", "score", "update")
RECENT = 20  # steps whose time tells what is left
BLOCKS = 12  # of a phase's bar that is the whole time
REFRESH_SECONDS = 0.5


def short(metrics: Mapping[str, Any]) -> str:
    """ "loss 1.235 tokens/s 2,512" of the metrics that are shown; all of them if none is."""
    known = [name for name in SHOWN if isinstance(metrics.get(name), int | float)]
    names = known or [name for name in metrics if isinstance(metrics[name], int | float)]
    return " ".join(f"{SHOWN.get(name, name)} {_number(metrics[name])}" for name in names)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock_of(seconds: float | None) -> str:
    """1:02:03; of an unknown time "?"."""
    if seconds is None:
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class TimeLeft:
    """How long a run still takes by its newest steps: the first ones compile and warm up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.done: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)

    def finished(self, step: int) -> None:
        self.done.append((step, self.clock()))

    def until(self, total: int) -> float | None:
        """Seconds; None before two steps are known."""
        if len(self.done) < 2:
            return None
        (first, then), (last, now) = self.done[0], self.done[-1]
        return (now - then) / max(1, last - first) * (total - last)


class Screen:
    """The display of one run, drawn again as numbers come.

    Args:
        title, total: a short name of the step, and its number of steps; empty and 0 until they are known.
    """

    def __init__(self, console: Console, title: str = "", total: int = 0, clock: Callable[[], float] = time.monotonic):
        self.console, self.title, self.total, self.step = console, title, total, 0
        self.phase: Callable[[], str] = lambda: "starting"
        self.left = TimeLeft(clock)
        self.latest: dict[str, Any] = {}
        self.heldout: tuple[int, dict[str, Any]] | None = None
        self.live = Live(console=console, get_renderable=self.picture, refresh_per_second=1 / REFRESH_SECONDS)

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()  # shows the cursor again

    def update(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Take in a line of metrics."""
        if split == "train":
            self.step, self.latest = step, self.latest | dict(metrics)
            self.left.finished(step)
        else:
            before = self.heldout[1] if self.heldout is not None and self.heldout[0] == step else {}
            self.heldout = step, before | dict(metrics)

    def say(self, line: str) -> None:
        """Print a line above the display."""
        self.console.print(Text.from_ansi(line), soft_wrap=True)

    def picture(self) -> Group:
        """All lines, each cut to the width of the terminal."""
        lines: list[Any] = [self._progress()]
        if self.latest:
            lines.append(_line(short(self.latest)))
        if self.heldout is not None:
            lines.append(_line(f"held out at {self.heldout[0]}: {short(self.heldout[1])}", style="green"))
        if all(f"time/{phase}" in self.latest for phase in PHASES):
            lines.append(_line(self._phases(), style="dim"))
        return Group(*lines)

    def _progress(self) -> Table:
        words = ["done"]
        if not self.total or self.step < self.total:
            phase, _, waits = self.phase().partition(", ")  # in a collective: "NAME, waiting for the others"
            words = [f"{clock_of(self.left.until(self.total))} left", "waiting" if waits else phase]
        row = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            row.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=max(1, self.total), completed=self.step)
        row.add_row(Text(self.title, style="bold"), bar, f"{self.step}/{self.total or '?'}", " ".join(words))
        return row

    def _phases(self) -> str:
        seconds = [float(self.latest[f"time/{phase}"]) for phase in PHASES]
        shares = [value / (sum(seconds) or 1.0) for value in seconds]
        named = zip(PHASES, shares, strict=True)
        return "time: " + "  ".join(f"{phase} {share:4.0%} {'█' * round(BLOCKS * share)}" for phase, share in named)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


class Follower:
    """Feeds a screen from the files of a run that other processes write: its metrics and rank 0's heartbeat."""

    def __init__(self, output: Path, screen: Screen) -> None:
        self.output, self.screen, self.read, self.since = output, screen, 0, time.time()
        self.ends, self.looking = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self.screen.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ends.set()
        self.thread.join()
        self.look()
        self.screen.__exit__()

    def _follow(self) -> None:
        while not self.ends.wait(REFRESH_SECONDS):
            self.look()

    def look(self) -> None:
        """Take in what has been written since the last look. Nothing here can end a run."""
        with self.looking:
            for read, path in ((self._heartbeat, "logs/rank_00000.json"), (self._metrics, "metrics.jsonl")):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                    read(self.output / path)

    def sees(self) -> bool:
        """Whether the run writes to a folder that can be read here."""
        self.look()
        return bool(self.screen.title or self.screen.latest or self.screen.heldout)

    def _heartbeat(self, path: Path) -> None:
        if path.stat().st_mtime < self.since:
            return  # an earlier run's
        beat = json.loads(path.read_text(encoding="utf-8"))
        screen = self.screen
        screen.title, screen.total, screen.phase = beat["title"], beat["total"], lambda: str(beat["phase"])

    def _metrics(self, path: Path) -> None:
        size = path.stat().st_size
        if size < self.read:
            self.read = 0  # a run that resumes has dropped lines
        with open(path, encoding="utf-8") as file:
            file.seek(self.read)
            while (line := file.readline()).endswith("\n"):
                self.read += len(line.encode())
                metrics = json.loads(line)
                self.screen.update(metrics.pop("step"), metrics.pop("split"), metrics)
