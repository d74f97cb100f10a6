"""Checkpoints to continue from: all state of a step in one folder, whole or not there, verified before it is used.

    OUT/checkpoints/step_000200/{actor/, critic/, own/, random_rank0.json, state.json, manifest.json}
    OUT/checkpoints/latest                  the newest folder's name, for people and scripts; nothing here reads it

A folder is written beside, as step_000200.partial, and renamed when every file is on the disk. On resume the newest
folder whose manifest holds counts; sizes and checksums of all its files are compared first. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch

from tristage import dist
from tristage.changes import changed_inputs, changed_settings, listed
from tristage.config import KeepBest, RunSettings
from tristage.durable import (
    MANIFEST,
    Entry,
    Manifest,
    is_full,
    manifest_text,
    read_manifest,
    replace_text,
    sync,
    write_text,
    wrong_content,
    wrong_size,
)
from tristage.engine_state import engine_numbers, engine_pieces, engine_size, restore_engine
from tristage.errors import UserError
from tristage.free_space import free_on_disk
from tristage.inputs import named_models
from tristage.models.saving import remove_tree
from tristage.pieces import Piece, PieceReader, write_pieces

MARGIN = 1 << 20  # bytes of a checkpoint that are no tensors, generously

Models = Mapping[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint that this run continues from."""

    folder: Path
    state: dict[str, Any]  # state.json

    @property
    def control(self) -> dict[str, Any] | None:
        """The numbers that were saved with it."""
        return self.state["control"]  # type: ignore[no-any-return]

    def pieces(self, name: str) -> PieceReader | None:
        """An engine's tensors, or those that were given as `own`; None of what was not saved."""
        return PieceReader(self.folder / name, self.state["ranks"]) if (self.folder / name).is_dir() else None


# -- saving ------------------------------------------------------------------------------------------------


def save_checkpoint(
    settings: RunSettings,
    step: int,
    engines: dict[str, Any],
    control: dict[str, Any] | None = None,
    own: list[Piece] | None = None,
    heldout: Mapping[str, float] | None = None,
) -> None:
    """Write checkpoint `step`, then point `latest` at it, then remove what need not be kept. A collective.

    `control` (numbers, the same on every rank) and `own` (this rank's pieces) are what else carries over; `heldout`
    are the held-out metrics of the step on rank 0, where it has any. Data order and sampling are functions of
    (seed, step); the global random states are kept besides, for functions of the user's that draw.

    Raises:
        UserError: on every rank, when one cannot write; nothing of the checkpoint is left then, and older ones are.
    """
    root = Path(settings.output) / "checkpoints"
    folder = root / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shards = {name: engine_pieces(engine) for name, engine in engines.items()}
    if own is not None:
        shards["own"] = own
    mine = sum(piece.size for pieces in shards.values() for piece in pieces)
    need = sum(dist.gather_objects(mine)) + MARGIN
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

    _together(prepare, partial, need)
    written = _together(write, partial, need)

    def finish() -> None:
        if dist.is_main():
            files = {name: entry for part in written for name, entry in part.items()}
            values = state | _inputs_of(settings) | {"best": _judge(settings.keep_best, heldout)}
            files["state.json"] = write_text(partial / "state.json", json.dumps(values, indent=1))
            _publish(root, folder, partial, files)
            _rotate(root, settings)

    _together(finish, partial, need)


def _publish(root: Path, folder: Path, partial: Path, files: dict[str, Entry]) -> None:
    """Make a finished folder count: its manifest, every name on the disk, the rename, and last the pointer."""
    number = 1 + max(map(_number, _folders(root)), default=0)
    write_text(partial / MANIFEST, manifest_text(files, number))
    for inside in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync(inside)
    if folder.exists():  # of an earlier attempt; it stays one to continue from until the new one has its name
        aside = folder.with_name(folder.name + ".old")
        remove_tree(aside)
        os.rename(folder, aside)
    os.rename(partial, folder)
    sync(root)
    sync(root.parent)
    replace_text(root / "latest", folder.name)


def _rotate(root: Path, settings: RunSettings) -> None:
    """Remove what is neither among the newest nor kept for its step or its metric. The newest is whole, and stays."""
    numbers = {folder: _number(folder) for folder in _folders(root)}
    whole = sorted((f for f, number in numbers.items() if number >= 0 and f.suffix != ".old"), key=numbers.__getitem__)
    keep = set(whole[-settings.keep_last :])
    if settings.keep_every:
        keep |= {folder for folder in whole if _state_of(folder).get("step", 1) % settings.keep_every == 0}
    if settings.keep_best is not None:
        keep |= _best(whole, settings.keep_best)
    for old in numbers:
        if old not in keep:
            going = old.with_name(old.name + ".partial")  # half of a folder must not look like a checkpoint
            remove_tree(going)
            os.rename(old, going)
            remove_tree(going)


