"""Thresholds of the health monitor, one per condition; training/conditions.py says what each condition means."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from tristage.config.base import SPLIT_AT_COMMAS, Settings


class HealthSettings(Settings):
    """When the health monitor warns: a threshold per condition (docs/health.md), null turns one off."""

    stop_on: Annotated[tuple[str, ...], SPLIT_AT_COMMAS] = Field(
        (), description="Conditions that end the run after a checkpoint, such as kl_runaway; all: every one."
    )
    ratio_not_one: float | None = Field(0.05, gt=0, description="Mean |ratio - 1| of an iteration's first update.")
    kl_not_zero: float | None = Field(0.01, gt=0, description="KL per token before training, to a reference it equals.")
    kl_negative: float | None = Field(0.1, gt=0, description="Nats per response below 0, as a mean of 5 iterations.")
    kl_runaway: float | None = Field(100.0, gt=0, description="KL to the reference, nats per response.")
    kl_per_token_high: float | None = Field(1.0, gt=0, description="KL to the reference, nats per token.")
    eos_rate_low: float | None = Field(0.05, gt=0, le=1, description="Least share of responses that end by themselves.")
    empty_responses: float | None = Field(2.0, gt=0, description="Least mean length of responses, EOS included.")
    at_limit: float | None = Field(0.5, gt=0, lt=1, description="Share of responses cut off, if fewer were at first.")
    score_follows_length: float | None = Field(
        0.8, gt=0, lt=1, description="Correlation of score and length over 10 iterations, once responses have grown."
    )
    entropy_collapse: float | None = Field(0.1, gt=0, lt=1, description="Entropy as a fraction of that at the start.")
    value_useless: float | None = Field(0.0, description="Least explained variance of the critic, over 10 iterations.")
    clipping: float | None = Field(0.3, gt=0, lt=1, description="Share of tokens outside the policy's clip.")
    gradient_spike: float | None = Field(30.0, gt=1, description="Gradient norm over the median of 50 steps.")
    loss_rises: float | None = Field(1.5, gt=1, description="Mean loss of 5 steps over the start or the median of 50.")
    loss_scale_floor: float | None = Field(1.0, gt=0, description="Least loss scale of fp16.")
    identical_responses: float | None = Field(0.5, gt=0, lt=1, description="Share of responses that are the same one.")
    constant_score: float | None = Field(0.0, ge=0, description="Standard deviation of an iteration's scores.")
    score_up_grade_down: float | None = Field(0.05, gt=0, lt=1, description="Fall of the grade's win rate.")
    overfitting: float | None = Field(1.05, gt=1, description="Held-out loss over its lowest.")
    slow_rank: float | None = Field(1.5, gt=1, description="Slowest rank's rollout over the median rank's.")

    @field_validator("stop_on")
    @classmethod
    def _are_conditions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [name for name in cls.model_fields if name != "stop_on"]
        for name in names:
            if name not in (*known, "all"):
                raise ValueError(f"{name} is not a condition; write all, or some of {', '.join(known)}")
        return names

    def stops_on(self, condition: str) -> bool:
        """Whether this condition ends the run."""
        return "all" in self.stop_on or condition in self.stop_on
