"""From experience to updated weights: PPO epochs, minibatches (optimizer steps), micro-batches (backwards)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines
from tristage import dist
from tristage.algo.masking import masked_mean, masked_sum
from tristage.algo.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    huber_value_loss,
    importance_weights,
    kl_estimate,
)
from tristage.batches import Experience, SFTBatch
from tristage.config import BatchPlan
from tristage.data.loader import RowNumbers, deal, deal_tokens
from tristage.engine import FORWARD_TOLERANCE, StepReport, backward_mean, optimizer_steps
from tristage.errors import UserError
from tristage.training.metrics import Averages

CHECKED_ROWS = 4  # of each rank, by check_first_iteration


@dataclass
class ActorExtras:
    """What else happens in the actor's optimizer step, if anything."""

    pretraining: Callable[[int], list[SFTBatch]] | None = None  # optimizer step -> this rank's blocks of text
    pretraining_coef: float = 0.0
    after_step: Callable[[int, bool], None] | None = None  # (optimizer step, whether it was skipped)


NOTHING_ELSE = ActorExtras()


class MinibatchReport(NamedTuple):
    """What one optimizer step of an iteration's updates did, on this rank."""

    step: StepReport  # of actor and critic together: `losses` adds up those of each micro-batch
    micro_batches: list[RowNumbers]  # rows of the experience


def ppo_update(
    engines: Engines,
    experience: Experience,
    iteration: int,
    settings: PPOConfig,
    plan: BatchPlan,
    extras: ActorExtras = NOTHING_ELSE,
) -> tuple[dict[str, float], list[MinibatchReport]]:
    """All optimizer steps of one iteration: (metrics averaged over tokens, epochs and ranks; a report per step). A
    collective.

    Prompts are shuffled anew each epoch over all ranks; the set of rows of a minibatch, and so the update, does not
    depend on the number of ranks or the micro-batch. While the critic warms up, the actor is not trained.
    """
    device = experience.logprobs.device
    averages = Averages()
    reports: list[MinibatchReport] = []
    lengths = experience.sequences.attention_mask.sum(dim=1).tolist()
    warming = settings.critic is not None and iteration <= settings.critic.warmup_iterations
    for engine in (engines.actor, engines.critic):
        if engine is not None:
            engine.train()
    steps = len(experience.logprobs) // plan.global_batch
    epoch = 0
    for epoch in range(settings.ppo.epochs):
        order = shuffled(len(experience.logprobs), plan.global_batch, settings, [iteration, epoch])
        epoch_kl = Averages()
        for place, rows in enumerate(np.split(order, steps)):
            number = ((iteration - 1) * settings.ppo.epochs + epoch) * steps + place  # optimizer step, 0-based
            minibatch = Minibatch(engines, experience, settings, averages, epoch_kl, warming, not reports)
            reports.append(minibatch.step(rows.tolist(), lengths, plan, number, extras))
        if settings.ppo.target_kl is not None and not warming:
            # Reduced first: all ranks stop together.
            if epoch_kl.reduce(device)["policy/approx_kl"] > settings.ppo.target_kl:
                break
    return averages.reduce(device) | {"policy/epochs": epoch + 1.0}, reports


