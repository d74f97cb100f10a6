"""Evaluates a reward model on held-out rows: during training and on its own (evaluate.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from step2_reward_model.config import RewardModelConfig
from step2_reward_model.loss import compare, pair_options, prompt_losses
from step2_reward_model.measures import Measurements
from tristage import dist
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_batches
from tristage.data.store import Rows
from tristage.models.reward_model import last_token_scores


@torch.no_grad()
def evaluate(
    engine: Any, rows: Rows, settings: RewardModelConfig, tokenizer: Any, device: torch.device
) -> Measurements:
    """Every prompt, pair and answer of `rows` once, over all ranks; the same on every rank. A collective."""
    engine.eval()
    collected: dict[str, list[torch.Tensor]] = {}
    for micro in evaluation_batches(rows.lengths, settings.micro_batch, dist.world_size(), dist.rank(), device.type):
        items = pick(rows, micro)
        batch = collate_ranking(items, tokenizer.pad_token_id).to(device)
        values = engine(batch.input_ids, batch.attention_mask)
        scores = last_token_scores(values, batch.attention_mask)
        margins, length_gaps = compare(scores, batch)
        numbers = {
            "losses": prompt_losses(values, batch, settings.loss, **pair_options(settings))[batch.is_real],
            "margins": margins,
            "length_gaps": length_gaps,
            "scores": scores[batch.is_real[batch.prompt_index]],
            "lengths": torch.tensor([len(a.ids) - a.prompt_length for item in items if item for a in item[0]]),
        }
        for name, some in numbers.items():
            collected.setdefault(name, []).append(some.double().cpu())
    parts = dist.gather_objects({name: torch.cat(several).numpy() for name, several in collected.items()})
    everything = {name: np.concatenate([part[name] for part in parts]) for name in collected}
    return Measurements(**everything, scale=engine.module.score_scale)
