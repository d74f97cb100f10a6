"""Slow twins of tristage.algo, for comparison: plain Python floats (float64) and loops over rows and tokens.

Written from the formulas in the papers, not from the fast code. Every function takes torch tensors and gives
Python floats, lists of floats, or lists of rows. Letters: B rows, R or T positions, V vocabulary, N answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor


def numbers(x: Tensor) -> Any:
    """A tensor as nested lists of Python floats."""
    return x.detach().double().tolist()


# masking


def real_values(x: Tensor, mask: Tensor) -> list[float]:
    values, keep = numbers(x.reshape(-1)), mask.reshape(-1).tolist()
    return [values[i] for i in range(len(values)) if keep[i]]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    m = mean(values)
    return math.fsum((v - m) ** 2 for v in values) / len(values)


def response_mask(ids: Tensor, eos_ids: list[int]) -> list[list[bool]]:
    rows = []
    for row in ids.tolist():
        keep, ended = [], False
        for token in row:
            keep.append(not ended)
            if token in eos_ids:
                ended = True
        rows.append(keep)
    return rows


def position_ids(attention_mask: Tensor) -> list[list[int]]:
    rows = []
    for row in attention_mask.tolist():
        positions, seen = [], 0
        for real in row:
            if real:
                seen += 1
            positions.append(seen - 1 if seen > 0 else 0)
        rows.append(positions)
    return rows


# log-probabilities


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def logprob(logits: list[float], token: int) -> float:
    top = max(logits)
    return logits[token] - top - math.log(math.fsum(math.exp(x - top) for x in logits))


def token_logprobs(logits: Tensor, ids: Tensor) -> list[list[float]]:
    """logits [B,T,V], ids [B,T]."""
    rows = numbers(logits)
    return [[logprob(rows[b][t], int(ids[b, t])) for t in range(ids.shape[1])] for b in range(ids.shape[0])]


def entropy(logits: Tensor) -> list[list[float]]:
    """logits [B,T,V]."""
    return [
        [-math.fsum(p * math.log(p) for p in softmax(x) if p > 0) for x in row] for row in numbers(logits)
    ]


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float
) -> list[list[list[float]]]:
    """hidden [B,T,H], weight [V,H], bias [V] -> logits [B][T][V]."""
    w, b = numbers(weight), numbers(bias)
    return [
        [
            [(math.fsum(h[k] * w[v][k] for k in range(len(h))) + b[v]) / temperature for v in range(len(w))]
            for h in row
        ]
        for row in numbers(hidden)
    ]


# losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lm_loss(logits: Tensor, ids: Tensor, loss_mask: Tensor) -> list[list[float]]:
    """Token t is predicted by the logits at t-1; its loss stands in column t-1."""
    rows = numbers(logits)
    result = []
    for b in range(ids.shape[0]):
        losses = []
        for t in range(1, ids.shape[1]):
            losses.append(-logprob(rows[b][t - 1], int(ids[b, t])) if loss_mask[b, t] else 0.0)
        result.append(losses)
    return result


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, label_smoothing: float) -> list[float]:
    result = []
    for c, r, m in zip(numbers(chosen), numbers(rejected), numbers(margin), strict=True):
        p = sigmoid(c - r - m)
        result.append(-(1 - label_smoothing) * math.log(p) - label_smoothing * math.log(1 - p))
    return result


def ranking_pairs(prompt_index: Tensor, ranks: Tensor) -> set[tuple[int, int]]:
    pairs = set()
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if int(prompt_index[i]) == int(prompt_index[j]) and float(ranks[i]) < float(ranks[j]):
                pairs.add((i, j))
    return pairs


def ranking_loss_pairs(scores: Tensor, prompt_index: Tensor, ranks: Tensor) -> list[float]:
    s = numbers(scores)
    losses: list[list[float]] = [[] for _ in range(int(prompt_index.max()) + 1)]
    for i, j in ranking_pairs(prompt_index, ranks):
        losses[int(prompt_index[i])].append(-math.log(sigmoid(s[i] - s[j])))
    return [mean(one) if one else 0.0 for one in losses]


def ranking_loss_best(scores: Tensor, prompt_index: Tensor, ranks: Tensor) -> list[float]:
    s = numbers(scores)
    losses = []
    for prompt in range(int(prompt_index.max()) + 1):
        answers = [i for i in range(len(s)) if int(prompt_index[i]) == prompt]
        best = min(float(ranks[i]) for i in answers)
        p = softmax([s[i] for i in answers])
        losses.append(mean([-math.log(p[k]) for k, i in enumerate(answers) if float(ranks[i]) == best]))
    return losses


# PPO


def kl_estimate(logprob: float, ref_logprob: float, kind: str) -> float:
    """With r = reference / policy, as in Schulman's note."""
    r = math.exp(ref_logprob) / math.exp(logprob)
    return {"k1": -math.log(r), "k2": 0.5 * math.log(r) ** 2, "k3": (r - 1) - math.log(r)}[kind]


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    clip_score: float,
    kind: str,
) -> list[list[float]]:
    result = []
    for b in range(mask.shape[0]):
        rewards = [0.0] * mask.shape[1]
        real = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in real:
            rewards[t] = -kl_coef * kl_estimate(float(logprobs[b, t]), float(ref_logprobs[b, t]), kind)
        rewards[real[-1]] += max(-clip_score, min(clip_score, float(scores[b])))
        result.append(rewards)
    return result


def gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Any, Any]:
    """Equation 16 as it stands, on a row's real tokens: A_t = sum over l of (gamma lam)^l delta_(t+l)."""
    all_advantages, all_returns = [], []
    for b in range(mask.shape[0]):
        real = [t for t in range(mask.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in real] + [0.0]
        r = [float(rewards[b, t]) for t in real]
        delta = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(real))]
        advantages, returns = [0.0] * mask.shape[1], [0.0] * mask.shape[1]
        for k, t in enumerate(real):
            advantages[t] = sum((gamma * lam) ** n * delta[k + n] for n in range(len(real) - k))
            returns[t] = advantages[t] + v[k]
        all_advantages.append(advantages)
        all_returns.append(returns)
    return all_advantages, all_returns


def clipped_policy_loss(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    ratio = math.exp(logprob) / math.exp(old_logprob)
    return -min(ratio * advantage, max(1 - clip, min(1 + clip, ratio)) * advantage)


def clipped_value_loss(value: float, old_value: float, ret: float, clip: float) -> float:
    clipped = max(old_value - clip, min(old_value + clip, value))
    return 0.5 * max((value - ret) ** 2, (clipped - ret) ** 2)


# reward models


def comparison_loss(better: float, worse: float, margin: float, label_smoothing: float, centering: float) -> float:
    p = sigmoid(better - worse - margin)
    loss = -(1 - label_smoothing) * math.log(p) - label_smoothing * math.log(1 - p)
    return loss + centering * (better + worse) ** 2


def ranking_loss_options(
    scores: Tensor, prompt_index: Tensor, ranks: Tensor, margin: float, label_smoothing: float, centering: float
) -> list[float]:
    """As ranking_loss_pairs, with the margin of a rank and the other options."""
    s, r = numbers(scores), numbers(ranks)
    losses: list[list[float]] = [[] for _ in range(int(prompt_index.max()) + 1)]
    for i, j in ranking_pairs(prompt_index, ranks):
        loss = comparison_loss(s[i], s[j], margin * (r[j] - r[i]), label_smoothing, centering)
        losses[int(prompt_index[i])].append(loss)
    return [mean(one) if one else 0.0 for one in losses]


def token_ranking_loss(
    values: list[list[float]],
    ids: list[list[int]],
    prompt_index: Tensor,
    ranks: Tensor,
    margin: float,
    label_smoothing: float,
    centering: float,
) -> list[float]:
    """Rows without padding: values[n][t] of token ids[n][t]."""
    r = numbers(ranks)
    losses: list[list[float]] = [[] for _ in range(int(prompt_index.max()) + 1)]
    for i, j in ranking_pairs(prompt_index, ranks):
        common = 0
        while common < min(len(ids[i]), len(ids[j])) and ids[i][common] == ids[j][common]:
            common += 1
        compared = [(values[i][t], values[j][t]) for t in range(common, min(len(ids[i]), len(ids[j])))]
        if not compared:
            compared = [(values[i][-1], values[j][-1])]
        gap = margin * (r[j] - r[i])
        one = mean([comparison_loss(high, low, gap, label_smoothing, centering) for high, low in compared])
        losses[int(prompt_index[i])].append(one)
    return [mean(one) if one else 0.0 for one in losses]


def elo_ratings(prompt_index: Tensor, ranks: Tensor, k_factor: float, rounds: int) -> list[float]:
    """Elo's own formulas in points, a round's games rated together; then points * ln(10) / 400."""
    points = [0.0] * len(ranks)
    for _ in range(rounds):
        won = [0.0] * len(points)
        for i in range(len(points)):
            for j in range(len(points)):
                if i != j and int(prompt_index[i]) == int(prompt_index[j]):
                    score = {-1: 1.0, 0: 0.5, 1: 0.0}[int(ranks[i] > ranks[j]) - int(ranks[i] < ranks[j])]
                    won[i] += k_factor * (score - 1 / (1 + 10 ** ((points[j] - points[i]) / 400)))
        points = [before + gain for before, gain in zip(points, won, strict=True)]
    return [p * math.log(10) / 400 for p in points]


def ranking_loss_elo(scores: Tensor, prompt_index: Tensor, ranks: Tensor, k_factor: float, rounds: int) -> list[float]:
    s, targets = numbers(scores), elo_ratings(prompt_index, ranks, k_factor, rounds)
    losses: list[list[float]] = [[] for _ in range(int(prompt_index.max()) + 1)]
    for i in range(len(s)):
        losses[int(prompt_index[i])].append((s[i] - targets[i]) ** 2)
    return [mean(one) for one in losses]


# preferences without a reward model


def dpo_loss(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float, beta: float, smoothing: float
) -> float:
    """Rafailov et al., equation 7, on log-probabilities; `smoothing` is the chance that the label is wrong."""
    ratio_chosen, ratio_rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    right, wrong = sigmoid(beta * (ratio_chosen - ratio_rejected)), sigmoid(beta * (ratio_rejected - ratio_chosen))
    return -(1 - smoothing) * math.log(right) - smoothing * math.log(wrong)


def ipo_loss(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float, beta: float
) -> float:
    """Azar et al., equation 17: h = log(policy(y_w) ref(y_l) / (policy(y_l) ref(y_w))) is driven to 1 / (2 beta)."""
    h = math.log(math.exp(policy_chosen - policy_rejected) * math.exp(ref_rejected) / math.exp(ref_chosen))
    return (h - 1 / (2 * beta)) ** 2


def ipo_loss_of_means(
    policy_chosen: list[float],
    policy_rejected: list[float],
    ref_chosen: list[float],
    ref_rejected: list[float],
    beta: float,
) -> float:
    """ipo_loss where each answer, given as its tokens' log-probabilities, counts with its mean per token."""
    return ipo_loss(mean(policy_chosen), mean(policy_rejected), mean(ref_chosen), mean(ref_rejected), beta)


def simpo_loss(chosen_mean: float, rejected_mean: float, beta: float, gamma: float) -> float:
    """Meng et al., equation 6, on means a token."""
    return -math.log(sigmoid(beta * chosen_mean - beta * rejected_mean - gamma))


# PPO's repertoire


def slope(function: Callable[[float], float], x: float, step: float = 1e-6) -> float:
    """The central difference: the derivative at x, unless there is a kink within `step`."""
    return (function(x + step) - function(x - step)) / (2 * step)


def policy_loss(
    logprob: float, old_logprob: float, advantage: float, low: float, high: float, dual: float | None
) -> float:
    """Clipped between 1 - low and 1 + high; a negative advantage costs at most `dual` times itself."""
    ratio = math.exp(logprob - old_logprob)
    bounded = 1 + high if ratio > 1 + high else 1 - low if ratio < 1 - low else ratio
    gain = min(ratio * advantage, bounded * advantage)
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    return -gain


def importance_weight(logprob: float, sampled_logprob: float, cap: float, kind: str) -> float:
    ratio = math.exp(logprob - sampled_logprob)
    if kind == "truncate":
        return min(ratio, cap)
    return ratio if 1 / cap <= ratio <= cap else 0.0


def huber_loss(value: float, ret: float, delta: float) -> float:
    error = abs(value - ret)
    return 0.5 * error**2 if error <= delta else delta * error - 0.5 * delta**2


def gae_cut_off(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, final_values: Tensor
) -> tuple[Any, Any]:
    """Equation 16 where a state of value final_values[b] follows row b's last real token."""
    all_advantages, all_returns = [], []
    for b in range(mask.shape[0]):
        real = [t for t in range(mask.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in real] + [float(final_values[b])]
        delta = [float(rewards[b, t]) + gamma * v[k + 1] - v[k] for k, t in enumerate(real)]
        advantages, returns = [0.0] * mask.shape[1], [0.0] * mask.shape[1]
        for k, t in enumerate(real):
            advantages[t] = sum((gamma * lam) ** n * delta[k + n] for n in range(len(real) - k))
            returns[t] = advantages[t] + v[k]
        all_advantages.append(advantages)
        all_returns.append(returns)
    return all_advantages, all_returns


def group_advantages(rewards: Tensor, group: Tensor, kind: str, epsilon: float = 0.0) -> list[float]:
    """RLOO: less the mean of the others'. GRPO: standardised in its group, the deviation larger by `epsilon`."""
    r = numbers(rewards)
    result = []
    for i in range(len(r)):
        others = [r[j] for j in range(len(r)) if j != i and int(group[j]) == int(group[i])]
        everyone = [*others, r[i]]
        if kind == "rloo":
            result.append(r[i] - mean(others))
        else:
            std = math.sqrt(variance(everyone) * len(everyone) / (len(everyone) - 1))
            result.append((r[i] - mean(everyone)) / (std + epsilon))
    return result


def adaptive_kl_coef(coef: float, kls: list[float], target: float, num_responses: int, horizon: float) -> list[float]:
    """Ziegler et al. 2019, section 2.2: the coefficient after each of `kls`, with K = responses / horizon."""
    result = []
    for kl in kls:
        error = max(-0.2, min(0.2, (kl - target) / target))
        coef = coef * (1 + num_responses / horizon * error)
        result.append(coef)
    return result


# ---- LoRA (Hu et al. 2021, eq. 3) -----------------------------------------------------------------------------------


def lora_changes(adapters: dict[str, Tensor], scale: float, transposed: bool) -> dict[str, Tensor]:
    """{"X.lora_A.default.weight": A [rank,in], "X.lora_B.default.weight": B [out,rank]} -> {"X.weight": scale B A}."""
    found = {}
    for name, a in adapters.items():
        layer, is_a, _ = name.partition(".lora_A.")
        if is_a:
            change = scale * (adapters[f"{layer}.lora_B.default.weight"] @ a)
            found[f"{layer}.weight"] = change.T if transposed else change
    return found
