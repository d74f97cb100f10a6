"""What an experiment publishes: its numbers, and where, when and from what they were measured."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from results.jobs import REPO, cost
from tristage.runs.record import lines_of

DATA = REPO / "results/data"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy")
# Student's t of 1 to 10 degrees of freedom, by the share of the distribution between -t and t.
STUDENT_T = {
    0.95: (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    0.99: (63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169),
}


def parser(experiment: str, seeds: int) -> argparse.ArgumentParser:
    """The words that every experiment takes; `seeds`: as many as are published."""
    found = argparse.ArgumentParser(f"python -m results.{experiment}")
    found.add_argument("out", type=Path, help="folder of the runs; those that are there are not run again")
    found.add_argument("--seeds", type=int, default=seeds)
    found.add_argument("--at-once", type=int, default=1, help="runs at a time, one core each")
    found.add_argument("--publish", type=Path, help="another folder than results/data for the JSON")
    return found


def about(
    command: str, out: Path, seeds: Sequence[int], packages: Sequence[str] = (), jobs: str = "**/job.json"
) -> dict[str, Any]:
    """Commit, versions, machine, command, seeds, and the seconds of the `jobs` below `out`."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "seeds": list(seeds),
        **{name: round(value) for name, value in cost(out.glob(jobs)).items()},
    }


def versions_in(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages of another environment. Raises SystemExit: it lacks one, or there is none."""
    program = f"from importlib.metadata import version; print(*map(version, {tuple(packages)!r}))"
    try:
        found = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {python} has not all of {', '.join(packages)}; docs/speed.md says how") from error
    return dict(zip(packages, found, strict=True))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(name: str, found: dict[str, Any], out: Path | None = None) -> Path:
    """Write an experiment's numbers, rounded to what its figures can show."""
    path = (out or DATA) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    print(path)
    return path


def read(name: str, folder: Path = DATA) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def rounded(value: Any) -> Any:
    """Floats to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def column(file: Path, name: str) -> list[float]:
    """A number of each sample of a file that results.evaluate wrote."""
    return [float(sample[name]) for sample in lines_of(file)]


def student_t(freedom: int, share: float) -> float:
    """t with `share` of the distribution between -t and t; above 10 degrees of freedom a little too large."""
    return STUDENT_T[share][min(freedom, 10) - 1]


def seed_interval(values: Sequence[float], prompts: Sequence[float] = ()) -> tuple[float, float, float]:
    """(mean, low, high) over seeds: Student's t with one degree of freedom less than seeds.

    A bootstrap of three or five seeds is too narrow: it cannot draw a deviation that it has not seen.

    Args:
        values: [S] the mean of each seed.
        prompts: [P] where seeds share their prompts, the mean of each prompt over seeds. Their standard error is added
            (variances sum), so that the interval is of other prompts as well; a little too wide, since it also holds
            the noise of responses that `values` hold.
    """
    numbers = np.asarray(values, dtype=np.float64)
    variance = float(numbers.var(ddof=1)) / len(numbers)
    if len(prompts):
        variance += float(np.var(prompts, ddof=1)) / len(prompts)
    half = student_t(len(numbers) - 1, 0.95) * math.sqrt(variance)
    mean = float(numbers.mean())
    return mean, mean - half, mean + half
