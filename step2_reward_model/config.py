"""Settings of step 2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tristage.config import TrainSettings


class RewardModelConfig(TrainSettings):
    """Reward model: rows are prompts with two or more ranked answers; batches count prompts."""

    loss: Literal["pairs", "best"] = Field(
        "pairs", description="pairs: every pair of a prompt's answers; best: softmax of the best among all."
    )
