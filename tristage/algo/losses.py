"""Losses of the supervised step, of the reward model and of learning from preferences without one, unreduced.

The caller sums and divides, once.

Letters: B rows, T positions, V vocabulary, N answers of all prompts laid flat, P prompts, M ordered pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .logprobs import token_logprobs
from .masking import at_least_float32, masked_mean

RankingForm = Literal["pairs", "best"]
DPOForm = Literal["sigmoid", "ipo"]


def lm_loss(logits: Tensor, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """logits [B,T,V], ids [B,T], loss_mask [B,T] -> [B,T-1] float32: -log p(token), 0 where not trained on.

    loss_mask[b,t] says that token t is trained on; position t-1 predicts it and its loss is result[b,t-1].
    Nothing predicts the first token, whatever its mask. Only logits that predict a trained token are read.
    """
    rows, positions = loss_mask[:, 1:].nonzero(as_tuple=True)
    nll = -token_logprobs(logits[rows, positions], ids[rows, positions + 1])  # the one place that shifts
    return nll.new_zeros(ids.shape[0], ids.shape[1] - 1).index_put((rows, positions), nll)


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """chosen [B], rejected [B], margin [B] -> [B]: -log sigmoid(chosen - rejected - margin).

    `label_smoothing` is the probability e that the label is the wrong way round: (1-e) * -log sigmoid(gap)
    + e * -log sigmoid(-gap), with the margin inside the gap in both terms.
    """
    gap = at_least_float32(chosen) - at_least_float32(rejected)  # Bradley-Terry; InstructGPT eq. 1 with K = 2
    if margin is not None:
        gap = gap - margin  # Llama 2 (Touvron et al. 2023), eq. 2
    # Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"), on scores.
    return -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)


def ranking_pairs(prompt_index: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """prompt_index long [N], ranks [N] -> (better long [M], worse long [M]): indices of all untied pairs.

    Prompts [0, 0, 0, 1, 1] with ranks [0, 1, 1, 2, 0] -> better [0, 0, 4], worse [1, 2, 3].
    """
    same_prompt = prompt_index.unsqueeze(1) == prompt_index.unsqueeze(0)  # [N,N]
    beats = ranks.unsqueeze(1) < ranks.unsqueeze(0)  # [N,N], rank 0 is the best
    better, worse = (same_prompt & beats).nonzero(as_tuple=True)
    return better, worse


def ranking_loss(scores: Tensor, prompt_index: Tensor, ranks: Tensor, form: RankingForm = "pairs") -> Tensor:
    """scores [N], prompt_index long [N], ranks [N] -> [P]: one loss a prompt, from the ranks of its answers.

    The values of prompt_index are 0..P-1, each present; prompts may have different numbers of answers. The
    lowest rank is the best, 0 as a rule; ties are allowed.
      "pairs": mean of -log sigmoid(better - worse) over the untied pairs (InstructGPT, Ouyang et al. 2022,
               eq. 1); 0 for a prompt without one.
      "best":  cross-entropy of the best answer among the prompt's answers; of several best, the mean.
    """
    scores = at_least_float32(scores)
    prompts = torch.arange(int(prompt_index.max()) + 1, device=prompt_index.device)  # [P]
    # Sums over a prompt go through a [P,N] or [P,M] membership matrix: index_add on a GPU adds in an order
    # that differs from run to run, and a resumed run must repeat the first one bit for bit.
    if form == "pairs":
        better, worse = ranking_pairs(prompt_index, ranks)
        of_prompt = prompt_index[better] == prompts.unsqueeze(1)  # [P,M]
        losses = pairwise_loss(scores[better], scores[worse])
        return masked_mean(losses.expand_as(of_prompt), of_prompt, dim=1)
    if form == "best":
        of_prompt = prompt_index == prompts.unsqueeze(1)  # [P,N]
        best_ranks = torch.where(of_prompt, ranks, torch.inf).amin(dim=1, keepdim=True)  # [P,1]
        logprobs = torch.where(of_prompt, scores, -torch.inf).log_softmax(dim=1)  # [P,N]
        return -masked_mean(logprobs, of_prompt & (ranks == best_ranks), dim=1)
    raise ValueError(f"ranking form must be 'pairs' or 'best', got {form!r}")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    form: DPOForm = "sigmoid",
) -> Tensor:
    """Log-probabilities of whole answers, each [B] -> [B]: one loss a pair.

    With gap = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected):
      "sigmoid": -log sigmoid(beta * gap)    (Rafailov et al. 2023, "Direct Preference Optimization", eq. 7);
                 `label_smoothing` as in pairwise_loss
      "ipo":     (gap - 1 / (2 beta))^2      (Azar et al. 2023, "A General Theoretical Paradigm", eq. 17)
    """
    chosen = at_least_float32(policy_chosen) - at_least_float32(ref_chosen)
    rejected = at_least_float32(policy_rejected) - at_least_float32(ref_rejected)
    if form == "sigmoid":
        return pairwise_loss(beta * chosen, beta * rejected, label_smoothing=label_smoothing)
    if form == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    raise ValueError(f"DPO form must be 'sigmoid' or 'ipo', got {form!r}")


def simpo_loss(policy_chosen_mean: Tensor, policy_rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """Mean log-probability a token of each answer, [B], [B] -> [B]: -log sigmoid(beta * (chosen - rejected) - gamma).

    No reference; `gamma` is the margin to reach (Meng et al. 2024, "SimPO", eq. 6).
    """
    chosen, rejected = at_least_float32(policy_chosen_mean), at_least_float32(policy_rejected_mean)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
