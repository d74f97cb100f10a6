"""From a reward model's values to the loss of each prompt, and metrics of pairs."""

from __future__ import annotations

from typing import Any

import torch

from step2_reward_model.config import RewardModelConfig
from tristage.algo.losses import ranking_loss, ranking_pairs, token_ranking_loss
from tristage.batches import PreferenceBatch
from tristage.models.reward_model import last_token_scores
from tristage.training.metrics import Averages


def pair_options(settings: RewardModelConfig) -> dict[str, float]:
    """Options of `loss: pairs` and `loss: tokens`; all 0 for the others."""
    return {
        "margin": settings.margin,
        "label_smoothing": settings.label_smoothing,
        "centering": settings.centering,
    }


def prompt_losses(values: torch.Tensor, batch: PreferenceBatch, form: Any, **options: float) -> torch.Tensor:
    """values [N,T] -> [prompts]: the loss that the setting `loss` names, with `pair_options`."""
    if form == "tokens":
        return token_ranking_loss(
            values, batch.input_ids, batch.attention_mask, batch.prompt_index, batch.ranks, **options
        )
    scores = last_token_scores(values, batch.attention_mask)
    return ranking_loss(scores, batch.prompt_index, batch.ranks, form, **options)


def compare(scores: torch.Tensor, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [N] -> (score, tokens) [M] of the better answer minus those of the worse, of all pairs but fillers'."""
    better, worse = ranking_pairs(batch.prompt_index, batch.ranks)
    is_real = batch.is_real[batch.prompt_index[better]]
    better, worse = better[is_real], worse[is_real]
    lengths = batch.attention_mask.sum(dim=1)  # the prompt is the same in both
    return scores[better] - scores[worse], lengths[better] - lengths[worse]


def pair_metrics(averages: Averages, scores: torch.Tensor, batch: PreferenceBatch) -> None:
    """Add metrics of a training batch's pairs from its answers' `scores` [N].

    reward_model/accuracy: share of pairs whose better answer scores higher; .../margin: how much higher, on
    average; .../length_baseline: share whose better answer is the longer one (a tie counts half); .../score: mean
    score of an answer.
    """
    margins, length_gaps = compare(scores, batch)
    longer = (length_gaps > 0).float() + 0.5 * (length_gaps == 0).float()
    averages.add("reward_model/accuracy", (margins > 0).float().sum(), len(margins))
    averages.add("reward_model/margin", margins.sum(), len(margins))
    averages.add("reward_model/length_baseline", longer.sum(), len(margins))
    answers = batch.is_real[batch.prompt_index]
    averages.add("reward_model/score", scores[answers].sum(), answers.sum())
