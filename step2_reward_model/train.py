"""Step 2: train a reward model, from a language model, on ranked answers.

    deepspeed --module step2_reward_model.train --config configs/quickstart/step2_reward_model.yaml [key=value ...]

The score of an answer is the scalar head's value at its last real token, the EOS. All answers of a prompt are in one
forward; the loss is the mean over the prompts of the whole optimizer step of the ranking loss of one prompt. At the end
scores are shifted and scaled, so that those of the best training answers have mean 0 and deviation 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from step2_reward_model.config import RewardModelConfig
from step2_reward_model.heldout import evaluate
from step2_reward_model.loss import pair_metrics, pair_options, prompt_losses
from step2_reward_model.measures import length_warning
from tristage import dist
from tristage.batches import PreferenceBatch
from tristage.checkpoint import load_checkpoint
from tristage.config import BatchPlan, load_config
from tristage.data.collate import collate_ranking, collate_sft, pick
from tristage.data.loader import evaluation_batches
from tristage.data.sets import fingerprint, load_sets
from tristage.data.store import Rows
from tristage.data.tokenize import Example, RankedExamples
from tristage.engine import StepReport, backward_mean, optimizer_step, train_engine
from tristage.models.flops import Work
from tristage.models.loading import is_reward_model
from tristage.models.reward_model import last_token_scores, load_reward_model
from tristage.models.saving import save_model
from tristage.training import run, setup
from tristage.training.eval_command import EvalCommand
from tristage.training.health import Health, row_ids
from tristage.training.metrics import Averages, RunLog, Stopwatch
from tristage.training.profiler import profiled
from tristage.training.speed import Speed


def main(argv: list[str]) -> None:
    settings = load_config(RewardModelConfig, argv)
    plan, config, tokenizer = setup.check_training(settings)
    sets = load_sets(settings, tokenizer)
    train(settings, plan, config, tokenizer, *sets)


def train(
    settings: RewardModelConfig,
    plan: BatchPlan,
    config: dict[str, Any],
    tokenizer: Any,
    rows: Rows,
    heldout: Rows,
) -> None:
    """Train from the latest checkpoint, or from the start, to the last step; export to output/final."""
    device, found = run.start(settings, fingerprint([rows, heldout]))
    output = Path(settings.output)
    dist.print0(f"step 2, reward model: {plan}")
    if not is_reward_model(settings.model, settings.trust_remote_code):
        dist.print0(f"{settings.model} has no scalar head: a new one is initialised")
    model = setup.load_trained(load_reward_model, settings, config, tokenizer, new_head_seed=settings.seed)
    loader = setup.train_loader(settings, rows.lengths, plan)
    engine = train_engine(model, config, settings.optimizer, loader.total_steps)
    first, health = load_checkpoint(settings, found, {"model": engine}), Health.restored(settings, found)
    watch, speed = Stopwatch(device), Speed(settings, device)
    with RunLog.of(settings, "reward model", loader.total_steps, first) as log:
        saver = run.Saver(settings, device, {"model": engine}, health, log)
        command = EvalCommand(settings, engine, tokenizer, device, log)
        if first == 0:
            log.write(0, "heldout", evaluate(engine, heldout, settings, tokenizer, device).metrics())
        for step in profiled(range(first + 1, loader.total_steps + 1), settings):
            with watch("step"):
                micro_batches = [
                    collate_ranking(pick(rows, micro), tokenizer.pad_token_id) for micro in loader.step_rows(step - 1)
                ]
                options = pair_options(settings)
                metrics, report = reward_model_step(engine, micro_batches, settings.loss, device, **options)
            health.after_step(step, report, row_ids(rows, loader.step_rows(step - 1)))
            work = [Work.of(batch.attention_mask, batch.attention_mask) for batch in micro_batches]
            seconds = watch.take()
            log.write(step, "train", metrics | seconds | speed.step(work, seconds))
            if saver.evaluates(step):
                measured = evaluate(engine, heldout, settings, tokenizer, device)
                log.write(step, "heldout", measured.metrics())
                if log.is_last(step) and (warning := length_warning(measured)):
                    dist.print0(warning)
            command.after(step)
            saver.after(step)
    health.check_finished()
    if settings.normalize:
        normalize_scores(engine, rows, settings, tokenizer, device)
    run.finish(settings, save_model(engine, tokenizer, output / "final"))
    dist.print0(f"step 2 is done: {output / 'final'}")


def reward_model_step(
    engine: Any, micro_batches: list[PreferenceBatch], form: str, device: torch.device, **options: float
) -> tuple[dict[str, float], StepReport]:
    """One optimizer step over this rank's micro-batches; metrics over all ranks. A collective.

    `form` is the setting `loss`, `options` are loss.pair_options.
    """
    engine.train()
    prompts = sum(int(batch.is_real.sum()) for batch in micro_batches)
    global_prompts = dist.sum_over_ranks({"prompts": prompts}, device)["prompts"]
    averages, step_losses = Averages(), []
    for batch in micro_batches:
        batch = batch.to(device)
        values = engine(batch.input_ids, batch.attention_mask)
        losses = prompt_losses(values, batch, form, **options)
        loss_sum = torch.where(batch.is_real, losses, 0.0).sum()
        step_losses.append(backward_mean(engine, loss_sum, global_prompts))
        averages.add("reward_model/loss", loss_sum.detach(), batch.is_real.sum())
        pair_metrics(averages, last_token_scores(values.detach(), batch.attention_mask), batch)
    report = optimizer_step(engine, step_losses)
    return averages.reduce(device) | report.metrics(), report


@torch.no_grad()
def normalize_scores(
    engine: Any, rows: Rows, settings: RewardModelConfig, tokenizer: Any, device: torch.device
) -> None:
    """Make scores of the best answers of (a fixed sample of) the training prompts mean 0, deviation 1. A collective.

    The micro-batches and the order of the sums are the same for any number of ranks, and so is the result.
    """
    engine.eval()
    sample = np.random.default_rng(settings.seed).permutation(len(rows))[: settings.normalize_prompts]
    best = [best_answer(rows[int(row)]) for row in sample]
    lengths = [len(example.ids) for example in best]
    own: dict[int, float] = {}
    for micro in evaluation_batches(lengths, settings.micro_batch, dist.world_size(), dist.rank(), device.type):
        batch = collate_sft(pick(best, micro), tokenizer.pad_token_id).to(device)
        scores = last_token_scores(engine(batch.input_ids, batch.attention_mask), batch.attention_mask)
        own.update({row: score for row, score in zip(micro, scores.tolist(), strict=True) if row is not None})
    of_all = {row: score for part in dist.gather_objects(own) for row, score in part.items()}
    scores_in_order = np.array([of_all[row] for row in range(len(best))])
    mean, std = float(scores_in_order.mean()), float(scores_in_order.std())
    if not 0 < std < float("inf"):
        dist.print0(f"warning: scores of {len(best)} best training answers have deviation {std}: not normalised")
        return
    engine.module.normalize(mean, std)
    dist.print0(f"scores of {len(best)} best training answers: mean {mean:.4g} becomes 0, deviation {std:.4g} 1")


def best_answer(item: RankedExamples) -> Example:
    """The answer with the lowest rank, the first of several."""
    examples, ranks = item
    return examples[ranks.index(min(ranks))]


if __name__ == "__main__":
    run.entry_point(main)
