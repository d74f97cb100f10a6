"""AdamW and its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from tristage.config import OptimizerSettings


def _adamw(model: nn.Module, config: dict[str, Any], settings: OptimizerSettings) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the full shape in ds_shape
            (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adam_options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    offloads = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offloads and torch.cuda.is_available():
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **adam_options)
    # One pass over parameter, gradient and moments. On a CPU an element's result depends on no other, so it is the
    # same in a flat partition (ZeRO) and in a parameter of its own.
    return torch.optim.AdamW(groups, fused=True, **adam_options)


def schedule_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): linear warm-up, then the schedule.

    The warm-up's first step already learns, and cosine and linear reach 0 one step after the last.
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if settings.schedule == "linear" else 1.0
