"""A policy on held-out prompts: score, KL, length, and the grade of a rule that training never sees.

    python -m step3_ppo.evaluate --config configs/quickstart/step3_ppo.yaml actor.model=OUT/final reference.model=SFT
"""

from __future__ import annotations

from step3_ppo.config import PPOConfig
from step3_ppo.engines import build_engines, check_models, engine_configs
from step3_ppo.heldout import evaluate
from step3_ppo.rewards import check_turns, load_grader, load_reward_terms
from step3_ppo.rollout import make_rollouts
from tristage import dist
from tristage.config import BatchPlan, load_config
from tristage.data.sets import load_heldout
from tristage.errors import UserError
from tristage.training import run


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    dist.check_device(settings.device, settings.file)
    if settings.reference is None:
        raise UserError(
            f"{settings.file}: key `reference` is missing; an exported folder has no adapters to switch off, give "
            "reference.model (where actor.lora started) and reference.deepspeed"
        )
    configs = engine_configs(settings, BatchPlan.make(dist.world_size(), 1, dist.world_size()))
    configs.pop("critic", None)
    tokenizer = check_models(settings)
    functions = load_reward_terms(settings)
    grader = load_grader(settings)
    heldout = load_heldout(settings, tokenizer)
    check_turns(settings, heldout)
    device = dist.init(settings.device)
    engines = build_engines(settings, configs, tokenizer, train=False)
    rollouts = make_rollouts(engines, tokenizer, settings)
    metrics, samples = evaluate(engines, rollouts, heldout, settings, tokenizer, functions, grader, device)
    for sample in samples:
        dist.print0(f"\n{sample['prompt']}\n-> {sample['response']}\n   score {sample['score']:.3f}")
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)
