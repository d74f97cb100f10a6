"""From experience to updated weights: PPO epochs, minibatches (optimizer steps), micro-batches (backwards)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Engines
from tristage import dist
from tristage.algo.masking import masked_sum
from tristage.algo.ppo import clipped_policy_loss, clipped_value_loss, kl_estimate
from tristage.batches import Experience
from tristage.config import BatchPlan
from tristage.data.loader import deal
from tristage.engine import backward_mean, optimizer_step
from tristage.metrics import Averages

# With the weights that sampled, ratio and KL are 1 and 0 but for rounding; beyond this something is wrong.
FIRST_TOLERANCE = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.05}


def ppo_update(
    engines: Engines, experience: Experience, iteration: int, settings: PPOConfig, plan: BatchPlan
) -> dict[str, float]:
    """All optimizer steps of one iteration; metrics averaged over tokens, epochs and ranks. A collective.

    Rows are shuffled anew each epoch over all ranks; the set of rows of a minibatch, and so the update, does not
    depend on the number of ranks or the micro-batch.
    """
    device = experience.logprobs.device
    averages = Averages()
    lengths = experience.sequences.attention_mask.sum(dim=1).tolist()
    engines.actor.train()
    engines.critic.train()
    for epoch in range(settings.ppo.epochs):
        order = np.random.default_rng([settings.seed, iteration, epoch]).permutation(len(experience.logprobs))
        for minibatch in np.split(order, len(order) // plan.global_batch):
            _minibatch_step(engines, experience, minibatch.tolist(), lengths, settings, plan, averages)
    return averages.reduce(device)


def _minibatch_step(
    engines: Engines,
    experience: Experience,
    rows: list[int],
    lengths: list[int],
    settings: PPOConfig,
    plan: BatchPlan,
    averages: Averages,
) -> None:
    """One optimizer step of actor and critic: losses summed over micro-batches, divided by the real tokens of all."""
    global_tokens = float(experience.mask[rows].sum())
    for micro in deal(rows, lengths, plan, dist.rank()):
        _backward(engines, experience, torch.tensor(micro), global_tokens, settings, averages)
    for name, engine in (("policy", engines.actor), ("value", engines.critic)):
        for metric, value in optimizer_step(engine).metrics(name).items():
            averages.add(metric, value, 1)


def _backward(
    engines: Engines,
    experience: Experience,
    rows: torch.Tensor,
    global_tokens: float,
    settings: PPOConfig,
    averages: Averages,
) -> None:
    """Forward and backward of actor and critic on one micro-batch; rows [b] index the experience."""
    ppo, micro, mask = settings.ppo, experience.sequences.micro_batch(rows), experience.mask[rows]
    old_logprobs, advantages = experience.logprobs[rows], experience.advantages[rows]
    old_values, returns = experience.values[rows], experience.returns[rows]

    logprobs = micro.align(engines.actor(micro.ids, micro.mask, micro.score_mask, settings.rollout.temperature)[0])
    policy_loss = masked_sum(clipped_policy_loss(logprobs, old_logprobs, advantages, ppo.clip), mask)
    backward_mean(engines.actor, policy_loss, global_tokens)

    values = micro.before_response(engines.critic(micro.ids, micro.mask))
    value_loss = masked_sum(clipped_value_loss(values, old_values, returns, ppo.value_clip), mask)
    backward_mean(engines.critic, value_loss, global_tokens)

    with torch.no_grad():
        tokens, ratio = mask.sum(), (logprobs - old_logprobs).exp()
        value_clip = float("inf") if ppo.value_clip is None else ppo.value_clip
        averages.add("policy/loss", policy_loss, tokens)
        averages.add("policy/ratio", masked_sum(ratio, mask), tokens)
        averages.add("policy/clipfrac", masked_sum(((ratio - 1).abs() > ppo.clip).float(), mask), tokens)
        averages.add("policy/approx_kl", masked_sum(kl_estimate(old_logprobs, logprobs, "k3"), mask), tokens)
        averages.add("value/loss", value_loss, tokens)
        averages.add("value/clipfrac", masked_sum(((values - old_values).abs() > value_clip).float(), mask), tokens)


@torch.no_grad()
def check_first_iteration(engines: Engines, experience: Experience, settings: PPOConfig, plan: BatchPlan) -> None:
    """Before the first update: training's own forward gives the sampled log-probabilities again (ratio 1), and
    an actor that starts as its reference has KL 0. Dropout left on, a wrong mask or another temperature fail here.

    Raises:
        RuntimeError: on every rank, with the two numbers.
    """
    engines.actor.train()
    rows = torch.arange(plan.micro_batch * dist.rank(), plan.micro_batch * (dist.rank() + 1))
    micro, mask = experience.sequences.micro_batch(rows), experience.mask[rows]
    found = micro.align(engines.actor(micro.ids, micro.mask, micro.score_mask, settings.rollout.temperature)[0])
    log_ratio = _largest(found - experience.logprobs[rows], mask)
    kl = _largest(kl_estimate(experience.logprobs, experience.ref_logprobs), experience.mask)
    if settings.reference_path != settings.actor_path:
        kl = 0.0
    worst: dict[str, Any] = dist.max_over_ranks({"log_ratio": log_ratio, "kl": kl}, experience.logprobs.device)
    tolerance = FIRST_TOLERANCE[settings.precision]
    if max(worst.values()) > tolerance:
        raise RuntimeError(
            f"before the first update the log-ratio is {worst['log_ratio']:.2e} and the KL to the reference "
            f"{worst['kl']:.2e}, both should be 0 (tolerance {tolerance}): the model's forward differs between "
            "sampling, scoring and training; report this with the model's config.json"
        )


def _largest(x: torch.Tensor, mask: torch.Tensor) -> float:
    """x [B,R], mask [B,R] -> the largest |x| of a real token; nan, which compares as small, counts as infinite."""
    return float(x.abs().nan_to_num(nan=torch.inf).masked_fill(~mask, 0.0).max())
