"""Settings of step 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tristage.config import Kind, TrainSettings


class RewardModelConfig(TrainSettings):
    """Reward model: rows are prompts with two or more ranked answers; batches count prompts."""

    kind: ClassVar[Kind] = "ranking"
    step: ClassVar[int] = 2
    loss: Literal["pairs", "best"] = Field(
        "pairs", description="pairs: every pair of a prompt's answers; best: softmax of the best among all."
    )
