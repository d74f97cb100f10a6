"""Losses of the supervised step, of the reward model and of learning from preferences without one, unreduced.

The caller sums and divides, once.

Letters: B rows, T positions, V vocabulary, N answers of all prompts laid flat, P prompts, M ordered pairs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .logprobs import token_logprobs
from .masking import at_least_float32, masked_mean, zero_masked

RankingForm = Literal["pairs", "best", "elo"]
DPOForm = Literal["sigmoid", "ipo"]
ELO_K_FACTOR, ELO_ROUNDS = 32.0, 20  # the K of club chess; see elo_ratings


def lm_loss(logits: Tensor, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """logits [B,T,V], ids [B,T], loss_mask [B,T] -> [B,T-1] float32: -log p(token), 0 where not trained on.

    loss_mask[b,t] says that token t is trained on; position t-1 predicts it and its loss is result[b,t-1].
    Nothing predicts the first token, whatever its mask. Only logits that predict a trained token are read.
    """
    rows, positions = loss_mask[:, 1:].nonzero(as_tuple=True)
    nll = -token_logprobs(logits[rows, positions], ids[rows, positions + 1])  # position t-1 predicts token t
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


def ranking_loss(
    scores: Tensor,
    prompt_index: Tensor,
    ranks: Tensor,
    form: RankingForm = "pairs",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """scores [N], prompt_index long [N], ranks [N] -> [P]: one loss per prompt, from the ranks of its answers.

    The values of prompt_index are 0..P-1, each present; prompts may have different numbers of answers. The
    lowest rank is the best, 0 as a rule; ties are allowed.
      "pairs": mean of comparison_loss over the untied pairs, as a rule -log sigmoid(better - worse) (InstructGPT,
               Ouyang et al. 2022, eq. 1); 0 for a prompt without one. The three numbers are its options.
      "best":  cross-entropy of the best answer among the prompt's answers; of several best, the mean.
      "elo":   mean over the prompt's answers of (score - elo_ratings)^2.
    """
    scores = at_least_float32(scores)
    if form == "pairs":
        better, worse = ranking_pairs(prompt_index, ranks)
        wanted = margin * (ranks[worse] - ranks[better])
        losses = comparison_loss(scores[better], scores[worse], wanted, label_smoothing, centering)
        return mean_by_prompt(losses, prompt_index[better], prompt_index)
    assert not (margin or label_smoothing or centering), f"margin, label_smoothing and centering are not of {form!r}"
    if form == "best":
        of_prompt = _membership(prompt_index, prompt_index)  # [P,N]
        best_ranks = torch.where(of_prompt, ranks, torch.inf).amin(dim=1, keepdim=True)  # [P,1]
        logprobs = torch.where(of_prompt, scores, -torch.inf).log_softmax(dim=1)  # [P,N]
        return -masked_mean(logprobs, of_prompt & (ranks == best_ranks), dim=1)
    if form == "elo":
        return mean_by_prompt((scores - elo_ratings(prompt_index, ranks)) ** 2, prompt_index, prompt_index)
    raise ValueError(f"ranking form must be 'pairs', 'best' or 'elo', got {form!r}")


def token_ranking_loss(
    values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_index: Tensor,
    ranks: Tensor,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """values [N,T], input_ids [N,T], attention_mask [N,T], prompt_index [N], ranks [N] -> [P]: one loss per prompt.

    As in DeepSpeed-Chat: of a pair, the mean of comparison_loss over the tokens t from the first at which the two rows
    differ to the end of the shorter one (DeepSpeed-Chat: to the longer one's end, over the other's padding). If one is
    the beginning of the other, as when both were cut, their last real tokens are compared. Then the mean over
    the untied pairs of each prompt. Rows are right padded. For example, with EOS 2:
      better 5 6 7 8 2     are compared at t = 3 and 4: before, both have read the same,
      worse  5 6 7 9 4 2   and t = 5 of the worse one has no counterpart
    """
    better, worse = ranking_pairs(prompt_index, ranks)
    real = attention_mask[better] & attention_mask[worse]  # [M,T], to the end of the shorter one
    differ = (input_ids[better] != input_ids[worse]) & real
    compared = real & (differ.long().cumsum(dim=1) > 0)
    prefix = ~compared.any(dim=1, keepdim=True)  # [M,1]
    last = attention_mask.sum(dim=1, keepdim=True) - 1
    ends = at_least_float32(values).gather(1, last)  # [N,1]
    compared = compared | (prefix & (torch.arange(values.shape[1], device=values.device) == 0))  # one place: the end
    losses = comparison_loss(
        zero_masked(torch.where(prefix, ends[better], values[better]), compared),
        zero_masked(torch.where(prefix, ends[worse], values[worse]), compared),
        (margin * (ranks[worse] - ranks[better])).unsqueeze(1),
        label_smoothing,
        centering,
    )  # [M,T]
    return mean_by_prompt(masked_mean(losses, compared, dim=1), prompt_index[better], prompt_index)


def comparison_loss(
    better: Tensor, worse: Tensor, margin: Tensor, label_smoothing: float = 0.0, centering: float = 0.0
) -> Tensor:
    """better [...], worse [...], margin [...] -> [...]: pairwise_loss + centering * (better + worse)^2.

    The second term keeps scores around 0, which a loss of differences alone leaves free (Eisenstein et al. 2023,
    "Helping or Herding?", eq. 2).
    """
    loss = pairwise_loss(better, worse, margin, label_smoothing)
    return loss + centering * (at_least_float32(better) + at_least_float32(worse)) ** 2 if centering else loss


def elo_ratings(
    prompt_index: Tensor, ranks: Tensor, k_factor: float = ELO_K_FACTOR, rounds: int = ELO_ROUNDS
) -> Tensor:
    """prompt_index long [N], ranks [N] -> [N]: each answer's Elo rating among its prompt's, in natural-log units.

    A round robin of the prompt's answers, `rounds` times over: the lower rank wins its game, equal ranks draw. All
    start at 0 and all games of a round are rated at once, so that no order of games matters:
      R_i += K * sum over j of (S_ij - 1 / (1 + 10^((R_j - R_i) / 400)))      S_ij 1 won, 1/2 drawn, 0 lost (Elo 1978)
    and the result is R * ln(10) / 400, whose difference d means a chance of sigmoid(d). The rounds are finite since the
    most likely ratings of a ranking are not: who always wins rises forever. What one wins another loses, so each
    prompt's mean stays 0. Two answers end 1.90 apart, a chance of 0.87.
    """
    ranks = at_least_float32(ranks)
    plays = (prompt_index.unsqueeze(1) == prompt_index.unsqueeze(0)).fill_diagonal_(False)  # [N,N]
    result = 0.5 + 0.5 * (ranks.unsqueeze(0) - ranks.unsqueeze(1)).sign()  # [N,N] of the row's answer
    ratings = torch.zeros_like(ranks)
    for _ in range(rounds):
        expected = (ratings.unsqueeze(1) - ratings.unsqueeze(0)).sigmoid()
        ratings = ratings + k_factor * math.log(10) / 400 * torch.where(plays, result - expected, 0.0).sum(dim=1)
    return ratings


def _membership(of: Tensor, prompt_index: Tensor) -> Tensor:
    """The prompt `of` [M] each of M things -> bool [P,M].

    Sums over a prompt go through such a matrix: index_add on a GPU adds in an order that differs from run to run, and
    a resumed run must repeat the first one bit for bit.
    """
    return of == torch.arange(int(prompt_index.max()) + 1, device=prompt_index.device).unsqueeze(1)


def mean_by_prompt(losses: Tensor, of: Tensor, prompt_index: Tensor) -> Tensor:
    """losses [M], the prompt `of` [M] each -> [P]: the mean of each prompt's; 0 where it has none."""
    of_prompt = _membership(of, prompt_index)
    return masked_mean(losses.expand_as(of_prompt), of_prompt, dim=1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    form: DPOForm = "sigmoid",
) -> Tensor:
    """Log-probabilities of answers, each [B] -> [B]: one loss per pair. "sigmoid" takes sums over an answer's
    tokens, "ipo" means: the paper's results are of means, according to its authors (see docs/step2-dpo.md).

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
    """Mean log-probability per token of each answer, [B], [B] -> [B]: -log sigmoid(beta * (chosen - rejected) - gamma).

    No reference; `gamma` is the margin to reach (Meng et al. 2024, "SimPO", eq. 6).
    """
    chosen, rejected = at_least_float32(policy_chosen_mean), at_least_float32(policy_rejected_mean)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
