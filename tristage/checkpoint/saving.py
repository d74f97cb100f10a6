"""Write a checkpoint of all ranks, make it count by its manifest and a rename, and remove what need not be kept."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tristage import dist
from tristage.checkpoint.finding import _folders, _number, _state_of
from tristage.config import KeepBest, RunSettings
from tristage.engine.state import engine_numbers, engine_pieces
from tristage.errors import UserError
from tristage.storage.durable import (
    MANIFEST,
    Entry,
    is_full,
    manifest_text,
    remove_tree,
    replace_text,
    sync,
    write_text,
)
from tristage.storage.free_space import free_on_disk
from tristage.storage.pieces import Piece, write_pieces

NON_TENSOR_BYTES = 1 << 20  # a generous allowance for JSON files
T = TypeVar("T")


def save_checkpoint(
    settings: RunSettings,
    step: int,
    engines: dict[str, Any],
    control: dict[str, Any] | None = None,
    own: list[Piece] | None = None,
    heldout: Mapping[str, float] | None = None,
) -> None:
    """Write checkpoint `step`, then point `latest` at it, then remove what need not be kept. A collective.

    `control` (numbers, the same on every rank) and `own` (this rank's pieces) are saved with the engines; `heldout`
    are the step's held-out metrics, on rank 0, if it has any. Data order and sampling are functions of (seed, step);
    the global random states are also saved, for user functions that draw.

    Raises:
        UserError: on every rank, if one cannot write; the partial checkpoint is removed, older ones are kept.
    """
    root = Path(settings.output) / "checkpoints"
    folder = root / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shards = {name: engine_pieces(engine) for name, engine in engines.items()}
    if own is not None:
        shards["own"] = own
    mine = sum(piece.size for pieces in shards.values() for piece in pieces)
    need = sum(dist.gather_objects(mine)) + NON_TENSOR_BYTES
    state = {
        "step": step,
        "ranks": dist.world_size(),
        "zero_stages": {name: engine.zero_optimization_stage() for name, engine in engines.items()},
        "engines": {name: engine_numbers(engine) for name, engine in engines.items()},
        "control": control,
        "settings": settings.model_dump(mode="json"),
    }

    def prepare() -> None:
        if dist.is_main():
            root.mkdir(parents=True, exist_ok=True)
            for left in root.glob("*.partial"):  # of a run that was killed
                remove_tree(left) if left.is_dir() else left.unlink()
            if free_on_disk(root) < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name in shards:
                (partial / name).mkdir(parents=True)

    def write() -> dict[str, Entry]:
        rank = dist.rank()
        files = {f"{name}/rank{rank}.safetensors": pieces for name, pieces in shards.items()}
        entries = {name: write_pieces(partial / name, pieces) for name, pieces in files.items()}
        drawn = f"random_rank{rank}.json"
        return entries | {drawn: write_text(partial / drawn, json.dumps(_random_state()))}

    _on_all_ranks(prepare, partial, need)
    written = _on_all_ranks(write, partial, need)

    def finish() -> None:
        if dist.is_main():
            files = {name: entry for part in written for name, entry in part.items()}
            values = state | _inputs_of(settings) | {"best": _best_record(settings.keep_best, heldout)}
            files["state.json"] = write_text(partial / "state.json", json.dumps(values, indent=1))
            _publish(root, folder, partial, files)
            _rotate(root, settings)

    _on_all_ranks(finish, partial, need)


def _publish(root: Path, folder: Path, partial: Path, files: dict[str, Entry]) -> None:
    """Publish a complete folder: write its manifest, sync every name, rename it, and last update the pointer."""
    number = 1 + max(map(_number, _folders(root)), default=0)
    write_text(partial / MANIFEST, manifest_text(files, number))
    for inside in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync(inside)
    if folder.exists():  # of an earlier attempt; it stays usable until the new one has its name
        aside = folder.with_name(folder.name + ".old")
        remove_tree(aside)
        os.rename(folder, aside)
    os.rename(partial, folder)
    sync(root)
    sync(root.parent)
    replace_text(root / "latest", folder.name)


def _rotate(root: Path, settings: RunSettings) -> None:
    """Remove checkpoints that are neither among the newest nor kept for their step or metric."""
    numbers = {folder: _number(folder) for folder in _folders(root)}
    valid = sorted((f for f, number in numbers.items() if number >= 0 and f.suffix != ".old"), key=numbers.__getitem__)
    keep = set(valid[-settings.keep_last :])
    if settings.keep_every_n_steps:
        keep |= {folder for folder in valid if _state_of(folder).get("step", 1) % settings.keep_every_n_steps == 0}
    if settings.keep_best is not None:
        keep |= _best(valid, settings.keep_best)
    for old in numbers:
        if old not in keep:
            going = old.with_name(old.name + ".partial")  # a half-deleted folder must not look like a checkpoint
            remove_tree(going)
            os.rename(old, going)
            remove_tree(going)


def _best(folders: Iterable[Path], rule: KeepBest) -> set[Path]:
    """The folder with the best value of the metric, the oldest if several have it; empty if no folder has one."""
    values = {}
    for folder in folders:
        record = _state_of(folder).get("best") or {}
        if record.get("metric") == rule.metric:
            values[folder] = record["value"] if rule.lower_is_better else -record["value"]
    return {min(values, key=lambda folder: values[folder])} if values else set()


def _best_record(rule: KeepBest | None, heldout: Mapping[str, float] | None) -> dict[str, Any] | None:
    if rule is None or heldout is None:
        return None
    if rule.metric not in heldout:
        raise UserError(f"key `keep_best.metric`: there is no held-out {rule.metric}; use one of {', '.join(heldout)}")
    value = float(heldout[rule.metric])
    return {"metric": rule.metric, "value": value} if math.isfinite(value) else None


def _on_all_ranks(action: Callable[[], T], partial: Path, need: int) -> list[T]:
    """Run `action` on every rank; its results in rank order. If the disk fails on one, all raise. A collective."""
    result, problem, root = None, None, partial.parent
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if is_full(error):
            problem = (
                f"{root}: the disk is full: {partial.stem} needs {need} bytes, {free_on_disk(root)} are free; "
                "make room, or set `output` to a larger disk; the checkpoints before it are complete"
            )
        else:
            hint = "all nodes must see `output`" if error.errno == errno.ENOENT else "fix that and start again"
            problem = f"{error.filename or root}: {partial.stem} cannot be written ({error.strerror}); {hint}"
    outcomes = dist.gather_objects((result, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        if dist.is_main():
            remove_tree(partial)
        raise UserError(problems[0])
    return [result for result, _ in outcomes]


def _inputs_of(settings: RunSettings) -> dict[str, Any]:
    """The fingerprints of this run's rows and models, from environment.json (run.start)."""
    noted = Path(settings.output) / "environment.json"
    values = json.loads(noted.read_text()) if noted.is_file() else {}
    return {"data": values.get("data"), "models": values.get("models", {})}


def _random_state() -> dict[str, Any]:
    """Of this rank's global generators, as JSON."""
    _, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    python = random.getstate()
    return {
        "python": python,
        "numpy": [np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": cuda,
    }
