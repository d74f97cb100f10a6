"""One choice of PPO changed at a time, on the quickstart's task: what does each implementation detail do?

    python -m results.ablations output/results/ablations --seeds 5 --at-once 2

Each seed makes its own task, network, demonstrations, pairs and prompts; steps 1 and 2 are run once per seed, and each
variant starts from them. A run of step 3 takes about a minute on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from results.jobs import CONFIGS, Job, data_words, evaluate_job, run_jobs, step_job
from results.record import about, column, parser, publish
from tristage.runs.record import Run

RECIPE = CONFIGS / "quickstart"
# DeepSpeed-Chat updates once per rollout of one minibatch; as many responses in all as the quickstart samples.
CHAT_BATCH = ("rollout.prompts=32", "ppo.minibatch=32", "ppo.epochs=1", "iterations=160", "evaluate_every=20")
CHAT_FORMULAS = ("ppo.kl_coef=0.1", "ppo.reward_clip=5", "ppo.whiten=false", "actor.optimizer.eps=1e-8")
CHAT = (*CHAT_BATCH, *CHAT_FORMULAS, "critic.optimizer.eps=1e-8", "save_every=0")


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    claim: str  # that the line tests
    words: tuple[str, ...] = ()  # key=value of step 3
    module: str = "step3_ppo.train"
    reward: str = "step2_reward_model"  # folder of the reward model that it uses


# `{seed}` is the folder of a seed.
VARIANTS = (
    Variant("baseline", "the quickstart as it is"),
    Variant("EOS outside the losses", "DeepSpeed-Chat's mask where padding is EOS", module="results.without_eos"),
    Variant("greedy rollouts", "DeepSpeed-Chat decodes greedily; PPO assumes samples", ("rollout.top_k=1",)),
    Variant("advantages not whitened", "whitening advantages helps (detail 7 of 37)", ("ppo.whiten=false",)),
    Variant("values not clipped", "clipping the value loss matters little (detail 9 of 37)", ("ppo.value_clip=null",)),
    Variant("reward head N(0, 0.02)", "the head's N(0, 1/sqrt(d+1)) matters", reward="small_head"),
    Variant("normalised reward model", "scores of deviation 1, kl_coef as it was: the KL weighs more", reward="normal"),
    Variant("scores over their deviation", "the running deviation does the same", ("ppo.scale_reward=true",)),
    Variant(
        "critic from the actor",
        "a critic from the reward model learns faster",
        ("critic.model={seed}/step1_sft/final",),
    ),
    Variant("1 epoch", "fewer epochs learn less from as many samples", ("ppo.epochs=1",)),
    Variant("4 epochs", "more epochs learn more, at more KL", ("ppo.epochs=4",)),
    Variant("KL in the loss, k2", "the penalty's place does not matter", ("ppo.kl_in=loss", "ppo.kl_kind=k2")),
    Variant("KL in the loss, k3", "GRPO's estimator does as well", ("ppo.kl_in=loss", "ppo.kl_kind=k3")),
    Variant("no KL penalty", "without a penalty the reward model is over-optimised", ("ppo.kl_coef=0",)),
    Variant(
        "pretraining loss",
        "the mix keeps the actor near its data (InstructGPT)",
        (
            "pretraining.data=[{{path: '{seed}/data/sft.train.jsonl', columns: {{text: response}}}}]",
            *("pretraining.blocks=32", "pretraining.block_tokens=32", "pretraining.coef=1.0"),
        ),
    ),
    Variant("average of the actor", "DeepSpeed-Chat's EMA answers better", ("ema.decay=0.992",)),
    Variant(
        "LoRA",
        "rank 16 on all linear layers learns as much",
        ("actor.lora.rank=16", "critic.lora.rank=16", "actor.optimizer.learning_rate=2e-3"),
    ),
    Variant("DeepSpeed-Chat's formulas", "its preset, sampled, EOS in the losses, this recipe's rates", CHAT),
    Variant(
        "DeepSpeed-Chat as it is",
        "the same, greedy and with its mask",
        (*CHAT, "rollout.top_k=1"),
        module="results.without_eos",
    ),
)
# Measure -> its name in samples, and that of its curve in metrics.jsonl.
MEASURES = {"gold": "grade", "score": "score", "KL": "kl", "length": "length"}
CURVES = {"gold": "objective/grade", "score": "objective/score", "KL": "objective/kl"}
OTHER_REWARDS = {"small_head": ("results.small_head", ()), "normal": ("step2_reward_model.train", ("normalize=true",))}


def folder_name(name: str) -> str:
    """The name of a variant as that of its folder."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def jobs_of(seed: int, out: Path, variants: tuple[Variant, ...] = VARIANTS) -> Iterator[Job]:
    """Everything that a seed needs, in the order in which it must run."""
    folder = out / f"seed{seed}"
    prepare = (sys.executable, "-m", "tristage.quickstart.prepare", str(folder), "--seed", str(seed))
    yield Job(folder / "data", prepare)
    fresh = [f"model={folder}/model", *words_of_data(folder, seed, "sft")]
    yield step_job("step1_sft.train", RECIPE / "step1_sft.yaml", folder / "step1_sft", fresh)
    start = [f"model={folder}/step1_sft/final", *words_of_data(folder, seed, "preference")]
    config = RECIPE / "step2_reward_model.yaml"
    yield step_job("step2_reward_model.train", config, folder / "step2_reward_model", start)
    for name in sorted({variant.reward for variant in variants} & set(OTHER_REWARDS)):
        module, words = OTHER_REWARDS[name]
        yield step_job(module, config, folder / name, [*start, *words])
    for variant in variants:
        yield variant_job(variant, folder, seed)
    yield evaluation_job(folder, seed, variants)


