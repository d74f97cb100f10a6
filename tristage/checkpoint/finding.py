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
from tristage.runs.changes import changed_inputs, changed_settings, join_changes
from tristage.runs.inputs import named_models
from tristage.storage.durable import MANIFEST, Manifest, read_manifest, wrong_content, wrong_size
from tristage.storage.pieces import PieceReader

Models = Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint that this run resumes from."""

    folder: Path
    state: dict[str, Any]  # state.json

    @property
    def control(self) -> dict[str, Any] | None:
        """The numbers that were saved with it."""
        return self.state["control"]  # type: ignore[no-any-return]

    def pieces(self, name: str) -> PieceReader | None:
        """An engine's tensors, or those given as `own`; None if they were not saved."""
        return PieceReader(self.folder / name, self.state["ranks"]) if (self.folder / name).is_dir() else None


def find_checkpoint(
    settings: RunSettings, data: str | None = None, models: Models = MappingProxyType({})
) -> Checkpoint | None:
    """The newest undamaged checkpoint that `resume` allows, after comparing its run with this one. A collective.

    Every file is read and compared with the manifest; a damaged checkpoint is reported, and the next is tried.
    All ranks get rank 0's answer.

    Args:
        data: fingerprint of the rows.
        models: fingerprint of each model by its key. Trained models must also be the same, although the checkpoint has
            their weights: their folder gives the tokenizer, the weights that LoRA freezes, and the default reference.

    Raises:
        UserError: every checkpoint is damaged; `resume` points to no checkpoint; the settings have changed.
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
                dist.print0(f"resuming from {folder}, the newest that is not damaged")
            state = dist.gather_objects(_state_of(folder) if dist.is_main() else None)[0]
            _compare(folder, state, settings, data, models)
            return Checkpoint(folder, state)
        broken.append(f"{folder}: {wrong}")
        dist.print0(f"warning: {broken[-1]}")
    if broken:
        problems = "; ".join(broken)
        raise UserError(f"every checkpoint is damaged ({problems}); restore one, or start again with resume=never")
    return None


def _candidates(settings: RunSettings) -> tuple[list[Path], str | None]:
    """Folders to try, newest first, and what is wrong with `resume`."""
    if settings.resume == "auto":
        return _newest_first(Path(settings.output) / "checkpoints"), None
    path = Path(settings.resume)
    # A requeued job has the same command line, and must not lose what it has done since.
    own = _newest_first(Path(settings.output) / "checkpoints")
    since = [folder for folder in own if _resumed(_state_of(folder)) in (settings.resume, None)]
    if (path / "state.json").is_file() or (path / MANIFEST).is_file():
        return [*since, path], None
    for root in (path / "checkpoints", path):
        if folders := _newest_first(root):
            return [*since, *(folder for folder in folders if folder not in since)], None
    return since, None if since else (
        f"{settings.file}: key `resume`: there is no checkpoint in {path}; give a folder such as "
        "OUT/checkpoints/step_000200, a run's output folder, auto or never"
    )


def _resumed(state: dict[str, Any]) -> Any:
    """`resume` of the run that wrote a state; None if it cannot be read, which `_verify` reports."""
    return state.get("settings", {}).get("resume")


def _folders(root: Path) -> list[Path]:
    """Every folder that may be a checkpoint."""
    return [path for path in root.glob("step_*") if path.is_dir() and not path.name.endswith(".partial")]


def _newest_first(root: Path) -> list[Path]:
    # Those without a readable manifest come first: their age is unknown, and the damage must be reported.
    def age(folder: Path) -> tuple[bool, int, str]:
        manifest = read_manifest(folder)
        readable = isinstance(manifest, Manifest)
        return not readable, manifest.number if isinstance(manifest, Manifest) else 0, folder.name

    return sorted(_folders(root), key=age, reverse=True)


def _number(folder: Path) -> int:
    """Place in the order of saving; -1 if the folder does not match its manifest in files and sizes."""
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
    """What is wrong with a checkpoint, or None; the ranks share the reading. A collective."""
    manifest: Manifest | str = ""
    if dist.is_main():
        manifest = read_manifest(folder)
        if isinstance(manifest, Manifest):
            manifest = wrong_size(folder, manifest.files) or manifest
    manifest = dist.gather_objects(manifest)[0]
    if isinstance(manifest, str):
        return manifest
    problems = dist.gather_objects(wrong_content(folder, manifest.files, dist.rank(), dist.world_size()))
    return next((problem for problem in problems if problem), None)


def _compare(folder: Path, then: dict[str, Any], settings: RunSettings, data: str | None, models: Models) -> None:
    """Print what has changed since the checkpoint; raise UserError if it would change the result."""
    free, other = changed_settings(then["settings"], settings)
    if data is not None and then["data"] is not None and data != then["data"]:
        other["the rows of `data`, their template or library versions"] = "have changed"
    other |= changed_inputs(then.get("models", {}), models, named_models(settings))
    shown = {key: change for key, change in free.items() if not key.startswith(("resume", "output"))}
    if shown:
        dist.print0(f"changed since {folder}, without effect on the result: {join_changes(shown)}")
    if other and settings.resume_changed:
        dist.print0(f"warning: changed since {folder}: {join_changes(other)}; resuming (resume_changed)")
    elif other:
        raise UserError(
            f"{folder}: was written by a run with other settings: {join_changes(other)}; put them back, resume "
            "with the new ones (resume_changed=true), or start again with resume=never"
        )
