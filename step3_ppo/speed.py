"""How fast an iteration was, by phase: rollout, scoring, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from step3_ppo.build import PPORun
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Responses
from tristage.batches import Experience
from tristage.models.flops import Work


def speed_metrics(
    run: PPORun, own: Responses, experience: Experience, losses: Mapping[str, float], seconds: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each phase, tokens (prompt and response, real ones) and responses per second over all ranks, model
    FLOP/s, the slowest rank's rollout over the median rank's, and peak memory. A collective.
    """
    speed, mask, total = run.speed, experience.sequences.attention_mask, sum(seconds.values())
    rollouts, memory = speed.of_all_ranks(seconds["time/rollout"]).unbind(dim=1)
    work = Work.of(mask, experience.mask)
    scalar = dataclasses.replace(work, scored=work.tokens)  # a value for each token
    work_of = {"actor": work, "reference": work, "reward": scalar, "critic": scalar}
    trained = [name for name, metric in (("actor", "policy/loss"), ("critic", "value/loss")) if metric in losses]
    flops = {
        "rollout": speed.forward("actor", work),
        "score": sum(speed.forward(name, work_of[name]) for name in _scorers(own, run.settings)),
        "update": losses["policy/epochs"] * sum(speed.training(name, work_of[name]) for name in trained),
    }
    metrics = {
        "time/iteration": total,
        "time/rank_spread": float(rollouts.max() / rollouts.median()),
        "throughput/tokens_per_second": work.tokens / total,
        "throughput/samples_per_second": work.rows / total,
        "throughput/response_tokens_per_second": work.scored / float(rollouts.max()),
        "memory/peak_gib": float(memory.max()),
    }
    for phase, done in flops.items():
        metrics |= speed.utilisation(f"{phase}_", done, seconds[f"time/{phase}"])
    return metrics | dict(seconds)


def _scorers(own: Responses, settings: PPOConfig) -> list[str]:
    """The engines whose forwards scored an iteration, one name per forward."""
    names = ["actor"] if own.logprobs_from == "forward" else []
    names.append("actor" if settings.reference is None else "reference")
    if settings.reward.model is not None and not settings.reward.own_tokenizer:
        names.append("critic" if settings.reward.share_critic_trunk else "reward")
    return names if settings.critic is None else [*names, "critic"]
