"""Metrics of healthy runs, kept small: those that the health monitor's conditions read, to five digits.

    python -m tests.helpers.recordings RUNS        RUNS/*/step*/metrics.jsonl -> tests/data_samples/healthy_runs.json.gz
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

from tristage.runs.record import read_metrics

FILE = Path(__file__).parents[1] / "data_samples/healthy_runs.json.gz"
READ = re.compile(
    r"(sft|reward_model|dpo)/loss|(optimizer|policy|value)/(grad_norm|loss_scale)|policy/(first_ratio_error|clipfrac)"
    r"|objective/(kl|kl_per_token|entropy|score_std|score_length_correlation|win_rate|grade_win_rate|grade_win_rate_high)"
    r"|value/explained_variance|rollout/(eos_rate|length|commonest_share)|time/rank_spread"
)


def main(runs: str) -> None:
    """Record all runs in the folders of `runs`."""
    found = {
        f"{path.parent.parent.name}/{path.parent.name}": [_kept(line) for line in read_metrics(path)]
        for path in sorted(Path(runs).glob("*/step*/metrics.jsonl"))
    }
    text = json.dumps(found, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(found)} runs, {FILE.stat().st_size} bytes: {FILE}")


def _kept(line: dict[str, Any]) -> list[Any]:
    numbers = {name: float(f"{value:.5g}") for name, value in line.items() if READ.fullmatch(name)}
    return [line["step"], line["split"], numbers]


def recorded() -> dict[str, list[tuple[int, str, dict[str, float]]]]:
    """Run ("seed0/step3_ppo") -> its lines: step, split, metrics."""
    found: dict[str, list[tuple[int, str, dict[str, float]]]] = json.loads(gzip.decompress(FILE.read_bytes()))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
