"""Step 1: supervised fine-tuning of a pretrained language model on demonstrations.

    deepspeed --module step1_sft.train --config configs/quickstart/step1_sft.yaml [key=value ...]

The loss is the mean over answer tokens (their EOS included, the prompt's left out) of -log p(token), where the
mean is over the whole optimizer step: all ranks, all micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from step1_sft.config import SFTConfig
from step1_sft.heldout import evaluate
from tristage import dist
from tristage.batches import SFTBatch
from tristage.checkpoint import load_checkpoint
from tristage.config import BatchPlan, load_config
from tristage.data.collate import collate_packed, collate_sft, pick
from tristage.data.packing import PackedRows
from tristage.data.sets import fingerprint, load_sets
from tristage.data.store import Rows
from tristage.data.tokenize import Example
from tristage.engine import FORWARD_TOLERANCE, StepReport, backward_mean, optimizer_step, train_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.flops import Work
from tristage.models.loading import check_packable
from tristage.models.saving import save_model
from tristage.training import run, setup
from tristage.training.eval_command import EvalCommand
from tristage.training.health import Health, row_ids
from tristage.training.metrics import Averages, RunLog, Stopwatch
from tristage.training.profiler import profiled
from tristage.training.speed import Speed


def main(argv: list[str]) -> None:
    settings = load_config(SFTConfig, argv)
    plan, config, tokenizer = setup.check_training(settings)
    if settings.packing:
        check_packable(settings.model, settings.attention, settings.micro_batch, settings.trust_remote_code)
    sets = load_sets(settings, tokenizer)
    train(settings, plan, config, tokenizer, *sets)


def train(
    settings: SFTConfig, plan: BatchPlan, config: dict[str, Any], tokenizer: Any, rows: Rows, heldout: Rows
) -> None:
    """Train from the latest checkpoint, or from the start, to the last step; export to output/final."""
    device, found = run.start(settings, fingerprint([rows, heldout]))
    output = Path(settings.output)
    dist.print0(f"step 1, supervised fine-tuning: {plan}")
    model = setup.load_trained(load_causal_lm, settings, config, tokenizer)
    collate: Any = collate_packed if settings.packing else collate_sft
    trained = PackedRows(rows, settings.max_tokens, settings.seed) if settings.packing else rows
    loader = setup.train_loader(settings, trained.lengths, plan)
    engine = train_engine(model, config, settings.optimizer, loader.total_steps)
    if settings.packing:
        check_packing(engine, trained[0], settings, tokenizer.pad_token_id, device)
    first, health = load_checkpoint(settings, found, {"model": engine}), Health.restored(settings, found)
    watch, speed = Stopwatch(device), Speed(settings, device)
    with RunLog.of(settings, "sft", loader.total_steps, first) as log:
        saver = run.Saver(settings, device, {"model": engine}, health, log)
        command = EvalCommand(settings, engine, tokenizer, device, log)
        if first == 0:
            log.write(0, "heldout", evaluate(engine, heldout, settings.micro_batch, tokenizer, device))
        for step in profiled(range(first + 1, loader.total_steps + 1), settings):
            with watch("step"):
                micro_batches = [
                    collate(pick(trained, micro), tokenizer.pad_token_id) for micro in loader.step_rows(step - 1)
                ]
                metrics, report = sft_step(engine, micro_batches, device)
            health.after_step(step, report, row_ids(trained, loader.step_rows(step - 1)))
            work = [Work.of(batch.attention_mask, batch.loss_mask, batch.position_ids) for batch in micro_batches]
            seconds = watch.take()
            log.write(step, "train", metrics | seconds | speed.step(work, seconds))
            if saver.evaluates(step):
                log.write(step, "heldout", evaluate(engine, heldout, settings.micro_batch, tokenizer, device))
            command.after(step)
            saver.after(step)
    health.check_finished()
    run.finish(settings, save_model(engine, tokenizer, output / "final"))
    dist.print0(f"step 1 is done: {output / 'final'}")


@torch.no_grad()
def check_packing(engine: Any, pack: list[Example], settings: SFTConfig, pad_id: int, device: torch.device) -> None:
    """Check that packed examples have the log-probabilities that they have alone. A collective. Raises UserError."""
    engine.eval()
    packed_and_alone = []
    for batch in (collate_packed([pack], pad_id).to(device), collate_sft(pack, pad_id).to(device)):
        logprobs, _ = engine(batch.input_ids, batch.attention_mask, batch.loss_mask, position_ids=batch.position_ids)
        packed_and_alone.append(logprobs[batch.loss_mask[:, 1:]])  # row by row: the same tokens in the same order
    difference = float((packed_and_alone[0] - packed_and_alone[1]).abs().mean())
    if not difference < FORWARD_TOLERANCE[settings.precision]:
        raise UserError(
            f"{settings.file}: key `packing`: log-probabilities of packed rows differ by {difference:.2g} from those "
            "of the rows alone: this model attends across rows; set `packing: false`"
        )


def sft_step(
    engine: Any, micro_batches: list[SFTBatch], device: torch.device
) -> tuple[dict[str, float], StepReport]:
    """One optimizer step over this rank's micro-batches; metrics over all ranks. A collective."""
    engine.train()
    tokens = sum(int(batch.loss_mask[:, 1:].sum()) for batch in micro_batches)
    global_tokens = dist.sum_over_ranks({"tokens": tokens}, device)["tokens"]
    averages, losses = Averages(), []
    for batch in micro_batches:
        batch = batch.to(device)
        logprobs, _ = engine(
            batch.input_ids, batch.attention_mask, batch.loss_mask, position_ids=batch.position_ids
        )
        loss_sum = -logprobs.sum()  # logprobs are 0 outside the loss mask
        losses.append(backward_mean(engine, loss_sum, global_tokens))
        averages.add("sft/loss", loss_sum.detach(), batch.loss_mask[:, 1:].sum())
    report = optimizer_step(engine, losses)
    return averages.reduce(device) | {"sft/tokens": global_tokens} | report.metrics(), report


if __name__ == "__main__":
    run.entry_point(main)
