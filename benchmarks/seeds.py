"""The quickstart on several seeds: held-out numbers of each before and after, their means, and intervals over seeds.

    for seed in 0 1 2 3 4 5 6 7 8 9; do bash launch/quickstart.sh output/seeds/$seed $seed; done
    python -m benchmarks.seeds output/seeds --out benchmarks/results/quickstart_seeds.json

Intervals are 95 % of the mean over seeds (bootstrap); the deviation is that of seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tristage.intervals import bootstrap_interval
from tristage.runs.record import Run

# (step, held-out metric, name)
MEASURES = (
    ("step2_reward_model", "reward_model/accuracy", "reward accuracy"),
    ("step2_reward_model", "reward_model/length_baseline", "longer wins"),
    ("step3_ppo", "objective/grade", "gold"),
    ("step3_ppo", "objective/score", "score"),
    ("step3_ppo", "objective/kl", "KL"),
    ("step3_ppo", "rollout/length", "length"),
)


def seed_of(folder: Path) -> dict[str, Any]:
    """The numbers of one quickstart: [before, after] of each measure, all evaluations of the grade."""
    found: dict[str, Any] = {"seed": int(Run(folder / "step3_ppo").settings["seed"])}
    for step, metric, name in MEASURES:
        series = Run(folder / step).heldout(metric)
        assert series is not None, f"{folder / step} has no {metric}"
        found[name] = [series.values[0], series.last]
        if name == "gold":
            found["gold at each evaluation"] = series.values
    return found


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per measure: mean after training, mean change with its interval, deviation of the change over seeds."""
    found = {}
    for _, _, name in MEASURES:
        before, after = np.array([seed[name] for seed in seeds]).T
        change = after - before
        if not change.any():  # of the data, not of training
            continue
        found[name] = {
            "after": float(after.mean()),
            "change": float(change.mean()),
            "interval": bootstrap_interval(change),
            "deviation": float(change.std(ddof=1)),
        }
    return found


def table(seeds: Sequence[dict[str, Any]]) -> str:
    """As docs/getting-started.md has it."""
    rows = ["| seed | reward accuracy | longer wins | gold before | gold after | its peak | KL |", "|---" * 7 + "|"]
    for seed in seeds:
        peak = max(seed["gold at each evaluation"])
        numbers = [seed["reward accuracy"][1], seed["longer wins"][1], *seed["gold"], peak]
        cells = [f"{number:.3f}" for number in numbers]
        rows.append(f"| {seed['seed']} | {' | '.join(cells)} | {seed['KL'][1]:.1f} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.seeds")
    parser.add_argument("runs", type=Path, help="a folder with the folder of each quickstart")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args(argv)
    folders = [path for path in given.runs.iterdir() if (path / "step3_ppo/finished.json").is_file()]
    seeds = sorted((seed_of(folder) for folder in folders), key=lambda seed: seed["seed"])
    environment = Run(folders[0] / "step3_ppo").environment
    kept = {name: environment.get(name) for name in ("device", "ranks", "python", "versions")}
    found = {"environment": kept, "summary": summary(seeds), "seeds": seeds}
    print(table(seeds))
    print(json.dumps(found["summary"], indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
