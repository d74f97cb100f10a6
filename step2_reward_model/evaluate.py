"""Held-out accuracy and margins of a reward model, beside what "the longer answer wins" would reach.

    python -m step2_reward_model.evaluate --config configs/quickstart/step2_reward_model.yaml model=OUT/final
"""

from __future__ import annotations

from typing import Any

import torch

from step2_reward_model.config import RewardModelConfig
from tristage import dist, run
from tristage.algo.losses import ranking_loss, ranking_pairs
from tristage.batches import PreferenceBatch
from tristage.config import load_config
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_rows
from tristage.data.sets import load_sets
from tristage.data.store import Rows
from tristage.engine import DTYPES, frozen_engine
from tristage.metrics import Averages
from tristage.models import last_token_scores, load_reward_model


@torch.no_grad()
def evaluate(
    engine: Any, rows: Rows, settings: RewardModelConfig, tokenizer: Any, device: torch.device
) -> dict[str, float]:
    """Loss, accuracy, margin and length baseline over every pair of `rows` once, over all ranks. A collective."""
    engine.eval()
    averages = Averages()
    for micro in evaluation_rows(rows.lengths, settings.micro_batch, dist.world_size(), dist.rank()):
        batch = collate_ranking(pick(rows, micro), tokenizer.pad_token_id).to(device)
        scores = last_token_scores(engine(batch.input_ids, batch.attention_mask), batch.attention_mask)
        losses = ranking_loss(scores, batch.prompt_index, batch.ranks, form=settings.loss)
        averages.add("reward_model/loss", torch.where(batch.is_real, losses, 0.0).sum(), batch.is_real.sum())
        pair_metrics(averages, scores, batch)
    return averages.reduce(device)


def pair_metrics(averages: Averages, scores: torch.Tensor, batch: PreferenceBatch) -> None:
    """Add what a batch's answers `scores` [N] say of its pairs (a better and a worse answer of one prompt).

    reward_model/accuracy: share of pairs whose better answer scores higher; .../margin: how much higher, on
    average; .../length_baseline: share whose better answer is the longer one (a tie counts half); .../score: mean
    score of an answer.
    """
    better, worse = ranking_pairs(batch.prompt_index, batch.ranks)
    real = batch.is_real[batch.prompt_index[better]]
    better, worse = better[real], worse[real]
    margins = scores[better] - scores[worse]
    lengths = batch.attention_mask.sum(dim=1)
    longer = (lengths[better] > lengths[worse]).float() + 0.5 * (lengths[better] == lengths[worse]).float()
    averages.add("reward_model/accuracy", (margins > 0).float().sum(), len(better))
    averages.add("reward_model/margin", margins.sum(), len(better))
    averages.add("reward_model/length_baseline", longer.sum(), len(better))
    answers = batch.is_real[batch.prompt_index]
    averages.add("reward_model/score", scores[answers].sum(), answers.sum())


def main(argv: list[str]) -> None:
    settings = load_config(RewardModelConfig, argv)
    _, config, tokenizer = run.check_training(settings)
    _, heldout = load_sets(settings, tokenizer)
    device = dist.init(settings.device)
    model = load_reward_model(settings.model, tokenizer, dtype=DTYPES[settings.precision], engine_config=config)
    metrics = evaluate(frozen_engine(model, config), heldout, settings, tokenizer, device)
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)
