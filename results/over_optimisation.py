"""How far a reward model can be pushed before gold falls: models of fewer and fewer pairs, PPO with nothing to hold it.

    python -m results.over_optimisation output/results/ablations --seeds 3 --at-once 2

The quickstart's task, with the models and data of the ablations in the same folder. Gao et al. 2022, "Scaling laws for
reward model overoptimization", draw the same curves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from results.ablations import CURVES, RECIPE, jobs_of, words_of_data
from results.jobs import Job, run_jobs, step_job
from results.record import about, parser, publish
from tristage.runs.record import Run

PAIRS = {300: 4, 2000: 4, 12000: 2.5}  # pairs to learn from -> epochs
# No penalty, no clip, a constant learning rate and 4 epochs of each rollout: far from the reference.
PUSH = ("ppo.kl_coef=0", "ppo.reward_clip=null", "ppo.epochs=4", "actor.optimizer.schedule=constant")


def reward_job(pairs: int, folder: Path, seed: int) -> Job:
    words = [f"model={folder}/step1_sft/final", *words_of_data(folder, seed, "preference")]
    words += [f"data.limit={pairs}", f"epochs={PAIRS[pairs]}"]
    output = folder / f"over_optimisation/reward_{pairs}"
    return step_job("step2_reward_model.train", RECIPE / "step2_reward_model.yaml", output, words)


def policy_job(pairs: int, folder: Path, seed: int) -> Job:
    reward = reward_job(pairs, folder, seed).output / "final"
    words = [f"actor.model={folder}/step1_sft/final", f"reward.model={reward}", *words_of_data(folder, seed, "prompts")]
    output = folder / f"over_optimisation/ppo_{pairs}"
    return step_job("step3_ppo.train", RECIPE / "step3_ppo.yaml", output, [*words, "save_every=0", *PUSH])


def first_jobs(seed: int, out: Path) -> Iterator[Job]:
    """Data and step 1, which the ablations have as well."""
    data, sft, *_ = jobs_of(seed, out)
    yield from (data, sft)


def record(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Per number of pairs: the reward model's accuracy, and the curves over training of each seed."""
    policies = {}
    for pairs in PAIRS:
        folders = [out / f"seed{seed}/over_optimisation" for seed in seeds]
        rewards = [Run(folder / f"reward_{pairs}").series["heldout"] for folder in folders]
        runs = [Run(folder / f"ppo_{pairs}").series["heldout"] for folder in folders]
        curves = {measure: [run[metric].values for run in runs] for measure, metric in CURVES.items()}
        policies[f"{pairs} pairs"] = {
            "accuracy": [found["reward_model/accuracy"].last for found in rewards],
            "gold": [gold[-1] for gold in curves["gold"]],
            "best gold": [max(gold) for gold in curves["gold"]],
            "KL": [kl[-1] for kl in curves["KL"]],
            "curves": curves,
        }
    command = f"python -m results.over_optimisation output/results/ablations --seeds {len(seeds)}"
    return {"about": about(command, out, seeds, jobs="*/over_optimisation/*/job.json"), "policies": policies}


def main(argv: list[str]) -> None:
    given = parser("over_optimisation", seeds=3).parse_args(argv)
    out, seeds = given.out.resolve(), range(given.seeds)
    for seed in seeds:
        run_jobs(list(first_jobs(seed, out)))
    for make in (reward_job, policy_job):
        run_jobs([make(pairs, out / f"seed{seed}", seed) for seed in seeds for pairs in PAIRS], given.at_once)
    publish("over_optimisation", record(out, seeds), given.publish)


if __name__ == "__main__":
    main(sys.argv[1:])
