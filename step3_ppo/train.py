"""Step 3: PPO. The fine-tuned model learns to score higher with the reward model, kept near its reference.

    deepspeed --module step3_ppo.train --config configs/quickstart/step3_ppo.yaml [key=value ...]

One iteration: sample responses, score them (rollout.py), then some optimizer steps of actor and critic (update.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from step3_ppo.config import PPOConfig
from step3_ppo.evaluate import Grader, evaluate, load_grader, prompt_batch
from step3_ppo.rollout import Engines, make_experience
from step3_ppo.update import check_first_iteration, ppo_update
from tristage import dist, run
from tristage.checkpoint import check_resumable, load_checkpoint, save_checkpoint
from tristage.config import (
    BatchPlan,
    load_config,
    read_deepspeed_json,
    require_folder_or_hub_id,
    world_size_from_environment,
)
from tristage.data.loader import Loader
from tristage.data.sets import fingerprint, load_sets
from tristage.data.store import Rows
from tristage.data.template import read_template
from tristage.engine import DTYPES, engine_config, frozen_engine, train_engine, zero_stage
from tristage.errors import UserError
from tristage.metrics import RunLog, Stopwatch
from tristage.models import (
    check_model,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
)
from tristage.rollout import PaddedRollout

SHOWN = {
    "objective/score": "score",
    "objective/kl": "kl",
    "objective/grade": "grade",
    "rollout/length": "length",
    "value/explained_variance": "explained",
}


class EngineConfigs(NamedTuple):
    """The DeepSpeed configs of the four engines."""

    actor: dict[str, Any]
    critic: dict[str, Any]
    reference: dict[str, Any]
    reward: dict[str, Any]


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    dist.check_device(settings.device, settings.file)
    plan = settings.plan(world_size_from_environment())
    configs = engine_configs(settings, plan)
    check_resumable(settings, {"actor": zero_stage(configs.actor), "critic": zero_stage(configs.critic)})
    tokenizer = check_models(settings)
    grader = load_grader(settings.grader, settings.file)
    prompts, heldout = load_sets(settings, tokenizer)
    if len(prompts) < settings.rollout.prompts:
        raise UserError(
            f"{settings.file}: rollout.prompts is {settings.rollout.prompts} but `data.train` gives only "
            f"{len(prompts)} prompts; lower it or give more prompts"
        )
    train(settings, plan, configs, tokenizer, prompts, heldout, grader)


def engine_configs(settings: PPOConfig, plan: BatchPlan) -> EngineConfigs:
    """The four DeepSpeed configs. Raises UserError for a frozen engine at ZeRO 1 or 2, which shard what it lacks."""
    found = {}
    for name in EngineConfigs._fields:
        engine = getattr(settings, name)
        template = read_deepspeed_json(engine.deepspeed, settings, f"{name}.deepspeed")
        clip_norm = engine.optimizer.clip_norm if name in ("actor", "critic") else 0.0
        found[name] = engine_config(template, settings.precision, plan, clip_norm)
        if name in ("reference", "reward") and zero_stage(found[name]) not in (0, 3):
            raise UserError(
                f"{settings.file}: key `{name}.deepspeed`: ZeRO stage {zero_stage(found[name])} shards gradients and "
                "optimizer, which a frozen model has not; use stage 0 or 3"
            )
    return EngineConfigs(**found)


def check_models(settings: PPOConfig) -> Any:
    """The actor's tokenizer, after making sure that all four folders are there, agree and hold what they should."""
    paths = {
        "actor.model": settings.actor_path,
        "reference.model": settings.reference_path,
        "reward.model": settings.reward_path,
        "critic.model": settings.critic_path,
    }
    for key, path in paths.items():
        require_folder_or_hub_id(path, settings, key)
    tokenizers = {f"{key} ({path})": load_tokenizer(path) for key, path in paths.items()}
    if (template := read_template(settings)) is not None:
        tokenizers[f"data.template ({settings.data.template})"] = load_tokenizer(settings.actor_path, template)
    require_same_tokenizer(tokenizers)
    for key, path in paths.items():
        check_model(path, settings.max_tokens, reward_model=key in ("reward.model", "critic.model"))
    return next(iter(tokenizers.values()))


