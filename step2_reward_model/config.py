"""Settings of step 2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tristage.config import EngineSpec, Kind, TrainSettings


class RewardModelConfig(TrainSettings):
    """Reward model: rows are prompts with two or more ranked answers; batches count prompts."""

    kind: ClassVar[Kind] = "ranking"
    step: ClassVar[int] = 2
    loss: Literal["pairs", "best", "tokens", "elo"] = Field(
        "pairs",
        description="pairs: every pair of answers to a prompt, at their last tokens; tokens: every pair, at each "
        "token from where the two differ; best: softmax of the best answer over all; elo: regression on Elo ratings "
        "of the ranking.",
    )
    margin: float = Field(0.0, ge=0, description="Required score gap per rank difference (pairs, tokens); 0 disables.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that the label of a pair is flipped (pairs, tokens); 0 disables."
    )
    centering: float = Field(
        0.0, ge=0, description="Weight of (better + worse)^2, which keeps scores near 0 (pairs, tokens); 0 disables."
    )
    normalize: bool = Field(
        True,
        description="Shift and scale exported scores to mean 0 and standard deviation 1 over best training answers.",
    )
    normalize_prompts: int = Field(
        1000,
        gt=0,
        description="Maximum number of training prompts used to estimate mean and deviation for `normalize`.",
    )

    @model_validator(mode="after")
    def _options_of_pairs(self) -> RewardModelConfig:
        for name in ("margin", "label_smoothing", "centering"):
            if getattr(self, name) and self.loss not in ("pairs", "tokens"):
                raise ValueError(
                    f"key `{name}`: `loss: {self.loss}` has no pairs; set `{name}` to 0, or `loss` to pairs or tokens"
                )
        return self

    def engine_specs(self) -> list[EngineSpec]:
        (model,) = super().engine_specs()
        # two answers per prompt
        return [dataclasses.replace(model, holds="new_reward_model", rows=2 * self.micro_batch)]
