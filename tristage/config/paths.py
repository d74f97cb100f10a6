"""The files and folders that settings name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tristage.config.settings import RunSettings
from tristage.errors import UserError

SCORER = "ForSequenceClassification"  # how the class of a reward model ends, in config.json
NOT_A_POLICY = "{}: holds a reward model, not a language model; give a language model, such as step 1's final folder"


def require_folder_or_hub_id(path: str, settings: RunSettings, key: str) -> None:
    """A model path must be a folder with a config.json of the right kind, or look like a hub id (`owner/name`)."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{settings.file}: key `{key}`: {path} has no config.json; give a model folder")
        policies = {spec.path_key for spec in settings.engine_specs() if spec.holds == "policy"}
        if key in policies and any(name.endswith(SCORER) for name in _architectures(path)):
            raise UserError(f"{settings.file}: key `{key}`: {NOT_A_POLICY.format(path)}")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or os.path.isdir(path.split("/")[0]):
        raise UserError(
            f"{settings.file}: key `{key}`: there is no folder {path}; "
            "give a Hugging Face folder, or run the step that writes it first"
        )


def _architectures(path: str) -> list[str]:
    """The classes that the weights in a model folder were saved from."""
    file = Path(path, "config.json")
    try:
        return json.loads(file.read_text())["architectures"] or []
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the model folder again") from None
    except KeyError:
        return []


def named_paths(settings: RunSettings) -> Iterator[tuple[str, str]]:
    """(key, value) of each model and DeepSpeed JSON that the run's engines start from."""
    paths = {}
    for spec in settings.engine_specs():
        paths[spec.path_key] = spec.path
        paths[spec.key("deepspeed")] = spec.deepspeed
    yield from paths.items()
