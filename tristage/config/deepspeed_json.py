"""DeepSpeed JSON files: what they may set, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tristage.config.deepspeed_keys import check_keys
from tristage.config.reading import find_file
from tristage.config.settings import RunSettings
from tristage.errors import UserError

# The step's YAML owns these; a DeepSpeed JSON that sets one would silently win or lose against it.
OWNED_BY_YAML = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "managed_gradient_accumulation": "global_batch and micro_batch",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}
# Settings of zero_optimization -> the lowest ZeRO stage that reads them; DeepSpeed ignores them below it.
NEEDS_STAGE = {
    "offload_optimizer": 1,
    "offload_param": 3,
    "zero_hpz_partition_size": 3,
    "zero_quantized_weights": 3,
    "zero_quantized_nontrainable_weights": 3,
    "zero_quantized_gradients": 3,
}


def read_deepspeed_json(path: str, settings: RunSettings, key: str = "deepspeed") -> dict[str, Any]:
    """The DeepSpeed JSON that `key` names.

    Raises:
        UserError: no such file, not JSON, it sets something that the YAML owns, what its stage ignores, or a key of
            deepspeed_keys.
    """
    file = find_file(path, settings, key)
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); fix that line") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f'{file}: holds no settings of ZeRO; write {{"zero_optimization": {{"stage": 2}}}}')
    for name, owner in OWNED_BY_YAML.items():
        if name in values:
            raise UserError(f"{file}: `{name}` is set by `{owner}` in {settings.file}; remove it from the JSON")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    _check_zero(file, values.get("zero_optimization", {}), stage)
    check_keys(file, values)
    return values


def _check_zero(file: Path, zero: dict[str, Any], stage: int) -> None:
    """Raises UserError for a ZeRO setting that DeepSpeed would silently ignore or fail on with an assertion."""
    for name, least in NEEDS_STAGE.items():
        value = zero.get(name)
        if isinstance(value, dict):
            value = value.get("device", "none") != "none"
        is_set = value > 1 if type(value) is int else bool(value)  # groups of 1 rank are none
        if is_set and stage < least:
            raise UserError(f"{file}: zero_optimization.{name} does nothing at stage {stage}; remove it or use stage 3")
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if not isinstance(offload, dict):
            raise UserError(f'{file}: zero_optimization.{name} is {offload!r}; write {{"device": "cpu"}}')
        if offload.get("device") == "nvme" and (stage != 3 or not offload.get("nvme_path")):
            raise UserError(f"{file}: zero_optimization.{name} to nvme needs stage 3 and an `nvme_path`; give both")
    ranks, group = world_size_from_environment(), zero.get("zero_hpz_partition_size") or 1
    if not isinstance(group, int) or ranks % group:
        raise UserError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {group!r}, which does not divide {ranks} ranks; "
            "give the ranks of one node"
        )


def world_size_from_environment() -> int:
    """Ranks of this launch, known before anything is set up; 1 outside the deepspeed launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
