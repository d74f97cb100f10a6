"""Step 3: PPO. The fine-tuned model learns to score higher with the reward model, kept near its reference.

    deepspeed --module step3_ppo.train --config configs/quickstart/step3_ppo.yaml [key=value ...]

One iteration: sample responses, score them (rollout.py), then some optimizer steps of actor and critic (update.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines, build_engines, check_models, engine_configs
from step3_ppo.heldout import evaluate
from step3_ppo.rewards import RewardTerm, TextScorer, check_turns, load_grader, load_reward_terms
from step3_ppo.rollout import Control, NotFiniteError, make_experience, make_rollouts, prompt_batch
from step3_ppo.update import ActorExtras, MinibatchReport, check_first_iteration, ppo_update
from tristage import dist
from tristage.batches import PromptBatch, SFTBatch
from tristage.checkpoint import Checkpoint, load_checkpoint
from tristage.config import BatchPlan, load_config, world_size_from_environment
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import Loader, deal
from tristage.data.packing import Blocks
from tristage.data.sets import fingerprint, load_sets, load_text_blocks
from tristage.data.store import Rows
from tristage.engine.average import WeightAverage
from tristage.errors import UserError
from tristage.models.saving import save_model
from tristage.models.tokenizer import generation_stop_ids
from tristage.training import run
from tristage.training.health import Health
from tristage.training.metrics import RunLog, Stopwatch

TRAINED: tuple[str, ...] = ("actor", "critic")
SHOWN = {
    "objective/score": "score",
    "objective/kl": "kl",
    "objective/grade": "grade",
    "rollout/length": "length",
    "value/explained_variance": "explained",
}


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any model does."""

    prompts: Rows
    heldout: Rows
    pretraining: Blocks | None
    functions: list[RewardTerm]
    grader: TextScorer | None


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    dist.check_device(settings.device, settings.file)
    plan = settings.plan(world_size_from_environment())
    configs = engine_configs(settings, plan)
    tokenizer = check_models(settings)
    train(settings, plan, configs, tokenizer, load_inputs(settings, tokenizer))


def load_inputs(settings: PPOConfig, tokenizer: Any) -> Inputs:
    """Prompts, text and functions. Raises UserError."""
    functions = load_reward_terms(settings)
    grader = load_grader(settings)
    prompts, heldout = load_sets(settings, tokenizer)
    check_turns(settings, prompts, heldout)
    if len(prompts) < settings.rollout.prompts:
        raise UserError(
            f"{settings.file}: rollout.prompts is {settings.rollout.prompts} but `data.train` gives only "
            f"{len(prompts)} prompts; lower it or give more prompts"
        )
    mix = settings.pretraining
    blocks = None if mix is None else load_text_blocks(mix.data, settings, tokenizer, mix.block_tokens)
    return Inputs(prompts, heldout, blocks, functions, grader)


def train(
    settings: PPOConfig, plan: BatchPlan, configs: dict[str, dict[str, Any]], tokenizer: Any, inputs: Inputs
) -> None:
    """Iterate from the latest checkpoint, or from the start, to the last iteration; export actor and critic."""
    device, found = run.start(settings, fingerprint([inputs.prompts, inputs.heldout]))
    output = Path(settings.output)
    dist.print0(f"step 3, PPO: {settings.responses} responses an iteration, {settings.ppo.epochs} epochs, {plan}")
    if settings.rollout.top_p < 1 or settings.rollout.top_k:
        dist.print0("rollout.top_p or top_k filters sampling: the sampled law is not the scored one, KL is biased")
    if dist.is_main():
        note_other_stop_ids(settings, tokenizer)
    engines = build_engines(settings, configs, tokenizer)
    trained = {name: getattr(engines, name) for name in TRAINED if name in configs}
    first = load_checkpoint(settings, found, trained)
    control, average = restored(settings, engines, found)
    health = Health.restored(settings, found)
    extras = actor_extras(settings, inputs, average, tokenizer)
    rollouts = make_rollouts(engines, tokenizer, settings)
    loader = prompt_loader(inputs.prompts, settings)
    dist.print0(which_limit(settings, len(inputs.prompts)))
    watch, warned = Stopwatch(device), False
    with RunLog(output, "ppo", settings.iterations, first, SHOWN) as log:
        saver = run.Saver(settings, device, trained, health, log, None if average is None else average.pieces)

        def evaluate_now(iteration: int) -> None:
            arguments = (inputs.heldout, settings, tokenizer, inputs.functions, inputs.grader, device)
            with watch("evaluate"):
                metrics, samples = evaluate(engines, rollouts, *arguments)
                if average is not None and iteration:
                    with average.in_place():
                        averaged, _ = evaluate(engines, rollouts, *arguments)
                    metrics |= {f"ema/{name}": value for name, value in averaged.items()}
            log.write(iteration, "heldout", metrics | watch.take())
            log.write_samples(iteration, samples)

        if first == 0:
            evaluate_now(0)
        for iteration in range(first + 1, settings.iterations + 1):
            carried = control.state_dict()
            batch = next_prompts(loader, iteration, inputs.prompts, settings, tokenizer).to(device)
            names = response_names(loader, iteration, inputs.prompts, settings)
            try:
                experience, metrics = make_experience(
                    engines, rollouts, batch, iteration, settings, watch, control, inputs.functions
                )
                saver.stop_if_asked(iteration - 1, carried)  # the rollout is dropped: a resumed run samples the same
                warned = warned or warn_of_constant(metrics)
                if iteration == 1:
                    check_first_iteration(engines, experience, settings, plan)
                with watch("update"):
                    losses, minibatches = ppo_update(engines, experience, iteration, settings, plan, extras)
                note_minibatches(health, iteration, minibatches, names)
                metrics |= losses | throughput(experience, watch)
            except NotFiniteError as broken:
                rows = [names[row] for row in broken.rows]
                health.record_bad_step(iteration, broken.what, [{"rows": rows}] if dist.is_main() else [])
                metrics = watch.take()
            log.write(iteration, "train", metrics)
            last = iteration == settings.iterations
            if last or (settings.evaluate_every and iteration % settings.evaluate_every == 0):
                evaluate_now(iteration)
            saver.after(iteration, last, control.state_dict())
    health.check_finished()
    exported = save_model(engines.actor, tokenizer, output / "final")
    if engines.critic is not None:
        exported += save_model(engines.critic, tokenizer, output / "final_critic")
    if average is not None:
        with average.in_place():
            exported += save_model(engines.actor, tokenizer, output / "final_ema")
    run.finish(settings, exported)
    dist.print0(f"step 3 is done: {output / 'final'}")


