"""How often a reward model ranks rightly, how sure that is, and how much of it is length.

    python -m step2_reward_model.evaluate --config configs/quickstart/step2_reward_model.yaml model=OUT/final

for the config's held-out rows, or `data.heldout=...` for others; `--interactive` takes a prompt and answers typed in.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from rich.console import Console

from step2_reward_model.config import RewardModelConfig
from step2_reward_model.interactive import check_alone, score_typed
from step2_reward_model.measures import Measurements, length_warning
from step2_reward_model.report import tables
from tristage import dist
from tristage.algo.losses import ranking_loss, ranking_pairs, token_ranking_loss
from tristage.batches import PreferenceBatch
from tristage.config import load_config
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_rows
from tristage.data.sets import load_heldout
from tristage.data.store import Rows
from tristage.engine import frozen_engine
from tristage.models.reward_model import last_token_scores, load_reward_model
from tristage.training import run, setup
from tristage.training.metrics import Averages


@torch.no_grad()
def evaluate(
    engine: Any, rows: Rows, settings: RewardModelConfig, tokenizer: Any, device: torch.device
) -> Measurements:
    """Every prompt, pair and answer of `rows` once, over all ranks; the same on every rank. A collective."""
    engine.eval()
    found: dict[str, list[torch.Tensor]] = {}
    for micro in evaluation_rows(rows.lengths, settings.micro_batch, dist.world_size(), dist.rank()):
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
            found.setdefault(name, []).append(some.double().cpu())
    parts = dist.gather_objects({name: torch.cat(several).numpy() for name, several in found.items()})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in found}
    return Measurements(**whole, scale=engine.module.score_scale)


def pair_options(settings: RewardModelConfig) -> dict[str, float]:
    """What `loss: pairs` and `loss: tokens` may add; all 0 for the others."""
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
    """Add what a training batch's answers `scores` [N] say of its pairs.

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


def main(argv: list[str]) -> None:
    interactive = "--interactive" in argv
    settings = load_config(RewardModelConfig, [word for word in argv if word != "--interactive"])
    _, config, tokenizer = setup.check_training(settings)
    heldout = None if interactive else load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    if interactive:
        check_alone()
    model = load_reward_model(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    engine = frozen_engine(model, config)
    if heldout is None:
        score_typed(engine, settings, tokenizer, device, iter(sys.stdin))
    else:
        show(evaluate(engine, heldout, settings, tokenizer, device))


def show(measured: Measurements) -> None:
    """Print the tables, and the warning where one is due, on rank 0."""
    if dist.is_main():
        console = Console(width=None if sys.stdout.isatty() else 100)
        for table in tables(measured):
            console.print(table)
    if warning := length_warning(measured):
        dist.print0(warning)


if __name__ == "__main__":
    run.entry_point(main)
