"""Restore a checkpoint into engines and random states, after checking that the disk has room for the next ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tristage import dist
from tristage.checkpoint.finding import Checkpoint
from tristage.checkpoint.saving import NON_TENSOR_BYTES
from tristage.config import RunSettings
from tristage.engine.state import engine_size, restore_engine
from tristage.errors import UserError
from tristage.storage.free_space import free_on_disk


def load_checkpoint(settings: RunSettings, found: Checkpoint | None, engines: dict[str, Any]) -> int:
    """Restore engines and random states from the result of `find_checkpoint`; returns its step, or 0. A collective.

    Raises:
        UserError: the disk has no room for further checkpoints, or the checkpoint is of other models.
    """
    _check_room(settings, engines, found)
    if found is None:
        return 0
    for name, engine in engines.items():
        pieces = found.pieces(name)
        if pieces is None:
            raise UserError(f"{found.folder}: has no {name}; use another checkpoint, or start again with resume=never")
        restore_engine(engine, pieces, found.state["engines"][name])
    stages = {name: engine.zero_optimization_stage() for name, engine in engines.items()}
    if (dist.world_size(), stages) != (found.state["ranks"], found.state["zero_stages"]):
        dist.print0(
            f"{found.folder} was written by {found.state['ranks']} ranks at ZeRO {found.state['zero_stages']}, this "
            f"run has {dist.world_size()} at {stages}: weights, moments, schedule and place in the data carry over"
        )
    drawn = found.folder / f"random_rank{dist.rank()}.json"
    if drawn.is_file():  # absent if the run had fewer ranks
        _set_random_state(json.loads(drawn.read_text()))
    dist.barrier()
    dist.print0(f"resumed from {found.folder}")
    return int(found.state["step"])


def _check_room(settings: RunSettings, engines: dict[str, Any], found: Checkpoint | None) -> None:
    """Refuse, before training, a disk without room for two checkpoints; a resumed run already has one."""
    size = sum(dist.gather_objects(sum(map(engine_size, engines.values())))) + NON_TENSOR_BYTES
    need = size if found is not None else 2 * size
    free = dist.gather_objects(free_on_disk(Path(settings.output)))[0]
    if settings.check_disk and free < need:
        raise UserError(
            f"{settings.file}: key `output`: a checkpoint takes {size} bytes, {need} must be free in {settings.output} "
            f"and {free} are; make room, use a larger disk, or set `check_disk: false`"
        )


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
