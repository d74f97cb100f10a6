"""Held-out loss and perplexity of a policy, per answer token: during training and on its own (evaluate.py)."""

from __future__ import annotations

import math
from typing import Any

import torch

from tristage import dist
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import evaluation_batches
from tristage.data.store import Rows
from tristage.training.metrics import Averages


@torch.no_grad()
def evaluate(engine: Any, rows: Rows, micro_batch: int, tokenizer: Any, device: torch.device) -> dict[str, float]:
    """{"sft/loss", "sft/perplexity"} over every answer token of `rows` once, over all ranks. A collective."""
    engine.eval()
    averages = Averages()
    for micro in evaluation_batches(rows.lengths, micro_batch, dist.world_size(), dist.rank(), device.type):
        batch = collate_sft(pick(rows, micro), tokenizer.pad_token_id).to(device)
        logprobs, _ = engine(batch.input_ids, batch.attention_mask, batch.loss_mask)
        averages.add("sft/loss", -logprobs.sum(), batch.loss_mask[:, 1:].sum())
    loss = averages.reduce(device)["sft/loss"]
    return {"sft/loss": loss, "sft/perplexity": math.exp(min(loss, 700.0))}