def variant_job(variant: Variant, folder: Path, seed: int) -> Job:
    starts = [f"actor.model={folder}/step1_sft/final", f"reward.model={folder}/{variant.reward}/final"]
    words = [word.format(seed=folder) for word in variant.words]
    given = [*starts, *words_of_data(folder, seed, "prompts"), "save_every=0", *words]
    return step_job(variant.module, RECIPE / "step3_ppo.yaml", folder / folder_name(variant.name), given)


def evaluation_job(folder: Path, seed: int, variants: tuple[Variant, ...]) -> Job:
    """All policies of a seed, sampled at temperature 1 and scored by one reward model, however they were trained."""
    sft, output = f"{folder}/step1_sft/final", folder / "evaluation"
    policies = {"untrained": [f"actor.model={sft}"]}
    for variant in variants:
        trained = folder / folder_name(variant.name)
        average = any(word.startswith("ema.") for word in variant.words)
        final = trained / ("final_ema" if average else "final")
        policies[trained.name] = [f"actor.model={final}"]
    same = (f"reference.model={sft}", f"reward.model={folder}/step2_reward_model/final")
    return evaluate_job(RECIPE / "step3_ppo.yaml", output, policies, [*same, *words_of_data(folder, seed, "prompts")])


def words_of_data(folder: Path, seed: int, name: str) -> list[str]:
    return [f"seed={seed}", *data_words(folder, name)]


def record(out: Path, seeds: Sequence[int], variants: tuple[Variant, ...] = VARIANTS) -> dict[str, Any]:
    """Of each policy: per seed the means over held-out prompts, and its training's curves."""
    policies: dict[str, Any] = {"untrained": {"claim": "step 1 alone"}} | {
        variant.name: {"claim": variant.claim} for variant in variants
    }
    for name, found in policies.items():
        place = folder_name(name)
        files = [out / f"seed{seed}/evaluation/{place}.jsonl" for seed in seeds]
        for measure, key in MEASURES.items():
            found[measure] = [fmean(column(file, key)) for file in files]
        runs = [Run(out / f"seed{seed}" / place) for seed in seeds]
        found["curves"] = {
            measure: [series.values for run in runs if (series := run.heldout(metric)) is not None]
            for measure, metric in CURVES.items()
        }
    return {"about": about("python -m results.ablations output/results/ablations", out, seeds), "policies": policies}


def main(argv: list[str]) -> None:
    given = parser("ablations", seeds=5).parse_args(argv)
    out = given.out.resolve()
    for seed in range(given.seeds):
        data, sft, reward_model, *variants, evaluation = jobs_of(seed, out)
        run_jobs([data, sft, reward_model])
        run_jobs(variants, given.at_once)
        run_jobs([evaluation])
    publish("ablations", record(out, range(given.seeds)), given.publish)


if __name__ == "__main__":
    main(sys.argv[1:])
