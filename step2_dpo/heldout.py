"""Loss and pair metrics on held-out rows: during training and on their own (evaluate.py)."""

from __future__ import annotations

from typing import Any

import torch

from step2_dpo.config import DPOConfig
from step2_dpo.loss import pair_metrics, prompt_losses
from step2_dpo.reference import Reference, answer_logprobs
from tristage import dist
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_batches
from tristage.data.store import Rows
from tristage.training.metrics import Averages


@torch.no_grad()
def evaluate(
    engine: Any, reference: Reference, rows: Rows, settings: DPOConfig, tokenizer: Any, device: torch.device
) -> dict[str, float]:
    """Loss over every prompt of `rows` once and pair_metrics over their pairs, over all ranks. A collective."""
    engine.eval()
    averages = Averages()
    for micro in evaluation_batches(rows.lengths, settings.micro_batch, dist.world_size(), dist.rank(), device.type):
        batch = collate_ranking(pick(rows, micro), tokenizer.pad_token_id).to(device)
        logprobs, ref_logprobs = answer_logprobs(engine, batch), reference(micro, batch)
        losses = prompt_losses(logprobs, ref_logprobs, batch, settings)
        averages.add("dpo/loss", torch.where(batch.is_real, losses, 0.0).sum(), batch.is_real.sum())
        pair_metrics(averages, logprobs, ref_logprobs, batch, settings)
    pairs = dist.sum_over_ranks({"dpo/pairs": averages.sums["dpo/accuracy/weight"]}, device)
    return averages.reduce(device) | pairs