def which_limit(settings: PPOConfig, prompts: int) -> str:
    """What ends the run, and what that is in optimizer steps and passes over the prompts."""
    passes = settings.iterations * settings.rollout.prompts / prompts
    steps = f"{settings.total_steps} optimizer steps" + (" at most" if settings.ppo.target_kl is not None else "")
    return f"iterations end the run at {settings.iterations}: {steps}, {passes:.3g} passes over {prompts} prompts"


def note_other_stop_ids(settings: PPOConfig, tokenizer: Any) -> None:
    """One line when the actor's generation_config.json ends responses at tokens that do not end them here."""
    ours = {tokenizer.eos_token_id, *(settings.rollout.stop_token_ids or ())}
    others = [id for id in generation_stop_ids(settings.actor_path) if id not in ours]
    if others:
        dist.print0(
            f"{settings.actor_path}: generation_config.json also ends responses at {others} "
            f"({', '.join(tokenizer.convert_ids_to_tokens(others))}), and rollouts do not; to stop there, set "
            f"rollout.stop_token_ids={others}"
        )


def warn_of_constant(metrics: dict[str, float]) -> bool:
    """A reward that is the same for all responses may be what was meant, early on; it teaches nothing."""
    constant = metrics["objective/score_std"] == 0
    if constant:
        dist.print0(f"warning: every response has the score {metrics['objective/score']:.4g}: nothing to learn from it")
    return constant


def restored(settings: PPOConfig, engines: Engines, found: Checkpoint | None) -> tuple[Control, WeightAverage | None]:
    """KL coefficient, reward scale and moving average, as the checkpoint has them or new."""
    control, average = Control.of(settings), None
    if settings.ema is not None:
        steps = settings.total_steps - settings.warmup_steps  # the actor's, which follow the critic's warm-up
        start = settings.warmup_steps + int(settings.ema.start * steps)
        average = WeightAverage(engines.actor, settings.ema.decay, start)
    if found is not None and found.control is not None:
        control.load_state_dict(found.control)
    if average is not None and found is not None and (pieces := found.pieces("own")) is not None:
        average.restore(pieces)
    return control, average


def actor_extras(
    settings: PPOConfig, inputs: Inputs, average: WeightAverage | None, tokenizer: Any
) -> ActorExtras:
    """The pretraining mix and the moving average, where the settings ask for them."""
    after_step = None if average is None else average.update
    mix, blocks = settings.pretraining, inputs.pretraining
    if mix is None or blocks is None:
        return ActorExtras(after_step=after_step)
    plan = settings.pretraining_plan(dist.world_size())
    epochs = settings.total_steps * mix.blocks / len(blocks)
    loader = Loader(blocks.lengths, plan, dist.rank(), settings.seed, epochs)

    def batches(step: int) -> list[SFTBatch]:
        return [collate_sft(pick(blocks, micro), tokenizer.pad_token_id) for micro in loader.step_rows(step)]

    return ActorExtras(batches, mix.coef, after_step)


def next_prompts(loader: Loader, iteration: int, prompts: Rows, settings: PPOConfig, tokenizer: Any) -> PromptBatch:
    """This rank's prompts of an iteration, each rollout.samples times."""
    rows = loader.all_rows(iteration - 1)
    places = [place for (place,) in deal(range(len(rows)), prompts.lengths[rows], loader.plan, loader.rank)]
    return prompt_batch(prompts, rows, places, settings, tokenizer, settings.rollout.samples)


def response_names(loader: Loader, iteration: int, prompts: Rows, settings: PPOConfig) -> list[str]:
    """Where the prompt of each of the iteration's responses came from, in the order of the experience's rows."""
    return [prompts.where(row) for row in loader.all_rows(iteration - 1) for _ in range(settings.rollout.samples)]


def note_minibatches(health: Health, iteration: int, minibatches: list[MinibatchReport], names: list[str]) -> None:
    """Report each optimizer step of the iteration's updates to `health`; `names` are those of the experience's rows."""
    for step, micro_batches in minibatches:
        rows = [[names[row] for row in micro if row is not None] for micro in micro_batches]
        health.after_step(iteration, step, rows)


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
