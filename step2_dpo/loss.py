"""From answers' log-probabilities to the loss of each prompt, implicit rewards, and metrics of pairs."""

from __future__ import annotations

import torch

from step2_dpo.config import DPOConfig
from tristage.algo.losses import dpo_loss, mean_by_prompt, ranking_pairs, simpo_loss
from tristage.batches import PreferenceBatch
from tristage.training.metrics import Averages

MEANS = ("ipo", "simpo")  # losses that compare means per token


def prompt_losses(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, batch: PreferenceBatch, settings: DPOConfig
) -> torch.Tensor:
    """logprobs [N], ref_logprobs [N] -> [prompts]: the mean of the loss over each prompt's untied pairs; 0 without any.

    With two answers per prompt this is the loss of its one pair.
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
    if the loss compares those."""
    rewards = settings.beta * (logprobs if ref_logprobs is None else logprobs - ref_logprobs)
    return rewards / answer_lengths(batch) if settings.loss in MEANS else rewards


def answer_lengths(batch: PreferenceBatch) -> torch.Tensor:
    """[N]: tokens of each answer, its EOS included; 1 for the empty answer of a filler."""
    return batch.answer_mask.sum(dim=1).clamp(min=1)


def pair_metrics(
    averages: Averages,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    batch: PreferenceBatch,
    settings: DPOConfig,
) -> None:
    """Add metrics of a batch's pairs (a better and a worse answer of one prompt) from log-probabilities [N].

    dpo/accuracy: share of pairs whose better answer has the higher implicit reward; .../length_baseline: share whose
    better answer is the longer one (a tie counts half in both, so an untrained policy gets 0.5); .../margin: how
    much higher the reward is, on average; .../chosen_reward, .../rejected_reward, .../chosen_logprob and
    .../rejected_logprob: means of the better and of the worse answers.
    """
    better, worse = ranking_pairs(batch.prompt_index, batch.ranks)
    real = batch.is_real[batch.prompt_index[better]]
    better, worse = better[real], worse[real]
    rewards, lengths = implicit_rewards(logprobs, ref_logprobs, batch, settings), answer_lengths(batch)
    metrics = {
        "accuracy": _wins(rewards[better], rewards[worse]),
        "margin": rewards[better] - rewards[worse],
        "chosen_reward": rewards[better],
        "rejected_reward": rewards[worse],
        "chosen_logprob": logprobs[better],
        "rejected_logprob": logprobs[worse],
        "length_baseline": _wins(lengths[better], lengths[worse]),
    }
    for name, values in metrics.items():
        averages.add(f"dpo/{name}", values.sum(), len(better))


def _wins(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    return (better > worse).float() + 0.5 * (better == worse).float()
