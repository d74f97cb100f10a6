"""What a run has written, for people and for reports: OUT/metrics.jsonl and the files next to it.

Reading is lenient: a run may be going on, killed in the middle of a line, empty, or of an older version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tristage.runs.finished import has_finished

STEPS = {
    "step1_sft": "Step 1: supervised fine-tuning",
    "step2_reward_model": "Step 2: reward model",
    "step2_dpo": "Step 2: DPO",
    "step3_ppo": "Step 3: PPO",
}
# A group of metrics, or a key of config.yaml, that only this step has.
SIGNS = {
    "step1_sft": ("sft/", "packing"),
    "step2_reward_model": ("reward_model/", "normalize"),
    "step2_dpo": ("dpo/", "beta"),
    "step3_ppo": ("objective/", "actor"),
}


@dataclass
class Series:
    """One metric of one split: its values and their steps, without those that were not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.values[-1]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: {"step": int, "split": "train" | "heldout", name: number, ...}."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file that can be read; of no file, none."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                try:
                    value = json.loads(line, parse_constant=lambda name: None)  # JSON has no NaN and no Infinity
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value
    except OSError:
        return


class Run:
    """A run's folder, read when first asked."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or folder.resolve().name

    @cached_property
    def series(self) -> dict[str, dict[str, Series]]:
        """Split -> metric -> series, from metrics.jsonl."""
        found: dict[str, dict[str, Series]] = {"train": {}, "heldout": {}}
        for line in lines_of(self.folder / "metrics.jsonl"):
            step, split = line.pop("step", None), found.get(line.pop("split", ""))
            if split is None or not isinstance(step, int):
                continue
            for name, value in line.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    one = split.setdefault(name, Series())
                    one.steps.append(step)
                    one.values.append(value)
        return found

    def train(self, name: str) -> Series | None:
        """A metric of the training lines; None if there is no such number."""
        return self.series["train"].get(name)

    def heldout(self, name: str) -> Series | None:
        """A metric of the held-out lines; None if there is no such number."""
        return self.series["heldout"].get(name)

    @cached_property
    def last_step(self) -> int:
        """The last step that is in metrics.jsonl; 0 if none is."""
        return max((one.steps[-1] for split in self.series.values() for one in split.values()), default=0)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml; {} if it cannot be read."""
        try:
            values = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json; {} if it cannot be read."""
        return next(iter(_json_object(self.folder / "environment.json")), {})

    @cached_property
    def step(self) -> str | None:
        """The step that it is a run of, such as "step3_ppo"; None if nothing says."""
        names = {name for split in self.series.values() for name in split}
        for step, (group, key) in SIGNS.items():
            if any(name.startswith(group) for name in names) or key in self.settings:
                return step
        return None

    @cached_property
    def finished(self) -> bool:
        return has_finished(self.folder)

    @cached_property
    def rows(self) -> dict[int, dict[str, list[float | None]]]:
        """Step -> column -> a number per held-out prompt, from heldout.jsonl."""
        return {line.pop("step"): line for line in lines_of(self.folder / "heldout.jsonl") if "step" in line}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Lines of samples.jsonl."""
        return [line for line in lines_of(self.folder / "samples.jsonl") if "response" in line]

    @cached_property
    def health(self) -> list[dict[str, Any]]:
        """Lines of health.jsonl: alarms, and steps that were skipped for numbers that were not finite."""
        return [line for line in lines_of(self.folder / "health.jsonl") if "step" in line]

    @cached_property
    def profile(self) -> list[dict[str, Any]]:
        """The rows of profile/table.json."""
        try:
            rows = json.loads((self.folder / "profile/table.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return rows if isinstance(rows, list) else []

    @cached_property
    def checkpoints(self) -> set[int]:
        """The steps whose checkpoints are on the disk."""
        names = (path.name.partition("_")[2] for path in (self.folder / "checkpoints").glob("step_*"))
        return {int(name) for name in names if name.isdigit()}


def _json_object(path: Path) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(value, dict):
        yield value


def names_apart(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: of a/seed0/ppo and a/seed1/ppo, seed0 and seed1."""
    parts = [list(folder.resolve().parts) for folder in folders]
    while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    while all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    names = ["/".join(each) for each in parts]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def is_run(folder: Path) -> bool:
    """Whether a step has written to the folder."""
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def runs_in(folder: Path) -> list[Run]:
    """The run that the folder is, or those that it holds, in the order of their names."""
    if is_run(folder):
        return [Run(folder)]
    return [Run(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
