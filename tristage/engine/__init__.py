"""DeepSpeed engines. A model enters through `train_engine` or `frozen_engine` and leaves through `full_state_dict`."""

from tristage.engine.engines import (
    DTYPES,
    FORWARD_TOLERANCE,
    backward_mean,
    check_zero_support,
    engine_config,
    free_weights,
    frozen_engine,
    full_state_dict,
    gathered,
    gathered_to_read,
    generation_mode,
    parameters_fit,
    refresh_persistent,
    train_engine,
    zero_stage,
)
from tristage.engine.optimizer import schedule_factor
from tristage.engine.steps import StepReport, optimizer_step, optimizer_steps

__all__ = [
    "DTYPES",
    "FORWARD_TOLERANCE",
    "StepReport",
    "backward_mean",
    "check_zero_support",
    "engine_config",
    "free_weights",
    "frozen_engine",
    "full_state_dict",
    "gathered",
    "gathered_to_read",
    "generation_mode",
    "optimizer_step",
    "optimizer_steps",
    "parameters_fit",
    "refresh_persistent",
    "schedule_factor",
    "train_engine",
    "zero_stage",
]
