"""Checkpoints to continue from: all engines of a step in one folder, the pointer written last.

    OUT/checkpoints/step_000200/{actor/, critic/, state.json}    OUT/checkpoints/latest
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tristage import dist
from tristage.config import RunSettings, world_size_from_environment
from tristage.errors import UserError
from tristage.models.kernels import is_quantized
from tristage.models.saving import remove_tree


def save_checkpoint(
    settings: RunSettings,
    step: int,
    engines: dict[str, Any],
    control: dict[str, Any] | None = None,
    own: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write every engine as checkpoint `step`, then point `latest` at it. A collective.

    `control` (numbers, the same on every rank) and `own` (tensors of this rank) are what else carries over.

    It is written beside and renamed, so a checkpoint folder is whole; older ones than the last `keep_last`
    are removed afterwards. Data order and sampling are functions of (seed, step) and need no state of their own.
    """
    root = Path(settings.output) / "checkpoints"
    folder = root / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if dist.is_main():
        remove_tree(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        # Quantised weights are frozen and come from the base model again; DeepSpeed could not read them back.
        without = {"exclude_frozen_parameters": True} if is_quantized(engine.module.model) else {}
        engine.save_checkpoint(str(partial), tag=name, save_latest=False, **without)
    if own is not None:
        torch.save(own, partial / f"own_rank{dist.rank()}.pt")
    dist.barrier()
    if dist.is_main():
        stages = {name: engine.zero_optimization_stage() for name, engine in engines.items()}
        state = {"step": step, "ranks": dist.world_size(), "zero_stages": stages, "control": control}
        (partial / "state.json").write_text(json.dumps(state))
        remove_tree(folder)
        partial.rename(folder)
        _write_whole(root / "latest", folder.name)
        # By age, not by name: a run that was started again (resume=never) has lower steps than what it finds.
        by_age = sorted(root.glob("step_[0-9]*[0-9]"), key=lambda found: (found.stat().st_mtime_ns, found.name))
        for old in by_age[: -settings.keep_last]:
            remove_tree(old)
    dist.barrier()


def latest_checkpoint(output: Path) -> Path | None:
    """The folder that `latest` points at; None when there is none."""
    pointer = output / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    folder = output / "checkpoints" / pointer.read_text().strip()
    if not (folder / "state.json").is_file():
        raise UserError(f"{pointer}: points at {folder.name}, which is not there; write the name of a whole checkpoint")
    return folder


def check_resumable(settings: RunSettings, zero_stages: dict[str, int]) -> None:
    """Refuse, before models load, a checkpoint of another number of ranks or other ZeRO stages.

    Raises:
        UserError: names the checkpoint and what differs.
    """
    folder = _checkpoint_to_resume(settings)
    if folder is None:
        return
    state = json.loads((folder / "state.json").read_text())
    ranks = world_size_from_environment()
    if state["ranks"] != ranks:
        raise UserError(
            f"{folder}: was written by {state['ranks']} ranks, this run has {ranks}; start as many, "
            "or start again with resume=never"
        )
    if state["zero_stages"] != zero_stages:
        raise UserError(
            f"{folder}: was written with ZeRO stages {state['zero_stages']}, this run has {zero_stages}; "
            "use the same, or start again with resume=never"
        )


def load_checkpoint(settings: RunSettings, engines: dict[str, Any]) -> int:
    """Restore every engine from the latest checkpoint; its step, 0 when there is none. A collective."""
    folder = _checkpoint_to_resume(settings)
    if folder is None:
        return 0
    for name, engine in engines.items():
        engine.load_checkpoint(str(folder), tag=name, load_module_strict=not is_quantized(engine.module.model))
    dist.barrier()
    step = int(json.loads((folder / "state.json").read_text())["step"])
    dist.print0(f"resumed from {folder}")
    return step


def load_control(settings: RunSettings) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    """(`control`, `own` of this rank) of the latest checkpoint; None for what it has not."""
    folder = _checkpoint_to_resume(settings)
    if folder is None:
        return None, None
    own = folder / f"own_rank{dist.rank()}.pt"
    state = json.loads((folder / "state.json").read_text())
    return state.get("control"), torch.load(own, weights_only=True) if own.is_file() else None


def _checkpoint_to_resume(settings: RunSettings) -> Path | None:
    return latest_checkpoint(Path(settings.output)) if settings.resume == "auto" else None


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text)
    beside.replace(path)
