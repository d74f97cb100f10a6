"""Find the checkpoint to resume from, verify its files, and compare its settings with those of this run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tristage import dist
from tristage.config import RunSettings
from tristage.errors import UserError
from tristage.runs.changes import changed_inputs, changed_settings, listed
from tristage.runs.inputs import named_models
from tristage.storage.durable import MANIFEST, Manifest, read_manifest, wrong_content, wrong_size
from tristage.storage.pieces import PieceReader

Models = Mapping[str, str]


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
