"""Metrics to experiment trackers: Weights & Biases, MLflow, Trackio. Rank 0 alone; imports no torch.

Where runs go and who writes them comes from each library's own environment variables (WANDB_PROJECT, WANDB_API_KEY,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT, ...), never from config.yaml. A tracker works in a thread
of its own: one that fails or hangs is given up with a warning, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tristage.errors import UserError
from tristage.storage.durable import replace_text

PROJECT = "tristage"  # where the environment names none
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}  # tracker -> what it imports
WAITING = 10_000  # lines that a slow tracker may be behind
CLOSE_SECONDS = 30.0
IDS = "trackers.json"

Numbers = dict[str, float]


class Tracker(Protocol):
    """What a library must be able to do. Everything may raise."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Finite numbers of a step; those of the held-out split are named "heldout/<name>"."""

    def close(self) -> None:
        """Send what is left."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, name: str, id: str, config: dict[str, Any], output: Path) -> None:
        import wandb  # an extra

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = wandb.Settings(finish_timeout=CLOSE_SECONDS)
        self.run = wandb.init(
            project=project, name=name, id=id, resume="allow", config=config, dir=str(output), settings=settings
        )
        self.run.define_metric("*", step_metric="step")  # a resumed run writes steps again

    def write(self, step: int, numbers: Numbers) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow's tracking server or store."""

    def __init__(self, name: str, id: str, config: dict[str, Any], output: Path) -> None:
        from mlflow.entities import Metric  # an extra
        from mlflow.tracking import MlflowClient

        self.client, self.metric = MlflowClient(), Metric
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(experiment)
        place = self.client.create_experiment(experiment) if known is None else known.experiment_id
        found = self.client.search_runs([place], f"tags.tristage_id = '{id}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            self.client.set_terminated(self.run, "RUNNING")
            return
        self.run = self.client.create_run(place, run_name=name, tags={"tristage_id": id}).info.run_id
        self.client.set_tag(self.run, "config", json.dumps(config)[:5000])

    def write(self, step: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(_mlflow_name(name), value, now, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), 1000):  # as many as one request may have
            self.client.log_batch(self.run, metrics=metrics[start : start + 1000])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _mlflow_name(name: str) -> str:
    """MLflow refuses other characters than these."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


class Trackio:
    """A run in Trackio's database."""

    def __init__(self, name: str, id: str, config: dict[str, Any], output: Path) -> None:
        import trackio  # an extra

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # it advertises its dashboard
            self.run = trackio.init(project=project, name=f"{name}-{id}", config=config, resume="allow")

    def write(self, step: int, numbers: Numbers) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


Opens = Callable[[str, str, dict[str, Any], Path], Tracker]  # (name, id, config, OUT)
KINDS: dict[str, Opens] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def check_trackers(names: Sequence[str], file: str) -> None:
    """Raises UserError: the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"{file}: key `trackers`: {name} is not installed: pip install 'tristage[{name}]'")


class Trackers:
    """All trackers of a run: `with Trackers(["wandb"], OUT, config) as trackers: trackers.write(...)`.

    A run that starts again in the same folder goes on in the same runs of the trackers (OUT/trackers.json).
    """

    def __init__(self, names: Sequence[str], output: Path, config: dict[str, Any]) -> None:
        self.output, self.config = output, config
        self.workers = [_Worker(name, self) for name in names]

    def __enter__(self) -> Trackers:
        if self.workers:
            name, id = _name_and_id(self.output)
            for worker in self.workers:
                worker.start(name, id)
        return self

    def __exit__(self, *exception: object) -> None:
        ends = time.monotonic() + CLOSE_SECONDS
        for worker in self.workers:
            worker.close(max(0.1, ends - time.monotonic()))

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Hand a line to every tracker; returns at once."""
        prefix = "" if split == "train" else f"{split}/"
        numbers = {prefix + name: value for name, value in metrics.items() if math.isfinite(value)}
        for worker in self.workers:
            worker.put((step, numbers))


class _Worker:
    """One tracker and the thread that it works in."""

    def __init__(self, kind: str, trackers: Trackers) -> None:
        self.kind, self.trackers = kind, trackers
        self.lines: queue.Queue[tuple[int, Numbers] | None] = queue.Queue(WAITING)
        self.given_up = False

    def start(self, name: str, id: str) -> None:
        self.thread = threading.Thread(target=self._work, args=(name, id), daemon=True)
        self.thread.start()

    def put(self, line: tuple[int, Numbers] | None) -> None:
        if not self.given_up:
            try:
                self.lines.put_nowait(line)
            except queue.Full:
                self.give_up(f"is {WAITING} lines behind")

    def close(self, seconds: float) -> None:
        self.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive() and not self.given_up:
            self.give_up(f"did not end within {CLOSE_SECONDS:g} s")

    def give_up(self, why: str) -> None:
        self.given_up = True
        print(f"warning: tracker {self.kind} {why}; nothing more goes to it, metrics.jsonl has all", flush=True)

    def _work(self, name: str, id: str) -> None:
        try:
            tracker = KINDS[self.kind](name, id, self.trackers.config, self.trackers.output)
            while (line := self.lines.get()) is not None:
                tracker.write(*line)
            tracker.close()
        except BaseException as error:  # whatever a library raises, SystemExit included
            if not self.given_up:
                self.give_up(f"failed ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})")


def _name_and_id(output: Path) -> tuple[str, str]:
    """The name of the run, of its folder and the one above, and the id that it has in every tracker."""
    file, folder = output / IDS, Path(os.path.abspath(output))
    try:
        id = str(json.loads(file.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        id = uuid.uuid4().hex[:8]
        with contextlib.suppress(OSError):  # a full disk, which the metrics will meet and explain
            replace_text(file, json.dumps({"id": id}))
    return f"{folder.parent.name}/{folder.name}", id
