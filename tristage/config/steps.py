"""Which step a YAML is for, and its settings class: the one place that knows the steps by name."""

from __future__ import annotations

import importlib
from pathlib import Path

from tristage.config import RunSettings
from tristage.errors import UserError

STEPS = ("step1_sft", "step2_reward_model", "step2_dpo", "step3_ppo")


def settings_class(config: str, step: str | None) -> type[RunSettings]:
    """The settings of the step that a YAML is for. Raises UserError when neither its name nor `step` tells."""
    found = [name for name in STEPS if name == step or (step is None and name in Path(config).stem)]
    if not found:
        raise UserError(f"{config}: which step is this for? Give --step {' or '.join(STEPS)}")
    module = importlib.import_module(f"{found[0]}.config")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RunSettings) and value.__module__ == module.__name__
    )