def _best(folders: Iterable[Path], rule: KeepBest) -> set[Path]:
    """The folder with the best value of the metric, the oldest of several; none when no folder has one."""
    values = {}
    for folder in folders:
        judged = _state_of(folder).get("best") or {}
        if judged.get("metric") == rule.metric:
            values[folder] = judged["value"] if rule.lower else -judged["value"]
    return {min(values, key=lambda folder: values[folder])} if values else set()


def _judge(rule: KeepBest | None, heldout: Mapping[str, float] | None) -> dict[str, Any] | None:
    if rule is None or heldout is None:
        return None
    if rule.metric not in heldout:
        raise UserError(f"key `keep_best.metric`: there is no held-out {rule.metric}; use one of {', '.join(heldout)}")
    value = float(heldout[rule.metric])
    return {"metric": rule.metric, "value": value} if math.isfinite(value) else None


def _together(action: Callable[[], T], partial: Path, need: int) -> list[T]:
    """What `action` returned on each rank, in rank order. When the disk fails on one, all stop. A collective."""
    result, problem, root = None, None, partial.parent
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if is_full(error):
            problem = (
                f"{root}: the disk is full: {partial.stem} needs {need} bytes, {free_on_disk(root)} are free; "
                "make room, or set `output` to a larger disk; the checkpoints before it are whole"
            )
        else:
            hint = "all nodes must see `output`" if error.errno == errno.ENOENT else "mend that"
            problem = f"{error.filename or root}: {partial.stem} cannot be written ({error.strerror}); {hint}"
    outcomes = dist.gather_objects((result, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        if dist.is_main():
            remove_tree(partial)
        raise UserError(problems[0])
    return [result for result, _ in outcomes]


def _inputs_of(settings: RunSettings) -> dict[str, Any]:
    """The fingerprints of this run's rows and models, as run.start noted them."""
    noted = Path(settings.output) / "environment.json"
    values = json.loads(noted.read_text()) if noted.is_file() else {}
    return {"data": values.get("data"), "models": values.get("models", {})}


# -- finding -----------------------------------------------------------------------------------------------


def find_checkpoint(
    settings: RunSettings, data: str | None = None, models: Models = MappingProxyType({})
) -> Checkpoint | None:
    """The newest whole checkpoint that `resume` allows, after comparing its run with this one. A collective.

    Every file is read and compared with the manifest; one that does not hold is reported, and the next is tried.
    All ranks come to the same answer, which is rank 0's.

    Args:
        data: fingerprint of the rows.
        models: fingerprint of each model by its key. Those that train must be the same, too, although the checkpoint
            has their weights: their folder gives the tokenizer, what LoRA freezes, and by default the reference.

    Raises:
        UserError: there are checkpoints but none is whole; `resume` names nothing; the run has changed.
    """
    if settings.resume == "never":
        return None
    folders, problem = dist.gather_objects(_candidates(settings) if dist.is_main() else None)[0]
    if problem is not None:
        raise UserError(problem)
    broken: list[str] = []
    for folder in folders:
        wrong = _verify(folder)
        if wrong is None:
            if broken:
                dist.print0(f"going on from {folder}, the newest that is whole")
            state = dist.gather_objects(_state_of(folder) if dist.is_main() else None)[0]
            _compare(folder, state, settings, data, models)
            return Checkpoint(folder, state)
        broken.append(f"{folder}: {wrong}")
        dist.print0(f"warning: {broken[-1]}")
    if broken:
        raise UserError(f"no checkpoint is whole ({'; '.join(broken)}); restore one, or start again with resume=never")
    return None


def _candidates(settings: RunSettings) -> tuple[list[Path], str | None]:
    """Folders to try, newest first, and what is wrong with `resume`."""
    if settings.resume == "auto":
        return _newest_first(Path(settings.output) / "checkpoints"), None
    path = Path(settings.resume)
    # A job that is queued again has the same command line, and must not lose what it has done since.
    mine = _newest_first(Path(settings.output) / "checkpoints")
    since = [folder for folder in mine if _resumed(_state_of(folder)) in (settings.resume, None)]
    if (path / "state.json").is_file() or (path / MANIFEST).is_file():
        return [*since, path], None
    for root in (path / "checkpoints", path):
        if found := _newest_first(root):
            return [*since, *(folder for folder in found if folder not in since)], None
    return since, None if since else (
        f"{settings.file}: key `resume`: there is no checkpoint in {path}; give a folder such as "
        "OUT/checkpoints/step_000200, a run's output folder, auto or never"
    )


def _resumed(state: dict[str, Any]) -> Any:
    """`resume` of the run that wrote a state; None of one that cannot be read, which is then found damaged."""
    return state.get("settings", {}).get("resume")


def _folders(root: Path) -> list[Path]:
    """Every folder that may be a checkpoint."""
    return [path for path in root.glob("step_*") if path.is_dir() and not path.name.endswith(".partial")]


def _newest_first(root: Path) -> list[Path]:
    # Those without a readable manifest come first: which is newer cannot be known, and they must not go unnoticed.
    def age(folder: Path) -> tuple[bool, int, str]:
        manifest = read_manifest(folder)
        readable = isinstance(manifest, Manifest)
        return not readable, manifest.number if isinstance(manifest, Manifest) else 0, folder.name

    return sorted(_folders(root), key=age, reverse=True)


def _number(folder: Path) -> int:
    """Place in the order of saving; -1 of a folder that is not whole by its manifest and sizes."""
    manifest = read_manifest(folder)
    return manifest.number if isinstance(manifest, Manifest) and wrong_size(folder, manifest.files) is None else -1


def _state_of(folder: Path) -> dict[str, Any]:
    """state.json; empty when it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint; the ranks share the reading. A collective."""
    found: Manifest | str = ""
    if dist.is_main():
        found = read_manifest(folder)
        if isinstance(found, Manifest):
            found = wrong_size(folder, found.files) or found
    found = dist.gather_objects(found)[0]
    if isinstance(found, str):
        return found
    problems = dist.gather_objects(wrong_content(folder, found.files, dist.rank(), dist.world_size()))
    return next((problem for problem in problems if problem), None)


def _compare(folder: Path, then: dict[str, Any], settings: RunSettings, data: str | None, models: Models) -> None:
    """Say what has changed since the checkpoint, and stop when the run would not be the same one."""
    free, other = changed_settings(then["settings"], settings)
    if data is not None and then["data"] is not None and data != then["data"]:
        other["the rows of `data`, their template or library versions"] = "others now"
    other |= changed_inputs(then.get("models", {}), models, named_models(settings))
    told = {key: change for key, change in free.items() if not key.startswith(("resume", "output"))}
    if told:
        dist.print0(f"changed since {folder}, without effect on the result: {listed(told)}")
    if other and settings.resume_changed:
        dist.print0(f"warning: changed since {folder}: {listed(other)}; going on (resume_changed)")
    elif other:
        raise UserError(
            f"{folder}: was written by a run with other settings: {listed(other)}; put them back, go on with "
            "the new ones by resume_changed=true, or start again with resume=never"
        )


# -- loading -----------------------------------------------------------------------------------------------


def load_checkpoint(settings: RunSettings, found: Checkpoint | None, engines: dict[str, Any]) -> int:
    """Restore engines and random states from what `find_checkpoint` found; its step, 0 of None. A collective.

    Raises:
        UserError: the disk has no room for the checkpoints to come, or the checkpoint is of other models.
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
    if drawn.is_file():  # not of ranks that there were none of
        _set_random_state(json.loads(drawn.read_text()))
    dist.barrier()
    dist.print0(f"resumed from {found.folder}")
    return int(found.state["step"])


def _check_room(settings: RunSettings, engines: dict[str, Any], found: Checkpoint | None) -> None:
    """Refuse, before training, a disk without room for two checkpoints; one is there when a run goes on."""
    size = sum(dist.gather_objects(sum(map(engine_size, engines.values())))) + MARGIN
    need = size if found is not None else 2 * size
    free = dist.gather_objects(free_on_disk(Path(settings.output)))[0]
    if settings.check_disk and free < need:
        raise UserError(
            f"{settings.file}: key `output`: a checkpoint takes {size} bytes, {need} must be free in {settings.output} "
            f"and {free} are; make room, use a larger disk, or set `check_disk: false`"
        )


# -- random states -----------------------------------------------------------------------------------------


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


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