def shuffled(rows: int, minibatch: int, settings: PPOConfig, draw: list[int]) -> np.ndarray:
    """[rows] in the order of an epoch. Responses to one prompt stay together where minibatches hold whole prompts."""
    samples = settings.rollout.samples if minibatch % settings.rollout.samples == 0 else 1
    prompts = np.random.default_rng([settings.seed, *draw]).permutation(rows // samples)
    return (prompts[:, None] * samples + np.arange(samples)).ravel()


@dataclass
class Minibatch:
    """One optimizer step of actor and critic: losses summed over micro-batches, divided by the real tokens of all."""

    engines: Engines
    experience: Experience
    settings: PPOConfig
    averages: Averages
    epoch_kl: Averages
    warming: bool  # the critic alone learns
    weights_sampled: bool  # by the actor's present weights, as in an iteration's first step

    def step(
        self, rows: list[int], lengths: list[int], plan: BatchPlan, number: int, extras: ActorExtras
    ) -> MinibatchReport:
        losses = defaultdict(list)  # by engine, of each backward
        global_tokens = float(self.experience.mask[rows].sum())
        dealt = self._deal(rows, lengths, plan)
        for micro in dealt:
            places = torch.tensor(micro)
            if not self.warming:
                losses["policy"].append(self._actor_backward(places, global_tokens))
            if self.engines.critic is not None:
                losses["value"].append(self._critic_backward(places, global_tokens))
        if not self.warming and extras.pretraining is not None:
            losses["policy"] += self._pretraining_backward(extras.pretraining(number), extras.pretraining_coef)
        report = self._step(losses)
        if not self.warming and extras.after_step is not None:
            extras.after_step(number, report.skipped)
        return MinibatchReport(report, dealt)

    def _deal(self, rows: list[int], lengths: list[int], plan: BatchPlan) -> list[RowNumbers]:
        """This rank's micro-batches; responses to one prompt stay together, for they share its forward."""
        ppo, samples = self.settings.ppo, self.settings.rollout.samples
        together = samples if len(rows) % (samples * plan.world_size) == 0 else 1
        if ppo.micro_batch_tokens is not None:
            by_tokens = deal_tokens(rows, lengths, plan, dist.rank(), ppo.micro_batch_tokens, together)
            return [[*micro] for micro in by_tokens]
        return deal(rows, lengths, plan, dist.rank(), together)

    def _step(self, losses: Mapping[str, list[torch.Tensor]]) -> StepReport:
        """Both engines step, or neither; what they did together, each micro-batch's losses added up."""
        engines = {"policy": self.engines.actor, "value": self.engines.critic}
        reports = optimizer_steps([engines[name] for name in losses], list(losses.values()))
        for name, report in zip(losses, reports, strict=True):
            for metric, value in report.metrics(name).items():
                if math.isfinite(value):
                    self.averages.add(metric, value, 1)
        sums = tuple(sum(each) for each in itertools.zip_longest(*(r.losses for r in reports), fillvalue=0.0))
        return dataclasses.replace(reports[0], losses=sums)

    def _actor_backward(self, rows: torch.Tensor, global_tokens: float) -> torch.Tensor:
        """Forward and backward of the actor on one micro-batch, its loss sum; rows [b] index the experience."""
        experience, ppo = self.experience, self.settings.ppo
        micro, mask = experience.sequences.micro_batch(rows), experience.mask[rows]
        advantages = experience.advantages[rows]
        temperature, with_entropy = self.settings.rollout.temperature, ppo.entropy_coef > 0
        found = self.engines.actor(micro.ids, micro.mask, micro.score_mask, temperature, with_entropy)
        logprobs, entropy = (micro.align(x) for x in found[:2])
        old_logprobs = logprobs.detach() if experience.updates_once else experience.logprobs[rows]
        losses = clipped_policy_loss(logprobs, old_logprobs, advantages, ppo.clip, ppo.clip_high, ppo.dual_clip)
        if self.settings.rollout.weighs_tokens:
            losses = losses * self._importance(rows)
        if ppo.kl_in == "loss":
            losses = losses + experience.kl_coef * kl_estimate(logprobs, experience.ref_logprobs[rows], ppo.kl_kind)
        if with_entropy:
            losses = losses - ppo.entropy_coef * entropy
        loss = masked_sum(losses, mask)
        objective = loss
        if (head := self.settings.value_head) is not None:
            old_kl = masked_sum(kl_estimate(old_logprobs, logprobs, "k3"), mask)
            value_loss = self._value_loss(micro.before_response(found[2]), rows)
            objective = loss + head.old_policy_kl_coef * old_kl + head.coef * value_loss
        loss_sum = backward_mean(self.engines.actor, objective, global_tokens)
        with torch.no_grad():
            tokens, ratio = mask.sum(), (logprobs - old_logprobs).exp()
            outside = (ratio < 1 - ppo.clip) | (ratio > 1 + (ppo.clip_high or ppo.clip))
            approx_kl = masked_sum(kl_estimate(old_logprobs, logprobs, "k3"), mask)
            self.averages.add("policy/loss", loss, tokens)
            self.averages.add("policy/ratio", masked_sum(ratio, mask), tokens)
            if self.weights_sampled:
                self.averages.add("policy/first_ratio_error", masked_sum((ratio - 1).abs(), mask), tokens)
            self.averages.add("policy/clipfrac", masked_sum(outside.float(), mask), tokens)
            for averages in (self.averages, self.epoch_kl):
                averages.add("policy/approx_kl", approx_kl, tokens)
        return loss_sum

    def _importance(self, rows: torch.Tensor) -> torch.Tensor:
        """[b,R] of the weights that training had when another engine sampled with them."""
        experience, rollout = self.experience, self.settings.rollout
        assert experience.sampled_logprobs is not None and rollout.importance_sampling != "off"
        logprobs, sampled = experience.logprobs[rows], experience.sampled_logprobs[rows]
        return importance_weights(logprobs, sampled, rollout.importance_cap, rollout.importance_sampling)

    def _critic_backward(self, rows: torch.Tensor, global_tokens: float) -> torch.Tensor:
        """The same of the critic."""
        micro = self.experience.sequences.micro_batch(rows)
        values = micro.before_response(self.engines.critic(micro.ids, micro.mask))
        return backward_mean(self.engines.critic, self._value_loss(values, rows), global_tokens)

    def _value_loss(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """values [b,R] -> the sum of their losses over real tokens, noted in the metrics."""
        experience, ppo = self.experience, self.settings.ppo
        mask, old_values, returns = experience.mask[rows], experience.values[rows], experience.returns[rows]
        if ppo.value_loss == "huber":
            losses, clip = huber_value_loss(values, returns, ppo.huber_delta), None
        else:
            losses, clip = clipped_value_loss(values, old_values, returns, ppo.value_clip), ppo.value_clip
        loss = masked_sum(losses, mask)
        with torch.no_grad():
            tokens = mask.sum()
            far = (values - old_values).abs() > (float("inf") if clip is None else clip)
            self.averages.add("value/loss", loss, tokens)
            self.averages.add("value/clipfrac", masked_sum(far.float(), mask), tokens)
        return loss

    def _pretraining_backward(self, batches: list[SFTBatch], coef: float) -> list[torch.Tensor]:
        """coef * mean over the blocks' tokens of -log p, added to the actor's gradient (InstructGPT, eq. 2)."""
        device = self.experience.logprobs.device
        tokens = float(sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches))
        global_tokens = dist.sum_over_ranks({"tokens": tokens}, device)["tokens"]
        losses = []
        for batch in batches:
            batch = batch.to(device)
            logprobs = self.engines.actor(batch.input_ids, batch.attention_mask, batch.loss_mask)[0]
            losses.append(backward_mean(self.engines.actor, -coef * logprobs.sum(), global_tokens))
            self.averages.add("policy/pretraining_loss", -logprobs.detach().sum(), batch.loss_mask[:, 1:].sum())
        return losses


@torch.no_grad()
def check_first_iteration(
    engines: Engines, experience: Experience, settings: PPOConfig, backend: str, untrained: bool = True
) -> None:
    """Before this process's first update: training's own forward gives the log-probabilities of the rollout again
    (ratio 1), and an `untrained` actor that starts as its reference has KL 0. Dropout left on, a wrong mask, another
    temperature or a `backend` that computes something else fail here. As in check_sampler, what is compared is every
    token in float32 and the mean with less: a logit of 20 has steps of 0.125 in bf16.

    Raises:
        UserError: on every rank, with the two numbers.
    """
    check_sampler(experience, settings, backend)
    engines.actor.train()
    ranks = dist.world_size()
    rows = torch.arange(dist.rank(), min(len(experience.logprobs), CHECKED_ROWS * ranks), ranks)
    micro, mask = experience.sequences.micro_batch(rows), experience.mask[rows]
    found = micro.align(engines.actor(micro.ids, micro.mask, micro.score_mask, settings.rollout.temperature)[0])
    compare = _largest if settings.precision == "float32" else _mean
    log_ratio = compare(found - experience.logprobs[rows], mask)
    kl = compare(kl_estimate(experience.logprobs, experience.ref_logprobs), experience.mask)
    if settings.reference_path != settings.actor_path or not untrained:
        kl = 0.0
    worst: dict[str, Any] = dist.max_over_ranks({"log_ratio": log_ratio, "kl": kl}, experience.logprobs.device)
    tolerance = FORWARD_TOLERANCE[settings.precision]
    if max(worst.values()) > tolerance:
        fix = "" if backend == "padded" else "set rollout.backend=padded, and "
        raise UserError(
            f"before the first update the log-ratio is {worst['log_ratio']:.2e} and the KL to the reference "
            f"{worst['kl']:.2e}, both should be 0 (tolerance {tolerance}): the model's forward differs between "
            f"sampling (backend {backend}), scoring and training; {fix}report this with the model's config.json"
        )


def check_sampler(experience: Experience, settings: PPOConfig, backend: str) -> None:
    """Before this process's first update: the backend's log-probabilities are those of training's forward. In float32
    every token's; with less, where single tokens may differ by more, their mean over tokens.

    Raises:
        UserError: on every rank, with the numbers.
    """
    if experience.sampled_logprobs is None:
        return
    difference = (experience.logprobs - experience.sampled_logprobs).abs()
    mean, largest = _mean(difference, experience.mask), _largest(difference, experience.mask)
    tolerance, compared = FORWARD_TOLERANCE[settings.precision], largest if settings.precision == "float32" else mean
    if not compared <= tolerance:
        fix = "report this with the model's config.json"
        if backend != "padded":
            fix = f"set rollout.backend to {'padded' if backend == 'static' else 'static or padded'}, or {fix}"
        raise UserError(
            f"the log-probabilities of rollout backend {backend} differ from the training forward's by {mean:.2e} per "
            f"token, {largest:.2e} at most ({settings.precision}: tolerance {tolerance}); {fix}"
        )


def _mean(x: torch.Tensor, mask: torch.Tensor) -> float:
    """x [B,R], mask [B,R] -> the mean |x| over real tokens; nan counts as infinite."""
    return float(masked_mean(x.abs().nan_to_num(nan=torch.inf), mask))


def _largest(x: torch.Tensor, mask: torch.Tensor) -> float:
    """x [B,R], mask [B,R] -> the largest |x| of a real token; nan, which compares as small, counts as infinite."""
    return float(x.abs().nan_to_num(nan=torch.inf).masked_fill(~mask, 0.0).max())
