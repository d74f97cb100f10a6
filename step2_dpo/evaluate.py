"""Held-out loss, accuracy and margins of a policy's implicit rewards, beside what "the longer answer wins" would reach.

    python -m step2_dpo.evaluate --config configs/quickstart/step2_dpo.yaml model=OUT/final reference.model=START
"""

from __future__ import annotations

from typing import Any

import torch

from step2_dpo.config import DPOConfig
from step2_dpo.reference import Reference, answer_logprobs, ask_reference, check_reference, no_reference
from tristage import dist
from tristage.algo.losses import dpo_loss, mean_by_prompt, ranking_pairs, simpo_loss
from tristage.batches import PreferenceBatch
from tristage.config import load_config
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_rows
from tristage.data.sets import load_heldout
from tristage.data.store import Rows
from tristage.engine import frozen_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.training import run, setup
from tristage.training.metrics import Averages

MEANS = ("ipo", "simpo")  # losses that compare means per token


def prompt_losses(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, batch: PreferenceBatch, settings: DPOConfig
) -> torch.Tensor:
    """logprobs [N], ref_logprobs [N] -> [prompts]: the mean of the loss over each prompt's untied pairs; 0 without any.

    With two answers a prompt this is the loss of its one pair.
    """
    better, worse = ranking_pairs(batch.prompt_index, batch.ranks)
    if settings.loss in MEANS:
        logprobs = logprobs / answer_lengths(batch)
        ref_logprobs = None if ref_logprobs is None else ref_logprobs / answer_lengths(batch)
    if settings.loss == "simpo":
        assert settings.gamma is not None
        losses = simpo_loss(logprobs[better], logprobs[worse], settings.beta, settings.gamma)
    else:
        assert ref_logprobs is not None
        losses = dpo_loss(
            logprobs[better],
            logprobs[worse],
            ref_logprobs[better],
            ref_logprobs[worse],
            settings.beta,
            settings.label_smoothing,
            form="sigmoid" if settings.loss == "sigmoid" else "ipo",
        )
    return mean_by_prompt(losses, batch.prompt_index[better], batch.prompt_index)


def implicit_rewards(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, batch: PreferenceBatch, settings: DPOConfig
) -> torch.Tensor:
    """[N]: beta * log(policy / reference) of each answer, without a reference beta * log(policy); a mean per token
    where the loss compares those."""
    rewards = settings.beta * (logprobs if ref_logprobs is None else logprobs - ref_logprobs)
    return rewards / answer_lengths(batch) if settings.loss in MEANS else rewards


def answer_lengths(batch: PreferenceBatch) -> torch.Tensor:
    """[N]: tokens of each answer, its EOS included; 1 for the empty answer of a filler."""
    return batch.answer_mask.sum(dim=1).clamp(min=1)


@torch.no_grad()
def evaluate(
    engine: Any, reference: Reference, rows: Rows, settings: DPOConfig, tokenizer: Any, device: torch.device
) -> dict[str, float]:
    """Loss over every prompt of `rows` once and pair_metrics over their pairs, over all ranks. A collective."""
    engine.eval()
    averages = Averages()
    for micro in evaluation_rows(rows.lengths, settings.micro_batch, dist.world_size(), dist.rank()):
        batch = collate_ranking(pick(rows, micro), tokenizer.pad_token_id).to(device)
        logprobs, ref_logprobs = answer_logprobs(engine, batch), reference(micro, batch)
        losses = prompt_losses(logprobs, ref_logprobs, batch, settings)
        averages.add("dpo/loss", torch.where(batch.is_real, losses, 0.0).sum(), batch.is_real.sum())
        pair_metrics(averages, logprobs, ref_logprobs, batch, settings)
    return averages.reduce(device)


def pair_metrics(
    averages: Averages,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    batch: PreferenceBatch,
    settings: DPOConfig,
) -> None:
    """Add what the answers' log-probabilities [N] say of a batch's pairs (a better and a worse answer of one prompt).

    dpo/accuracy: share of pairs whose better answer has the higher implicit reward; .../length_baseline: share whose
    better answer is the longer one (a tie counts half in both: an untouched policy knows nothing); .../margin: how
    much higher the reward is, on average; .../chosen_reward, .../rejected_reward, .../chosen_logprob and
    .../rejected_logprob: means of the better and of the worse answers.
    """
    better, worse = ranking_pairs(batch.prompt_index, batch.ranks)
    real = batch.is_real[batch.prompt_index[better]]
    better, worse = better[real], worse[real]
    rewards, lengths = implicit_rewards(logprobs, ref_logprobs, batch, settings), answer_lengths(batch)
    found = {
        "accuracy": _wins(rewards[better], rewards[worse]),
        "margin": rewards[better] - rewards[worse],
        "chosen_reward": rewards[better],
        "rejected_reward": rewards[worse],
        "chosen_logprob": logprobs[better],
        "rejected_logprob": logprobs[worse],
        "length_baseline": _wins(lengths[better], lengths[worse]),
    }
    for name, values in found.items():
        averages.add(f"dpo/{name}", values.sum(), len(better))


def _wins(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    return (better > worse).float() + 0.5 * (better == worse).float()


def main(argv: list[str]) -> None:
    settings = load_config(DPOConfig, argv)
    plan, config, tokenizer = setup.check_training(settings)
    if settings.reference is not None and settings.reference_path == settings.model:
        raise UserError(
            f"{settings.file}: key `reference.model`: is `model` itself, so all margins would be 0; "
            "give the model that training started from"
        )
    reference_config = check_reference(settings, plan, tokenizer)
    heldout = load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    reference = no_reference if reference_config is None else ask_reference(settings, reference_config, tokenizer)
    model = load_causal_lm(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    metrics = evaluate(frozen_engine(model, config), reference, heldout, settings, tokenizer, device)
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)
