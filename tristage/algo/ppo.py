"""PPO on responses: KL to the reference, rewards, advantages, and the two clipped losses, unreduced.

Letters: B rows, R response positions. Everything is response-aligned: slot t of any [B,R] belongs to response
token t. A mask is True on real tokens: up to and including the first EOS.

The losses and the KL estimate work slot by slot and take no mask: a slot outside it holds whatever its inputs
make of it, and the caller's masked_sum drops it. For the gradient to be 0 there as well, and not 0 * nan, the
inputs must be finite there: pass them through `zero_masked` if they may not be.

  PPO  Schulman et al. 2017, "Proximal Policy Optimization Algorithms"
  GAE  Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation"
  KL   Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .masking import at_least_float32, masked_moments, zero_masked

KLKind = Literal["k1", "k2", "k3"]
GroupBaseline = Literal["rloo", "grpo"]
ImportanceKind = Literal["truncate", "mask"]

# k3 grows as r = p_ref / p_policy: one token that the reference finds e^20 times likelier drowns a batch.
# Within +-10 (a factor of 22,000) k3 is exact; beyond, it keeps the value at the bound and its gradient is 0.
_MAX_K3_LOG_RATIO = 10.0
# exp overflows float32 at 88, and inf * 0 is nan in backward. A ratio of e^20 is broken already: stay finite.
_MAX_LOG_RATIO = 20.0
# Variance below (this * float32 epsilon * mean)^2 is the rounding of the mean: the values are all the same.
_CONSTANT_IN_EPSILONS = 16.0
_GROUP_STD_EPSILON = 1e-4  # GRPO: keeps a nearly constant group from being blown up
_MAX_KL_ERROR = 0.2  # Ziegler et al. 2019: one iteration never changes the coefficient by more than this share


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """logprobs [B,R], ref_logprobs [B,R] -> [B,R]: per-token estimate of KL(policy || reference).

    For tokens sampled from the policy, with log r = ref_logprobs - logprobs:
      k1 = -log r                 unbiased, either sign
      k2 = (log r)^2 / 2          biased, never negative
      k3 = (r - 1) - log r        unbiased, never negative; its gradient is not an unbiased gradient of the KL
    """
    log_r = at_least_float32(ref_logprobs) - at_least_float32(logprobs)
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r**2 / 2
    if kind == "k3":
        log_r = log_r.clamp(-_MAX_K3_LOG_RATIO, _MAX_K3_LOG_RATIO)
        return torch.expm1(log_r) - log_r
    raise ValueError(f"KL estimate must be 'k1', 'k2' or 'k3', got {kind!r}")


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    clip_score: float | None = None,
    kind: KLKind = "k1",
) -> Tensor:
    """scores [B], logprobs [B,R], ref_logprobs [B,R], mask [B,R] -> rewards [B,R], 0 outside the mask.

    -kl_coef * KL on every real token, plus the score, clipped to +-clip_score, on the last real token
    (Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", eq. 2). Every row has one.
    """
    kl = kl_estimate(zero_masked(logprobs, mask), zero_masked(ref_logprobs, mask), kind)  # 0 outside the mask
    scores = at_least_float32(scores)
    if clip_score is not None:
        scores = scores.clamp(-clip_score, clip_score)
    positions = torch.arange(mask.shape[1], device=mask.device)  # [R]
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)  # [B,1]
    return torch.where(positions == last, scores.unsqueeze(1), 0.0) - kl_coef * kl


def gae(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, final_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """values [B,R], rewards [B,R], mask [B,R] -> (advantages [B,R], returns [B,R]), both 0 outside the mask.

    The next step of a real token is the next real token of its row. What follows the last one is worth
    final_values [B]: 0 (None) for a response that ended, the value of its last state for one that was cut off.
    With gamma = 1, lam = 0.5, values [1, 2], rewards [0, 4]: delta_1 = 4 - 2 = 2, delta_0 = 0 + 2 - 1 = 1,
    advantages [1 + 0.5 * 2, 2] = [2, 2], returns [3, 4].
    """
    values, rewards = zero_masked(values, mask), zero_masked(rewards, mask)
    next_advantage = torch.zeros_like(values[:, 0])  # [B]
    next_value = torch.zeros_like(values[:, 0]) if final_values is None else at_least_float32(final_values)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # GAE section 3
        advantage = delta + gamma * lam * next_advantage  # GAE eq. 16, as a recursion
        columns.append(advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return zero_masked(advantages, mask), zero_masked(advantages + values, mask)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """logprobs [B,R], old_logprobs [B,R], advantages [B,R] -> [B,R]: -min(r A, clip(r, 1-clip, 1+clip) A).

    With r = 1.5, clip 0.2: -1.2 for A = 1 (no gain beyond the clip), 1.5 for A = -1 (the worse is kept).
    `clip_high` is the upper clip where it differs (Yu et al. 2025, "DAPO", eq. 10). `dual_clip` c > 1 bounds what a
    negative advantage can cost to c |A|, however large r is (Ye et al. 2020, "Mastering Complex Control in MOBA Games
    with Deep Reinforcement Learning", eq. 5).
    """
    log_ratio = at_least_float32(logprobs) - at_least_float32(old_logprobs)
    advantages = at_least_float32(advantages)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    gain = torch.minimum(ratio * advantages, clipped * advantages)  # PPO eq. 7
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, cap: float, kind: ImportanceKind) -> Tensor:
    """logprobs [B,R], sampled_logprobs [B,R] -> weights [B,R] of the policy loss, without gradient.

    A sampler that rounds differently from training draws from another distribution than the policy of `logprobs`. With
    r = exp(logprobs - sampled_logprobs):
      truncate = min(r, cap)                       (Ionides 2008, "Truncated Importance Sampling", eq. 3)
      mask     = r where 1/cap <= r <= cap, else 0: tokens on which the two disagree teach nothing
    With cap 2: r = 1.5 stays 1.5; r = 3 becomes 2 or 0; r = 0.25 stays 0.25 or becomes 0.
    """
    ratio = importance_ratio(logprobs, sampled_logprobs)
    if kind == "truncate":
        return ratio.clamp(max=cap)
    if kind == "mask":
        return torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)
    raise ValueError(f"importance sampling must be 'truncate' or 'mask', got {kind!r}")


def importance_ratio(logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """logprobs [B,R], sampled_logprobs [B,R] -> exp(logprobs - sampled_logprobs) [B,R], without gradient."""
    log_ratio = at_least_float32(logprobs.detach()) - at_least_float32(sampled_logprobs)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """values [B,R], old_values [B,R], returns [B,R] -> [B,R]: 0.5 * max((v - R)^2, (clipped v - R)^2).

    v is clipped to old_values +- clip ("The 37 Implementation Details of PPO", detail 9); None: no clipping.
    """
    values, old_values = at_least_float32(values), at_least_float32(old_values)
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum(error, (clipped - returns) ** 2)


def huber_value_loss(values: Tensor, returns: Tensor, delta: float) -> Tensor:
    """values [B,R], returns [B,R] -> [B,R]: half the squared error within +-delta, linear beyond (Huber 1964)."""
    error = (at_least_float32(values) - returns).abs()
    return torch.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))


def group_advantages(rewards: Tensor, group: Tensor, kind: GroupBaseline) -> Tensor:
    """rewards [B], group long [B] -> [B]: how much better each response is than the others to its prompt.

    `group` numbers the prompts; rows of a number are responses to the same one, at least two.
      "rloo": the reward minus the mean of the others'      (Ahmadian et al. 2024, "Back to Basics", eq. 8)
      "grpo": the reward minus the group's mean, over its standard deviation; 0 where all are equal
              (Shao et al. 2024, "DeepSeekMath", section 4.1.2)
    """
    rewards = at_least_float32(rewards)
    index: Tensor = torch.unique(group, return_inverse=True)[1]
    same = index.unsqueeze(0) == torch.arange(int(index.max()) + 1, device=index.device).unsqueeze(1)  # [groups,B]
    size = same.sum(dim=1)  # [groups]
    mean = torch.where(same, rewards, 0.0).sum(dim=1) / size  # [groups]
    if kind == "rloo":
        return (rewards - mean[index]) * size[index] / (size - 1)[index]  # r - (sum - r) / (n - 1)
    if kind == "grpo":
        centred = rewards - mean[index]
        # Unbiased; the paper leaves it open.
        std = (torch.where(same, centred**2, 0.0).sum(dim=1) / (size - 1)).sqrt()[index]
        rounding = _CONSTANT_IN_EPSILONS * torch.finfo(torch.float32).eps * mean.abs()[index]
        return torch.where(std > rounding, centred / (std + _GROUP_STD_EPSILON), 0.0)
    raise ValueError(f"group baseline must be 'rloo' or 'grpo', got {kind!r}")


class KLController:
    """The KL coefficient of an iteration: fixed, or steered so that the KL to the reference nears `target`.

    coef <- coef * (1 + clip(kl / target - 1, +-0.2) * responses / horizon)   (Ziegler et al. 2019, section 2.2)

    With coef 0.1, target 6, horizon 10000: 64 responses of KL 12 give 0.1 * (1 + 0.2 * 0.0064) = 0.100128.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000.0) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, num_responses: int) -> None:
        """`kl`: mean over an iteration's responses, in nats per response. nan leaves the coefficient unchanged."""
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -_MAX_KL_ERROR), _MAX_KL_ERROR)
        self.coef *= 1 + error * num_responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class RunningMoments:
    """Mean and variance of all numbers seen so far, merged batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of (x - mean)^2

    def update(self, x: Tensor) -> None:
        """x [B]; non-finite numbers are ignored."""
        x = x[x.isfinite()].double()
        if not len(x):
            return
        mean, total = float(x.mean()), self.count + len(x)
        shift = mean - self.mean
        self.squares += float(((x - mean) ** 2).sum()) + shift**2 * self.count * len(x) / total
        self.mean += shift * len(x) / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation (unbiased); 1 until there are two different numbers, so that dividing by it is safe."""
        variance = self.squares / max(self.count - 1, 1)
        return math.sqrt(variance) if variance > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """values [B,R], returns [B,R], mask [B,R] -> []: 1 - Var(returns - values) / Var(returns).

    Over real tokens. 1 is a perfect critic, 0 one that knows only the mean; 0 too if all returns are equal.
    """
    values, returns = zero_masked(values, mask), zero_masked(returns, mask)
    mean, var_returns = masked_moments(returns, mask)
    _, var_errors = masked_moments(returns - values, mask)
    rounding = _CONSTANT_IN_EPSILONS * torch.finfo(torch.float32).eps * mean
    return torch.where(var_returns > rounding**2, 1 - var_errors / var_returns, 0.0)
