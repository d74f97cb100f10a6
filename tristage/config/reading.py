"""YAML files and `key=value` overrides into checked settings: a wrong key becomes one clear sentence.

    settings = load_config(SFTConfig, ["--config", "step1.yaml", "optimizer.learning_rate=1e-5"])

Reading a config does no work and builds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from tristage.config.problems import explain
from tristage.config.settings import RunSettings
from tristage.errors import UserError

S = TypeVar("S", bound=RunSettings)


def load_config(settings_class: type[S], argv: list[str]) -> S:
    """Read `--config FILE [key=value ...]` into a `settings_class`.

    Dots in a key reach into groups (`optimizer.learning_rate=1e-5`); values are YAML. `--local_rank=N`, which
    the deepspeed launcher appends, is accepted and ignored (ranks come from the environment).

    Raises:
        UserError: missing or unreadable file; unknown keys and wrong types, a line each; an impossible combination.
    """
    file, overrides = _split_arguments(argv)
    values = _read_yaml(file)
    for key, value in overrides:
        _set_key(values, key, value)
    try:
        settings = settings_class.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{file}: {line}" for line in explain(error, settings_class))) from None
    settings._folder, settings._file = file.parent, str(file)
    return settings


def _split_arguments(argv: list[str]) -> tuple[Path, list[tuple[str, Any]]]:
    file, overrides, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            file = Path(rest.pop(0))
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
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


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such config file; give the path of a YAML file after --config")
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise UserError(f"{file}{line}: not valid YAML ({problem}); mend that line") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no settings; write `key: value` lines")
    return values


def _set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        inner = values.get(group)
        if inner is None:
            inner = values[group] = {}
        if not isinstance(inner, dict):
            raise UserError(f"argument {key}={value}: `{group}` is a single value, not a group of settings")
        values = inner
    values[last] = value


def find_file(path: str, settings: RunSettings, key: str) -> Path:
    """The file that `key` names, looked up from the working folder, then beside the YAML. Raises UserError."""
    for file in (Path(path), settings.folder / path):
        if file.is_file():
            return file
    raise UserError(f"{settings.file}: key `{key}`: no file {path}, here or beside the config; give its path")
