"""Whether a run has finished: OUT/finished.json, written last, after every export is on the disk.

    python -m tristage.runs.finished [--models-later] MODULE CONFIG [key=value ...] [launcher options]

It holds the step, the settings, the fingerprints of what the run read and of each folder that it exported; run.start
removes it. Launchers use it to skip a step (exit code 0: finished, 3: not, 2: finished by another run), and a step to
check the run that wrote its model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tristage.config import RunSettings, load_config
from tristage.config.steps import settings_class
from tristage.errors import UserError
from tristage.runs.changes import changed_inputs, changed_settings, join_changes
from tristage.runs.inputs import model_fingerprint, model_fingerprints, named_models, source_fingerprints
from tristage.storage.durable import replace_text, sync

NAME = "finished.json"
EXIT_NOT_FINISHED = 3


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence if another run than the requested one has finished."""
    later = argv[0] == "--models-later"
    module, config, *rest = argv[later:]
    words = [word for word in rest if "=" in word and not word.startswith("-")]
    try:
        settings = load_config(settings_class(config, module.removesuffix(".train")), ["--config", config, *words])
        return 0 if is_finished(settings, models=not later) else EXIT_NOT_FINISHED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def step_of(settings: RunSettings) -> str:
    """The step that settings are of, such as "step1_sft"."""
    return type(settings).__module__.partition(".")[0]


def write_finished(settings: RunSettings, noted: Mapping[str, Any], exported: Sequence[Path]) -> None:
    """Write OUT/finished.json. `noted` are the fingerprints of the run's inputs, `exported` its synced folders.

    Raises:
        OSError: it cannot be written.
    """
    values = {
        "step": step_of(settings),
        "settings": settings.model_dump(mode="json"),
        **noted,
        "folders": {folder.name: model_fingerprint(folder) for folder in exported},
    }
    replace_text(Path(settings.output) / NAME, json.dumps(values, indent=1))


def clear_finished(output: Path) -> None:
    """A run that starts is not finished, whatever the one before it was."""
    if (output / NAME).exists():
        (output / NAME).unlink()
        sync(output)


def read_finished(output: Path) -> dict[str, Any] | None:
    """The content of finished.json; None if it is missing or damaged."""
    try:
        values = json.loads((output / NAME).read_text())
        return values if {"step", "settings", "models", "sources", "folders"} <= values.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def has_finished(output: Path) -> bool:
    """Whether some run in `output` has finished and its exported folders still exist."""
    values = read_finished(output)
    return values is not None and all((output / name).is_dir() for name in values["folders"])


def is_finished(settings: RunSettings, models: bool = True) -> bool:
    """Whether the run that these settings describe has finished. `resume: never` requests a new one.

    With `models` false the model folders may change before the run starts, and are not compared.

    Raises:
        UserError: a run with other settings or inputs has finished there; or an exported folder has been changed.
    """
    output = Path(settings.output)
    values = read_finished(output)
    if values is None or not has_finished(output) or settings.resume == "never":
        return False
    _, changed = changed_settings(values["settings"], settings)
    if values["step"] != step_of(settings):
        changed = {"the step": f"{values['step']} -> {step_of(settings)}"}
    else:
        changed |= changed_inputs(values["sources"], source_fingerprints(settings), {})
        if models:
            changed |= changed_inputs(values["models"], model_fingerprints(settings), named_models(settings))
    if changed and settings.resume_changed:
        return False
    if changed:
        raise UserError(
            f"{output}: has finished as another run: {join_changes(changed)}; put that back, train again with "
            "resume=never, resume with the new values (resume_changed=true), or set another `output`"
        )
    for name, fingerprint in values["folders"].items():
        if model_fingerprint(output / name) != fingerprint:
            raise UserError(f"{output / name}: has been changed since its run wrote it; remove it to export it again")
    return True


def require_finished(path: str, settings: RunSettings, key: str) -> None:
    """A model folder that a run of tristage exports, OUT/final or another, must be complete and as that run wrote it.

    Raises:
        UserError: the run has not finished, or the folder is not what it exported.
    """
    folder = Path(os.path.abspath(path))
    if not folder.name.startswith("final") or not (folder.parent / "config.yaml").is_file():
        return
    where, values = f"{settings.file}: key `{key}`: {path}", read_finished(folder.parent)
    if values is None:
        raise UserError(
            f"{where}: its run has not finished ({folder.parent} has no {NAME}); start that run again to its end, or "
            "copy the folder elsewhere to use it as it is"
        )
    if values["folders"].get(folder.name) != model_fingerprint(folder):
        raise UserError(
            f"{where}: is not what its run exported last; start that run again to export it, or copy the folder "
            "elsewhere to use it as it is"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