def build_engines(settings: PPOConfig, configs: EngineConfigs, tokenizer: Any) -> Engines:
    """Load the four models, one after the other, and hand each to its DeepSpeed engine."""
    common: dict[str, Any] = {"dtype": DTYPES[settings.precision], "max_tokens": settings.max_tokens}

    def trained(name: str, load: Any, path: str) -> Any:
        spec, config = getattr(settings, name), getattr(configs, name)
        model = load(
            path, tokenizer, engine_config=config, gradient_checkpointing=spec.gradient_checkpointing, **common
        )
        return train_engine(model, config, spec.optimizer, settings.total_steps)

    def frozen(name: str, load: Any, path: str) -> Any:
        config = getattr(configs, name)
        return frozen_engine(load(path, tokenizer, engine_config=config, **common), config)

    return Engines(
        actor=trained("actor", load_causal_lm, settings.actor_path),
        critic=trained("critic", load_reward_model, settings.critic_path),
        reference=frozen("reference", load_causal_lm, settings.reference_path),
        reward=frozen("reward", load_reward_model, settings.reward_path),
    )


def train(
    settings: PPOConfig,
    plan: BatchPlan,
    configs: EngineConfigs,
    tokenizer: Any,
    prompts: Rows,
    heldout: Rows,
    grader: Grader | None,
) -> None:
    """Iterate from the latest checkpoint, or from the start, to the last iteration; export actor and critic."""
    device, output = run.start(settings, fingerprint([prompts, heldout])), Path(settings.output)
    dist.print0(f"step 3, PPO: {settings.rollout.prompts} prompts an iteration, {settings.ppo.epochs} epochs, {plan}")
    if settings.rollout.top_p < 1 or settings.rollout.top_k:
        dist.print0("rollout.top_p or top_k filters sampling: the sampled law is not the scored one, KL is biased")
    engines = build_engines(settings, configs, tokenizer)
    trained = {"actor": engines.actor, "critic": engines.critic}
    first = load_checkpoint(settings, trained)
    rollouts = PaddedRollout(engines.actor, tokenizer, settings.rollout.rows_at_once, settings.rollout.gather)
    loader = prompt_loader(prompts, settings)
    watch = Stopwatch(device)
    with RunLog(output, "ppo", settings.iterations, first, SHOWN) as log:

        def evaluate_now(iteration: int) -> None:
            with watch("evaluate"):
                metrics, samples = evaluate(engines, rollouts, heldout, settings, tokenizer, grader, device)
            log.write(iteration, "heldout", metrics | watch.take())
            log.write_samples(iteration, samples)

        if first == 0:
            evaluate_now(0)
        for iteration in range(first + 1, settings.iterations + 1):
            indices = [row for (row,) in loader.step_rows(iteration - 1)]
            batch = prompt_batch(prompts, indices, settings, tokenizer).to(device)
            experience, metrics = make_experience(engines, rollouts, batch, iteration, settings, watch)
            if iteration == 1:
                check_first_iteration(engines, experience, settings, plan)
            with watch("update"):
                metrics |= ppo_update(engines, experience, iteration, settings, plan)
            log.write(iteration, "train", metrics | throughput(experience, watch))
            last = iteration == settings.iterations
            if last or (settings.evaluate_every and iteration % settings.evaluate_every == 0):
                evaluate_now(iteration)
            if last or (settings.save_every and iteration % settings.save_every == 0):
                save_checkpoint(settings, iteration, trained)
    save_model(engines.actor, tokenizer, output / "final")
    save_model(engines.critic, tokenizer, output / "final_critic")
    dist.print0(f"step 3 is done: {output / 'final'}")


def prompt_loader(prompts: Rows, settings: PPOConfig) -> Loader:
    """Iteration after iteration rollout.prompts prompts, dealt one at a time so that ranks get like lengths."""
    plan = BatchPlan.make(settings.rollout.prompts, 1, dist.world_size())
    epochs = settings.iterations * settings.rollout.prompts / len(prompts)
    return Loader(prompts.lengths, plan, dist.rank(), settings.seed, epochs)


def throughput(experience: Any, watch: Stopwatch) -> dict[str, float]:
    """Seconds of each phase, and tokens (prompt and response, real ones) a second over all ranks."""
    seconds = watch.take()
    tokens = float(experience.sequences.attention_mask.sum())
    return seconds | {
        "time/iteration": sum(seconds.values()),
        "throughput/tokens_per_second": tokens / sum(seconds.values()),
        "throughput/response_tokens_per_second": float(experience.mask.sum()) / seconds["time/rollout"],
    }


if __name__ == "__main__":
    run.entry_point(main)
