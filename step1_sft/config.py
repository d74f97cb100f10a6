"""Settings of step 1."""

from __future__ import annotations

from tristage.config import TrainSettings


class SFTConfig(TrainSettings):
    """Supervised fine-tuning: everything it needs is what every training step has."""
