"""Step 2 without a reward model: DPO, IPO or SimPO on ranked answers.

    deepspeed --module step2_dpo.train --config configs/quickstart/step2_dpo.yaml [key=value ...]

All answers of a prompt are in one forward; the loss is the mean over the prompts of the whole optimizer step of the
mean over one prompt's pairs. Before the first step the policy must equal its reference to the model's precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from step2_dpo.config import DPOConfig
from step2_dpo.heldout import evaluate
from step2_dpo.loss import answer_lengths, pair_metrics, prompt_losses
from step2_dpo.reference import Reference, RowNumbers, answer_logprobs, check_reference, make_references
from tristage import dist
from tristage.batches import PreferenceBatch
from tristage.checkpoint import load_checkpoint
from tristage.config import BatchPlan, load_config
from tristage.data.collate import collate_ranking, pick
from tristage.data.sets import fingerprint, load_sets
from tristage.data.store import Rows
from tristage.engine import FORWARD_TOLERANCE, StepReport, backward_mean, optimizer_step, train_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.flops import Work
from tristage.models.saving import save_model
from tristage.training import run, setup
from tristage.training.eval_command import EvalCommand
from tristage.training.health import Health, row_ids
from tristage.training.metrics import Averages, RunLog, Stopwatch
from tristage.training.profiler import profiled
from tristage.training.speed import Speed

NAMES = {"sigmoid": "DPO", "ipo": "IPO", "ipo_sum": "IPO", "simpo": "SimPO"}


def main(argv: list[str]) -> None:
    settings = load_config(DPOConfig, argv)
    plan, config, tokenizer = setup.check_training(settings)
    reference_config = check_reference(settings, plan, tokenizer)
    sets = load_sets(settings, tokenizer)
    train(settings, plan, config, reference_config, tokenizer, *sets)


def train(
    settings: DPOConfig,
    plan: BatchPlan,
    config: dict[str, Any],
    reference_config: dict[str, Any] | None,
    tokenizer: Any,
    rows: Rows,
    heldout: Rows,
) -> None:
    """Train from the latest checkpoint, or from the start, to the last step; export to output/final."""
    device, found = run.start(settings, fingerprint([rows, heldout]))
    output = Path(settings.output)
    dist.print0(f"step 2, {NAMES[settings.loss]}: {plan}")
    references = make_references(settings, reference_config, tokenizer, rows, heldout, device)
    model = setup.load_trained(load_causal_lm, settings, config, tokenizer)
    loader = setup.train_loader(settings, rows.lengths, plan)
    engine = train_engine(model, config, settings.optimizer, loader.total_steps)
    first, health = load_checkpoint(settings, found, {"model": engine}), Health.restored(settings, found)
    watch, speed = Stopwatch(device), Speed(settings, device)

    def collated(step: int) -> list[tuple[RowNumbers, PreferenceBatch]]:
        micro_batches = loader.step_rows(step - 1)
        return [(micro, collate_ranking(pick(rows, micro), tokenizer.pad_token_id)) for micro in micro_batches]

    with RunLog.of(settings, NAMES[settings.loss], loader.total_steps, first) as log:
        saver = run.Saver(settings, device, {"model": engine}, health, log)
        command = EvalCommand(settings, engine, tokenizer, device, log)
        if first == 0:
            check_start(engine, references.train, collated(1), settings, device)
            log.write(0, "heldout", evaluate(engine, references.heldout, heldout, settings, tokenizer, device))
        for step in profiled(range(first + 1, loader.total_steps + 1), settings):
            with watch("step"):
                micro_batches = collated(step)
                metrics, report = dpo_step(engine, references.train, micro_batches, settings, device)
            health.after_step(step, report, row_ids(rows, loader.step_rows(step - 1)))
            work = [Work.of(batch.attention_mask, batch.answer_mask) for _, batch in micro_batches]
            seconds = watch.take()
            live = settings.reference is not None and not settings.precompute_reference
            log.write(step, "train", metrics | seconds | speed.step(work, seconds, reference=live))
            if saver.evaluates(step):
                log.write(step, "heldout", evaluate(engine, references.heldout, heldout, settings, tokenizer, device))
            command.after(step)
            saver.after(step)
    health.check_finished()
    run.finish(settings, save_model(engine, tokenizer, output / "final"))
    dist.print0(f"step 2 is done: {output / 'final'}")


def dpo_step(
    engine: Any,
    reference: Reference,
    micro_batches: list[tuple[RowNumbers, PreferenceBatch]],
    settings: DPOConfig,
    device: torch.device,
) -> tuple[dict[str, float], StepReport]:
    """One optimizer step over this rank's micro-batches; metrics over all ranks. A collective."""
    engine.train()
    prompts = sum(int(batch.is_real.sum()) for _, batch in micro_batches)
    global_prompts = dist.sum_over_ranks({"prompts": prompts}, device)["prompts"]
    averages, step_losses = Averages(), []
    for micro, batch in micro_batches:
        batch = batch.to(device)
        ref_logprobs = reference(micro, batch)
        logprobs = answer_logprobs(engine, batch)
        losses = prompt_losses(logprobs, ref_logprobs, batch, settings)
        loss_sum = torch.where(batch.is_real, losses, 0.0).sum()
        step_losses.append(backward_mean(engine, loss_sum, global_prompts))
        averages.add("dpo/loss", loss_sum.detach(), batch.is_real.sum())
        pair_metrics(averages, logprobs.detach(), ref_logprobs, batch, settings)
    report = optimizer_step(engine, step_losses)
    return averages.reduce(device) | report.metrics(), report


@torch.no_grad()
def check_start(
    engine: Any,
    reference: Reference,
    micro_batches: list[tuple[RowNumbers, PreferenceBatch]],
    settings: DPOConfig,
    device: torch.device,
) -> None:
    """Before the first step, where the reference is the policy's start: every implicit reward, and so every margin, is
    0 in training's own forward. Dropout left on, or log-probabilities of other weights or rows, fail here.

    The rounding of an answer's tokens adds up like the square root of their number. A collective.

    Raises:
        RuntimeError: on every rank, with the number.
    """
    if settings.reference is None or settings.reference_path != settings.model:
        return
    engine.train()
    micro, batch = micro_batches[0]
    batch = batch.to(device)
    ref_logprobs = reference(micro, batch)
    assert ref_logprobs is not None
    log_ratios = (answer_logprobs(engine, batch) - ref_logprobs).abs() / answer_lengths(batch).sqrt()
    real = batch.is_real[batch.prompt_index]
    # nan compares as small, so it counts as infinite
    largest = float(log_ratios.nan_to_num(nan=torch.inf).masked_fill(~real, 0.0).max())
    worst = dist.max_over_ranks({"log_ratio": largest}, device)["log_ratio"]
    tolerance = FORWARD_TOLERANCE[settings.precision]
    if worst > tolerance:
        raise RuntimeError(
            f"before the first step the log-ratio of an answer to the reference is {worst:.2e} per square root "
            f"of its length, and all margins should be 0 (tolerance {tolerance}): policy and reference start from "
            f"{settings.model} but their forwards differ; report this with the model's config.json"
        )


if __name__ == "__main__":
    run.entry_point(main)
