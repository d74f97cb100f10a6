"""One table of a quickstart run: what each step had before and after.

    python -m tristage.quickstart.report OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tristage.reporting.report import announce
from tristage.runs.record import read_metrics

STEPS = {"step1_sft": "1 fine-tuning", "step2_reward_model": "2 reward model", "step3_ppo": "3 PPO"}
# (step, metric, meaning)
ROWS = (
    ("step1_sft", "sft/loss", "held-out loss per token"),
    ("step1_sft", "sft/perplexity", "held-out perplexity"),
    ("step2_reward_model", "reward_model/accuracy", "accuracy on held-out pairs"),
    ("step2_reward_model", "reward_model/length_baseline", "  if the longer answer won"),
    ("step3_ppo", "objective/grade", "gold: grade by the rule, 0 to 1"),
    ("step3_ppo", "objective/score", "reward model's score"),
    ("step3_ppo", "objective/kl", "KL to the reference, nats per answer"),
    ("step3_ppo", "rollout/length", "tokens per answer"),
    ("step3_ppo", "rollout/eos_rate", "answers that end by themselves"),
)


def heldout_metrics(out: Path, step: str) -> list[dict[str, Any]]:
    """The held-out lines of one step of a run."""
    return [line for line in read_metrics(out / step / "metrics.jsonl") if line["split"] == "heldout"]


def main(argv: list[str]) -> None:
    out = Path(argv[0])
    table = Table(title="What each step had before and after, on prompts it never trained on")
    for column in ("step", "measure"):
        table.add_column(column)
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    lines = {step: heldout_metrics(out, step) for step in STEPS}
    for step, metric, meaning in ROWS:
        first, last = lines[step][0], lines[step][-1]
        before, after = (round(line[metric], 3) + 0.0 for line in (first, last))  # + 0.0: no "-0.000"
        table.add_row(STEPS[step], meaning, f"{before:.3f}", f"{after:.3f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    peak = max(lines["step3_ppo"], key=lambda line: line["objective/grade"])
    console.print(f"highest gold during PPO: {peak['objective/grade']:.3f} at iteration {peak['step']}")
    console.print(_sample(out / "step3_ppo"))
    console.print(f"metrics.jsonl, TensorBoard files and the models (final/) of each step are in {out}")
    announce(out)


def _sample(folder: Path) -> str:
    """One held-out prompt with its answer before and after PPO."""
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompt = samples[0]["prompt"]
    of_prompt = [sample for sample in samples if sample["prompt"] == prompt]
    before, after = of_prompt[0], of_prompt[-1]
    return f"{prompt}\n  before PPO: {before['response']}\n  after PPO:  {after['response']}"


if __name__ == "__main__":
    main(sys.argv[1:])
