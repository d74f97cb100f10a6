"""YAML files and `key=value` overrides into checked settings: a wrong key becomes one clear sentence.

    settings = load_config(SFTConfig, ["--config", "step1.yaml", "optimizer.learning_rate=1e-5"])

Reading a config does no work and builds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from tristage.config.files import CONFIGS, place_of, places_of, read_tree, set_key, shipped_path, values_of
from tristage.config.problems import explain
from tristage.config.settings import RunSettings
from tristage.errors import UserError

S = TypeVar("S", bound=RunSettings)
# Last part of a key -> folder in configs/ and suffix of the files that it may name without them: `deepspeed: zero2`.
SHIPPED_BY_NAME = {"deepspeed": ("deepspeed", ".json"), "preset": ("datasets", ".yaml")}


def load_config(settings_class: type[S], argv: list[str]) -> S:
    """Read `--config FILE [key=value ...]` into a `settings_class`.

    Dots in a key reach into groups (`optimizer.learning_rate=1e-5`); values are YAML. `--local_rank=N`, which
    the deepspeed launcher appends, is accepted and ignored (ranks come from the environment).

    Raises:
        UserError: missing or unreadable file; unknown keys and wrong types, a line each; an impossible combination.
    """
    file, overrides = _split_arguments(argv)
    tree, files = read_tree(file, settings_class)
    for key, value in overrides:
        set_key(tree, key, value)
    places = places_of(tree)
    try:
        settings = settings_class.model_validate(values_of(tree))
    except ValidationError as error:
        sentences = explain(error, settings_class).items()
        lines = [f"{_file_of(key, places, files)}: {sentence}" for key, sentence in sentences]
        raise UserError("\n".join(lines)) from None
    settings._folders, settings._file = tuple(each.parent for each in files), str(file)
    settings._places = places
    return settings


def _file_of(key: str, places: dict[str, str], files: tuple[Path, ...]) -> Path:
    """The base that the value at `key` is from; else the config itself."""
    place = place_of(key, places)
    return next((file for file in files if place.startswith(f"{file}:")), files[0])


def read_values(file: Path) -> dict[str, Any]:
    """The values of a YAML file and its bases, unchecked. Raises UserError where one cannot be read."""
    return values_of(read_tree(file, RunSettings)[0])


def _split_arguments(argv: list[str]) -> tuple[Path, list[tuple[str, Any]]]:
    file, overrides, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            file = shipped_path(rest.pop(0))
        elif word.startswith("--config="):
            file = shipped_path(word.partition("=")[2])
        elif word.startswith("--local_rank") or word.startswith("--local-rank"):
            if "=" not in word and rest:
                rest.pop(0)
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            try:
                overrides.append((key, yaml.safe_load(text)))
            except yaml.YAMLError:
                raise UserError(f"argument {word!r}: the value is not valid YAML; quote it") from None
        else:
            raise UserError(f"argument {word!r} is not understood; write --config FILE key=value ...")
    if file is None:
        raise UserError("no config given; write --config FILE key=value ...")
    return file, overrides


def find_file(path: str, settings: RunSettings, key: str) -> Path:
    """The file that `key` names: from the working folder, next to the YAML or a base of it, or shipped under that name.

    Raises:
        UserError: there is no such file.
    """
    folder, suffix = SHIPPED_BY_NAME.get(key.rpartition(".")[2], ("", ""))
    shipped = [CONFIGS / folder / f"{path}{suffix}"] if folder else []
    for file in (shipped_path(path), *(folder_of_yaml / path for folder_of_yaml in settings.folders), *shipped):
        if file.is_file():
            return file
    names = ", ".join(sorted(file.stem for file in (CONFIGS / folder).glob(f"*{suffix}"))) if folder else ""
    fix = f"give its path, or a name that tristage ships: {names}" if names else "give its path"
    raise UserError(f"{settings.file}: key `{key}`: no file {path}, here or next to the config; {fix}")
