"""From prompts to experience: sample, score, shape rewards, estimate advantages.

P prompt columns, R response columns, B rows of this rank, N = ranks * B rows of the iteration. After `collect`
everything is response-aligned, [B,R], with one mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from step3_ppo.config import PPOConfig
from tristage import dist
from tristage.algo.masking import masked_mean, masked_moments, masked_sum, whiten
from tristage.algo.ppo import explained_variance, gae, kl_estimate, shaped_rewards
from tristage.batches import Experience, PromptBatch, Sequences
from tristage.metrics import Stopwatch
from tristage.models import last_token_scores
from tristage.rollout import PaddedRollout, SamplingConfig, SeededRequest, row_uniforms


class Engines(NamedTuple):
    """The four DeepSpeed engines of step 3."""

    actor: Any
    critic: Any
    reference: Any
    reward: Any


@dataclass(frozen=True, eq=False)
class Responses:
    """This rank's sampled responses and what actor, reference and reward model say of them."""

    sequences: Sequences
    logprobs: torch.Tensor  # [B,R]
    ref_logprobs: torch.Tensor  # [B,R]
    entropy: torch.Tensor  # [B,R]
    scores: torch.Tensor  # [B]


@torch.no_grad()
def collect(
    engines: Engines, rollouts: PaddedRollout, prompts: PromptBatch, draw: int, settings: PPOConfig, watch: Stopwatch
) -> Responses:
    """Sample one response a prompt and score it. A collective.

    `draw` numbers the sampling: the same (seed, draw, prompt) gives the same response on any number of ranks.
    """
    rollout = settings.rollout
    with watch("rollout"):
        uniforms = row_uniforms(settings.seed, draw, prompts.row_index, rollout.max_response_tokens)
        request = SeededRequest(prompts.input_ids, prompts.attention_mask, uniforms)
        sampling = SamplingConfig(rollout.max_response_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        batch = rollouts.generate(request, sampling)
        sequences = Sequences(batch.input_ids, batch.attention_mask, rollouts.eos_id, prompts.input_ids.shape[1])
    with watch("score"):
        for engine in engines:
            engine.eval()
        logprobs, entropy = _score_policy(engines.actor, sequences, settings, with_entropy=True)
        ref_logprobs, _ = _score_policy(engines.reference, sequences, settings, with_entropy=False)
        (scores,) = _in_micro_batches(
            sequences, settings, lambda micro: (last_token_scores(engines.reward(micro.ids, micro.mask), micro.mask),)
        )
    return Responses(sequences, logprobs, ref_logprobs, entropy, scores)


@torch.no_grad()
def make_experience(
    engines: Engines,
    rollouts: PaddedRollout,
    prompts: PromptBatch,
    iteration: int,
    settings: PPOConfig,
    watch: Stopwatch,
) -> tuple[Experience, dict[str, float]]:
    """One iteration's experience, all N rows on every rank, and its metrics. A collective.

    1. Sample and score (collect); 2. values of every state; 3. bring all ranks' rows together;
    4. rewards, advantages, returns; 5. advantages whitened over all N rows.

    Rows are token ids and a few numbers a token: gathering them is cheap, and makes minibatches, whitening and
    metrics the same for any number of ranks.
    """
    ppo = settings.ppo
    own = collect(engines, rollouts, prompts, iteration, settings, watch)  # 1
    with watch("score"):
        (own_values,) = _in_micro_batches(  # 2
            own.sequences, settings, lambda micro: (micro.before_response(engines.critic(micro.ids, micro.mask)),)
        )
        gather = rows_of_all_ranks(prompts)  # 3
        sequences = own.sequences.map(gather)
        logprobs, ref_logprobs, entropy, scores, values = (
            gather(x) for x in (own.logprobs, own.ref_logprobs, own.entropy, own.scores, own_values)
        )
        mask = sequences.response_mask
        rewards = shaped_rewards(  # 4
            scores, logprobs, ref_logprobs, mask, ppo.kl_coef, ppo.reward_clip, ppo.kl_kind
        )
        advantages, returns = gae(values, rewards, mask, ppo.gamma, ppo.lam)
        mean, var = masked_moments(advantages, mask)
        whitened = whiten(advantages, mask, mean, var)  # 5
    experience = Experience(sequences, logprobs, ref_logprobs, values, whitened, returns)
    clipped = torch.zeros_like(scores) if ppo.reward_clip is None else (scores.abs() > ppo.reward_clip).float()
    metrics = response_metrics(sequences, logprobs, ref_logprobs, entropy, scores, torch.ones_like(scores)) | {
        "objective/reward": masked_sum(rewards, mask, dim=1).mean(),
        "objective/score_clipfrac": clipped.mean(),
        "advantages/mean": mean,
        "advantages/std": var.sqrt(),
        "value/mean": masked_mean(values, mask),
        "value/return": masked_mean(returns, mask),
        "value/explained_variance": explained_variance(values, returns, mask),
    }
    return experience, {name: float(value) for name, value in metrics.items()}


def rows_of_all_ranks(prompts: PromptBatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function [B,...] -> [N,...] that gathers, ordered by the prompts' places in their set.

    In rank order a minibatch, and so the update, would hold other rows on another number of ranks.
    """
    order = dist.all_gather_rows(prompts.row_index).argsort(stable=True)
    return lambda x: dist.all_gather_rows(x)[order]


def response_metrics(
    sequences: Sequences,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    entropy: torch.Tensor,
    scores: torch.Tensor,
    weight: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Means over rows of weight 1 (weight [B] is 0 for fillers) of what one looks at first."""
    mask = sequences.response_mask & (weight > 0).unsqueeze(1)
    rows = weight.sum().clamp(min=1)
    kl = kl_estimate(logprobs, ref_logprobs, "k1")
    return {
        "objective/score": (scores * weight).sum() / rows,
        "objective/score_std": scores[weight > 0].std(correction=0),
        "objective/kl": masked_sum(kl, mask) / rows,
        "objective/kl_per_token": masked_mean(kl, mask),
        "objective/entropy": masked_mean(entropy, mask),
        "rollout/length": mask.sum() / rows,
        "rollout/eos_rate": (sequences.ended * weight).sum() / rows,
    }


def _score_policy(
    engine: Any, sequences: Sequences, settings: PPOConfig, with_entropy: bool
) -> list[torch.Tensor]:
    """(logprobs [B,R], entropy [B,R]) of the responses at the sampling temperature."""

    def score(micro: Any) -> tuple[torch.Tensor, ...]:
        found = engine(micro.ids, micro.mask, micro.score_mask, settings.rollout.temperature, with_entropy)
        return tuple(micro.align(x) for x in found)

    return _in_micro_batches(sequences, settings, score)


def _in_micro_batches(
    sequences: Sequences, settings: PPOConfig, score: Callable[[Any], tuple[torch.Tensor, ...]]
) -> list[torch.Tensor]:
    """Run `score` on micro-batches of rows of like length; its results [b,...] in the rows' order, [B,...].

    Micro-batches are those of training, so that the old log-probabilities come from the same forward as the new.
    """
    order = sequences.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
    found = [score(sequences.micro_batch(rows)) for rows in order.split(settings.ppo.micro_batch)]
    back = order.argsort()
    return [torch.cat(parts)[back] for parts in zip(*found, strict=True)]
