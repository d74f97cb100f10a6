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


def read_deepspeed_json(path: str, settings: RunSettings, key: str = "deepspeed") -> dict[str, Any]:
    """The DeepSpeed JSON that `key` names.

    Raises:
        UserError: no such file, not JSON, or a key that deepspeed_keys does not let through at its stage.
    """
    file = find_file(path, settings, key)
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); fix that line") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f'{file}: holds no settings of ZeRO; write {{"zero_optimization": {{"stage": 2}}}}')
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    _check_offload(file, values.get("zero_optimization", {}), stage)
    check_keys(file, values, settings.file, settings.deepspeed_unchecked)
    _check_groups(file, values.get("zero_optimization", {}))
    return values


def _check_offload(file: Path, zero: dict[str, Any], stage: int) -> None:
    """Raises UserError for an offload that DeepSpeed would fail on with an assertion."""
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if not isinstance(offload, dict):
            raise UserError(f'{file}: zero_optimization.{name} is {offload!r}; write {{"device": "cpu"}}')
        if offload.get("device") == "nvme" and (stage != 3 or not offload.get("nvme_path")):
            raise UserError(f"{file}: zero_optimization.{name} to nvme needs stage 3 and an `nvme_path`; give both")


def _check_groups(file: Path, zero: dict[str, Any]) -> None:
    """Raises UserError for groups of ranks that do not divide all ranks."""
    ranks, group = world_size_from_environment(), zero.get("zero_hpz_partition_size") or 1
    if not isinstance(group, int) or ranks % group:
        raise UserError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {group!r}, which does not divide {ranks} ranks; "
            "give the ranks of one node"
        )


def world_size_from_environment() -> int:
    """Ranks of this launch, known before anything is set up; 1 outside the deepspeed launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
