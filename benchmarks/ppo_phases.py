"""Seconds of one PPO iteration by phase, and what the rollout's choices are worth, as ratios in one run.

From the repository's root, on two CPU ranks:

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu deepspeed --no_local_rank --num_gpus 2 \\
        --module benchmarks.ppo_phases [OUT.json [REPETITIONS]]

Weights are random (the quickstart's 0.7 million parameter network and task), so nearly every response runs to the
limit of 24 tokens. Variants take turns, iteration by iteration, on the same prompts, so that a machine that slows down
slows all of them; a figure is the median of its repetitions.

    zero2            the quickstart's engines
    zero3            all four engines at ZeRO-3, actor gathered once a rollout
    zero3-naive      the same, every token gathers every parameter again        (rollout only)
    few-rows         zero2, rollouts of as many rows at once as a micro-batch    (rollout only)
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import make_experience, sample_responses, score_responses
from step3_ppo.update import ppo_update
from tristage import dist
from tristage.batches import PromptBatch
from tristage.engine import frozen_engine
from tristage.models.quiet import quiet_libraries
from tristage.models.reward_model import load_reward_model
from tristage.models.saving import save_model
from tristage.models.tokenizer import load_tokenizer
from tristage.quickstart import prepare
from tristage.rollout import PaddedRollout
from tristage.training.metrics import Stopwatch

ROOT = Path(__file__).parents[1]
REPETITIONS = 5
PHASES = ("time/rollout", "time/score", "time/update")


def settings_for(folder: Path, stage: int) -> PPOConfig:
    """The quickstart's sizes, on models of this run's temporary folder."""
    zero = {"deepspeed": str(ROOT / f"configs/deepspeed/zero{stage}.json")}
    frozen = {"deepspeed": str(ROOT / f"configs/deepspeed/zero{3 if stage == 3 else 0}.json")}
    optimizer = {"learning_rate": 1e-6}
    return PPOConfig.model_validate(
        {
            "output": str(folder / f"zero{stage}"),
            "precision": "bf16" if torch.cuda.is_available() else "float32",
            "actor": {"model": str(folder / "model"), "optimizer": optimizer} | zero,
            "critic": {"optimizer": optimizer} | zero,
            "reference": frozen,
            "reward": {"model": str(folder / "reward")} | frozen,
            "data": {"train": str(folder / "data/prompts.train.jsonl"), "heldout_fraction": 0.5},
            "max_prompt_tokens": 40,
            "iterations": 1000,
            "rollout": {"prompts": 128, "rows_at_once": 64, "max_response_tokens": 24},
            "ppo": {"epochs": 2, "minibatch": 64, "micro_batch": 16},
        }
    )


class Variant:
    """A run of one ZeRO stage, ready for iterations."""

    def __init__(self, folder: Path, stage: int, device: torch.device):
        self.settings = settings_for(folder, stage)
        self.ppo, self.watch = PPORun.build(read_inputs(self.settings), device), Stopwatch(device)

    def iteration(self, batch: PromptBatch, number: int) -> dict[str, float]:
        ppo, settings = self.ppo, self.settings
        with self.watch("rollout"):
            sampled = sample_responses(ppo.rollouts, batch, settings.rollout, settings.seed, number)
        with self.watch("score"):
            own = score_responses(ppo.engines, ppo.inputs.tokenizer, sampled, batch, settings, functions=[])
            experience, _ = make_experience(ppo.engines, own, batch, settings, ppo.control)
        with self.watch("update"):
            ppo_update(ppo.engines, experience, number, settings, ppo.inputs.plan)
        return self.watch.take()

    def rollout(self, batch: PromptBatch, number: int, rows_at_once: int, gather: str) -> dict[str, float]:
        rollouts = PaddedRollout(self.ppo.engines.actor, self.ppo.inputs.tokenizer, rows_at_once, gather)
        with self.watch("rollout"):
            sample_responses(rollouts, batch, self.settings.rollout, self.settings.seed, number)
        return self.watch.take()


def make_models(folder: Path, device: torch.device) -> None:
    """The quickstart's data and network, and an untrained reward model, written by rank 0."""
    if dist.is_main():
        prepare.main([str(folder)])
    dist.barrier()
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_reward_model(str(folder / "model"), tokenizer, dtype=torch.float32, new_head_seed=0)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    save_model(frozen_engine(model.to(device), config), tokenizer, folder / "reward")


def main(argv: list[str]) -> None:
    quiet_libraries()
    device = dist.init()
    (name,) = set(dist.gather_objects(tempfile.mkdtemp() if dist.is_main() else None)) - {None}
    folder = Path(name)
    make_models(folder, device)
    zero2, zero3 = (Variant(folder, stage, device) for stage in (2, 3))
    settings, batch = zero2.settings, zero2.ppo.prompts(1)
    runs = {
        "zero2": lambda n: zero2.iteration(batch, n),
        "zero3": lambda n: zero3.iteration(batch, n),
        "zero3-naive": lambda n: zero3.rollout(batch, n, settings.rollout.rows_at_once, "never"),
        "few-rows": lambda n: zero2.rollout(batch, n, settings.ppo.micro_batch, "auto"),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for repetition in range(int(argv[1]) + 1 if len(argv) > 1 else REPETITIONS + 1):
        for name, run in runs.items():
            found = run(repetition + 1)
            if repetition:  # the first is the warm-up
                seconds[name].append(found)
    if dist.is_main():
        report(seconds, device, argv)
    dist.shutdown()


def report(seconds: dict[str, list[dict[str, float]]], device: torch.device, argv: list[str]) -> None:
    """Print medians and ratios; write them to the file that argv names."""
    medians = {
        name: {phase: statistics.median(run[phase] for run in runs) for phase in PHASES if phase in runs[0]}
        for name, runs in seconds.items()
    }
    for name, phases in medians.items():
        print(f"{name:12}", "  ".join(f"{phase} {value:.3f} s" for phase, value in phases.items()))
    rollout = {name: phases["time/rollout"] for name, phases in medians.items()}
    ratios = {
        "rollout, zero3 : zero2": rollout["zero3"] / rollout["zero2"],
        "rollout, zero3-naive : zero3": rollout["zero3-naive"] / rollout["zero3"],
        "rollout, few-rows : zero2": rollout["few-rows"] / rollout["zero2"],
    }
    for name, ratio in ratios.items():
        print(f"{name:30} {ratio:.2f}")
    if argv:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "device": device.type}
        result = {"environment": environment | {"ranks": dist.world_size()}, "medians": medians, "ratios": ratios}
        Path(argv[0]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
