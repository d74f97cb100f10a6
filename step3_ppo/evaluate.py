"""A policy on held-out prompts: score, KL, length, and the grade of a rule that training never sees.

    python -m step3_ppo.evaluate --config configs/quickstart/step3_ppo.yaml actor.model=OUT/final reference.model=SFT
"""

from __future__ import annotations

from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.heldout import evaluate
from tristage import dist
from tristage.config import load_config
from tristage.errors import UserError
from tristage.training.run import entry_point


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    if settings.reference is None:
        raise UserError(
            f"{settings.file}: key `reference` is missing; an exported folder has no adapters to switch off, give "
            "reference.model (where actor.lora started) and reference.deepspeed"
        )
    inputs = read_inputs(settings, train=False)
    found = evaluate(PPORun.build(inputs, dist.init(settings.device), train=False))
    for sample in found.samples[: settings.logged_samples]:
        dist.print0(f"\n{sample['prompt']}\n-> {sample['response']}\n   score {sample['score']:.3f}")
    for name, value in found.metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    entry_point(main)
