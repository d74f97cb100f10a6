"""One choice of PPO changed at a time, on the quickstart's task: what does each implementation detail do?

    python -m results.ablations output/results/ablations --seeds 5 --at-once 2

Each seed makes its own task, network, demonstrations, pairs and prompts; steps 1 and 2 are run once per seed, and each
variant starts from them. A run of step 3 takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from results.jobs import CONFIGS, Job, run_jobs, step_job

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
    Variant("rewards of deviation 1", "normalised scores, kl_coef unchanged: a KL three times as dear", reward="normal"),
    Variant("scores over their deviation", "dividing by the running deviation does the same", ("ppo.scale_reward=true",)),
    Variant("critic from the actor", "a critic from the reward model learns faster", ("critic.model={seed}/step1_sft/final",)),
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
        "DeepSpeed-Chat as it is", "the same, greedy and with its mask", (*CHAT, "rollout.top_k=1"), "results.without_eos"
    ),
)  # fmt: skip
OTHER_REWARDS = {"small_head": ("results.small_head", ()), "normal": ("step2_reward_model.train", ("normalize=true",))}


def folder_name(name: str) -> str:
    """The name of a variant as that of its folder."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def jobs_of(seed: int, out: Path, variants: tuple[Variant, ...] = VARIANTS) -> Iterator[Job]:
    """Everything that a seed needs, in the order in which it must run."""
    folder = out / f"seed{seed}"
    data = words_of_data(folder, seed)
    prepare = (sys.executable, "-m", "tristage.quickstart.prepare", str(folder), "--seed", str(seed))
    yield Job(folder / "data", prepare)
    yield step_job("step1_sft.train", RECIPE / "step1_sft.yaml", folder / "step1_sft", [f"model={folder}/model", *data("sft")])
    start = [f"model={folder}/step1_sft/final", *data("preference")]
    config = RECIPE / "step2_reward_model.yaml"
    yield step_job("step2_reward_model.train", config, folder / "step2_reward_model", start)
    for name in {variant.reward for variant in variants} & set(OTHER_REWARDS):
        module, words = OTHER_REWARDS[name]
        yield step_job(module, config, folder / name, [*start, *words])
    for variant in variants:
        yield variant_job(variant, folder, seed)


def variant_job(variant: Variant, folder: Path, seed: int) -> Job:
    starts = [f"actor.model={folder}/step1_sft/final", f"reward.model={folder}/{variant.reward}/final"]
    words = [word.format(seed=folder) for word in variant.words]
    given = [*starts, *words_of_data(folder, seed)("prompts"), "save_every=0", *words]
    return step_job(variant.module, RECIPE / "step3_ppo.yaml", folder / folder_name(variant.name), given)


def words_of_data(folder: Path, seed: int) -> Callable[[str], list[str]]:
    def words(name: str) -> list[str]:
        files = [f"data.{side}={folder}/data/{name}.{side}.jsonl" for side in ("train", "heldout")]
        return [f"seed={seed}", *files]

    return words


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m results.ablations")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, one core each")
    given = parser.parse_args(argv)
    out = given.out.resolve()
    for seed in range(given.seeds):
        first, *rest = jobs_of(seed, out)
        run_jobs([first, *rest[:2]])
        run_jobs(rest[2:], given.at_once)


if __name__ == "__main__":
    main(sys.argv[1:])
