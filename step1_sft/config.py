"""Settings of step 1."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tristage.config import Kind, TrainSettings


class SFTConfig(TrainSettings):
    """Supervised fine-tuning: prompts with the answers to imitate."""

    kind: ClassVar[Kind] = "sft"
    step: ClassVar[int] = 1
    packing: bool = Field(
        False,
        description="Pack several rows into sequences of max_tokens, without attention between rows; batches then "
        "count sequences.",
    )
