"""Step 3: PPO. The fine-tuned model learns to score higher with the reward model, kept near its reference.

    deepspeed --module step3_ppo.train --config configs/quickstart/step3_ppo.yaml [key=value ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.records import write_heldout, write_samples
from step3_ppo.rollout import NotFiniteError, make_experience, sample_responses, score_responses
from step3_ppo.speed import speed_metrics
from step3_ppo.update import MinibatchReport, check_first_iteration, ppo_update
from tristage import dist
from tristage.config import BatchPlan, load_config
from tristage.data.sets import fingerprint
from tristage.models.saving import save_model
from tristage.models.tokenizer import generation_stop_ids
from tristage.rollout import RolloutError
from tristage.training.eval_command import EvalCommand
from tristage.training.health import Health
from tristage.training.metrics import RunLog, Stopwatch
from tristage.training.profiler import profiled
from tristage.training.run import Saver, entry_point, finish, start


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    inputs = read_inputs(settings)
    device, found = start(settings, fingerprint([inputs.prompts, inputs.heldout]))
    print_start(settings, inputs.plan, inputs.tokenizer)
    run = PPORun.build(inputs, device)
    run.restore(found)
    dist.print0(which_limit(settings, len(inputs.prompts)))
    train(run)
    run.health.check_finished()
    finish(settings, export(run))
    dist.print0(f"step 3 is done: {Path(settings.output, 'final')}")


def train(run: PPORun) -> None:
    """PPO (Schulman et al. 2017, algorithm 1) with a KL penalty (Ziegler et al. 2019), one iteration after another:

    1. sample responses; 2. score them; 3. turn scores into advantages; 4. update actor and critic for some epochs;
    5. evaluate on held-out prompts; 6. save.
    """
    inputs, settings, engines, control = run.inputs, run.settings, run.engines, run.control
    watch = Stopwatch(run.device)
    with RunLog.of(settings, "ppo", settings.iterations, run.first) as log:
        saver = Saver(settings, run.device, engines.trained(), run.health, log, run.own_pieces)
        command = EvalCommand(settings, engines.actor, inputs.tokenizer, run.device, log)
        if run.first == 0:
            write_heldout(run, log, watch, 0)
        for iteration in profiled(range(run.first + 1, settings.iterations + 1), settings):
            prompts, names, carried = run.prompts(iteration), run.names(iteration), control.state_dict()
            try:
                with watch("rollout"):  # 1
                    with saver.checkpoint_on(iteration - 1, carried, RolloutError), run.rollouts.fail_together():
                        run.rollouts.sync_weights(iteration - 1)
                        sampled = sample_responses(run.rollouts, prompts, settings.rollout, settings.seed, iteration)
                with watch("score"), saver.checkpoint_on(iteration - 1, carried, RolloutError):  # 2, 3
                    own = score_responses(engines, inputs.tokenizer, sampled, prompts, settings, inputs.functions)
                    experience, metrics = make_experience(engines, own, prompts, settings, control)
                saver.stop_if_asked(iteration - 1, carried)  # the rollout is dropped: a resumed run samples the same
                if iteration == run.first + 1:
                    check_first_iteration(engines, experience, settings, run.rollouts.name, untrained=run.first == 0)
                with watch("update"):  # 4
                    losses, minibatches = ppo_update(engines, experience, iteration, settings, inputs.plan, run.extras)
                note_minibatches(run.health, iteration, minibatches, names)
                metrics |= losses | speed_metrics(run, own, experience, losses, watch.take())
                write_samples(run, log, own, prompts, iteration)
            except NotFiniteError as broken:
                run.health.record_bad_step(iteration, broken.what, broken.batches(names))
                metrics = watch.take()
            log.write(iteration, "train", metrics)
            if saver.evaluates(iteration):  # 5
                with saver.checkpoint_on(iteration, control.state_dict(), RolloutError):
                    write_heldout(run, log, watch, iteration)
            command.after(iteration)
            saver.after(iteration, control.state_dict())  # 6


def export(run: PPORun) -> list[Path]:
    """Write the folders of actor, critic and average: the paths that rank 0 wrote. A collective."""
    output, tokenizer = Path(run.settings.output), run.inputs.tokenizer
    exported = save_model(run.engines.actor, tokenizer, output / "final")
    if run.engines.critic is not None:
        exported += save_model(run.engines.critic, tokenizer, output / "final_critic")
    if run.average is not None:
        with run.average.in_place():
            exported += save_model(run.engines.actor, tokenizer, output / "final_ema")
    return exported


def print_start(settings: PPOConfig, plan: BatchPlan, tokenizer: Any) -> None:
    """The sizes of an iteration, and where sampling is not what one may expect."""
    dist.print0(f"step 3, PPO: {settings.responses} responses per iteration, {settings.ppo.epochs} epochs, {plan}")
    if settings.rollout.top_p < 1 or settings.rollout.top_k:
        dist.print0("rollout.top_p or top_k: the sampling and scoring distributions differ, which biases the KL")
    if dist.is_main():
        note_other_stop_ids(settings, tokenizer)


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


def note_minibatches(health: Health, iteration: int, minibatches: list[MinibatchReport], names: list[str]) -> None:
    """Report each optimizer step of the iteration's updates to `health`; `names` are those of the experience's rows."""
    for step, micro_batches in minibatches:
        rows = [[names[row] for row in micro if row is not None] for micro in micro_batches]
        health.after_step(iteration, step, rows)


if __name__ == "__main__":
    entry_point(main)
