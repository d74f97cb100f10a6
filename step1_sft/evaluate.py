"""Held-out loss and perplexity of a policy, per answer token.

    python -m step1_sft.evaluate --config configs/quickstart/step1_sft.yaml model=OUT/final
"""

from __future__ import annotations

import math
from typing import Any

import torch

from step1_sft.config import SFTConfig
from tristage import dist
from tristage.config import load_config
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import evaluation_rows
from tristage.data.sets import load_heldout
from tristage.data.store import Rows
from tristage.engine import frozen_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.training import run, setup
from tristage.training.metrics import Averages


@torch.no_grad()
def evaluate(engine: Any, rows: Rows, micro_batch: int, tokenizer: Any, device: torch.device) -> dict[str, float]:
    """{"sft/loss", "sft/perplexity"} over every answer token of `rows` once, over all ranks. A collective."""
    engine.eval()
    averages = Averages()
    for micro in evaluation_rows(rows.lengths, micro_batch, dist.world_size(), dist.rank()):
        batch = collate_sft(pick(rows, micro), tokenizer.pad_token_id).to(device)
        logprobs, _ = engine(batch.input_ids, batch.attention_mask, batch.loss_mask)
        averages.add("sft/loss", -logprobs.sum(), batch.loss_mask[:, 1:].sum())
    loss = averages.reduce(device)["sft/loss"]
    return {"sft/loss": loss, "sft/perplexity": math.exp(min(loss, 700.0))}


def main(argv: list[str]) -> None:
    settings = load_config(SFTConfig, argv)
    _, config, tokenizer = setup.check_training(settings)
    heldout = load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    model = load_causal_lm(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    metrics = evaluate(frozen_engine(model, config), heldout, settings.micro_batch, tokenizer, device)
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)
