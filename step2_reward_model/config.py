"""Settings of step 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tristage.config import Kind, TrainSettings


class RewardModelConfig(TrainSettings):
    """Reward model: rows are prompts with two or more ranked answers; batches count prompts."""

    kind: ClassVar[Kind] = "ranking"
    step: ClassVar[int] = 2
    loss: Literal["pairs", "best", "tokens", "elo"] = Field(
        "pairs",
        description="pairs: every pair of a prompt's answers, at their last tokens; tokens: the same at every token "
        "from where the two differ; best: softmax of the best among all; elo: regression on a ranking's Elo ratings.",
    )
    margin: float = Field(
        0.0, ge=0, description="By this much a rank's difference must the better answer lead (pairs, tokens); 0 is off."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Chance that a pair is labelled the wrong way round (pairs, tokens); 0 is off."
    )
    centering: float = Field(
        0.0, ge=0, description="Weight of (better + worse)^2, which keeps scores near 0 (pairs, tokens); 0 is off."
    )
    normalize: bool = Field(
        True, description="Export scores shifted and scaled: mean 0, deviation 1 over best answers of the training set."
    )
    normalize_rows: int = Field(1000, gt=0, description="At most so many training prompts give `normalize` an answer.")

    @model_validator(mode="after")
    def _options_of_pairs(self) -> RewardModelConfig:
        for name in ("margin", "label_smoothing", "centering"):
            if getattr(self, name) and self.loss not in ("pairs", "tokens"):
                raise ValueError(
                    f"key `{name}`: `loss: {self.loss}` has no pairs; set `{name}` to 0, or `loss` to pairs or tokens"
                )
        return self
