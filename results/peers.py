"""TRL's PPOTrainer from the models and prompts of the ablations, evaluated as they are.

    python -m results.peers output/results/ablations --trl-ppo-python trl-ppo/bin/python

The curves of DeepSpeed-Chat's formulas are one of the ablations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from results.ablations import MEASURES, RECIPE, words_of_data
from results.jobs import Job, evaluate_job, run_jobs
from results.record import about, column, parser, publish, versions_in

STEPS = (5, 10, 15, 20, 25, 30, 35, 40)


def jobs_of(seed: int, out: Path, python: str) -> Iterator[Job]:
    folder = out / f"seed{seed}"
    trained = folder / "trl_ppo"
    yield Job(trained, (python, "-m", "results.trl_ppo", str(folder), str(trained), str(seed)))
    policies = {f"step{step}": [f"actor.model={trained}/{step}"] for step in STEPS}
    same = (f"reference.model={folder}/step1_sft/final", f"reward.model={folder}/step2_reward_model/final")
    words = [*same, *words_of_data(folder, seed, "prompts")]
    yield evaluate_job(RECIPE / "step3_ppo.yaml", folder / "evaluation_trl", policies, words)


def record(out: Path, seeds: Sequence[int], trl: dict[str, str]) -> dict[str, Any]:
    command = "python -m results.peers output/results/ablations --trl-ppo-python trl-ppo/bin/python"
    found: dict[str, Any] = {"about": about(command, out, seeds, jobs="*/*trl*/job.json"), "steps": [0, *STEPS]}
    found["about"]["versions_of_trl_ppo"] = trl
    files = ["evaluation/untrained.jsonl", *(f"evaluation_trl/step{step}.jsonl" for step in STEPS)]
    curves = {
        measure: [[fmean(column(out / f"seed{seed}" / file, key)) for file in files] for seed in seeds]
        for measure, key in MEASURES.items()
    }
    last = {measure: [curve[-1] for curve in seeds] for measure, seeds in curves.items()}
    return found | {"policies": {"TRL 1.12 PPOTrainer": last | {"curves": curves}}}


def main(argv: list[str]) -> None:
    arguments = parser("peers", seeds=5)
    arguments.add_argument("--trl-ppo-python", required=True)
    given = arguments.parse_args(argv)
    python, out = given.trl_ppo_python, given.out.resolve()
    trl = versions_in(python, ("trl", "transformers", "torch"))
    for of_all_seeds in zip(*(jobs_of(seed, out, python) for seed in range(given.seeds)), strict=True):
        run_jobs(of_all_seeds, given.at_once)
    publish("peers", record(out, range(given.seeds), trl), given.publish)


if __name__ == "__main__":
    main(sys.argv[1:])
