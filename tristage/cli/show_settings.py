"""`tristage config` prints a resolved config and where each value is from; `tristage settings` lists the settings."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from tristage.config import RunSettings
from tristage.config.describe import as_yaml, find_settings
from tristage.config.files import place_of


def config_lines(settings: RunSettings) -> list[str]:
    """The resolved settings as YAML that loads again; a comment gives the place of each value, or all of a default."""
    pairs = list(_values(settings, settings.places))
    width = min(max(len(line) for line, _ in pairs), 60)
    return [f"{line:{width}}  # {place}" if place else line for line, place in pairs]


def _values(group: BaseModel, places: dict[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(line of YAML, place) of every value of a group; a group within it has a line of its own, without a place."""
    indent = "  " * prefix.count(".")
    for name in type(group).model_fields:
        value, key = getattr(group, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            empty, default = not value.model_fields_set, name not in group.model_fields_set
            place = "default" if default else place_of(key, places) * empty
            yield f"{indent}{'# ' * default}{name}:{' {}' * empty}", place
            yield from _values(value, places, f"{key}.")
        elif name in group.model_fields_set:
            yield f"{indent}{name}: {as_yaml(value)}", place_of(key, places)
        else:
            yield f"{indent}# {name}: {as_yaml(value)}", "default"


def setting_lines(group: type[RunSettings], key: str | None) -> Iterator[str]:
    """Each setting of a step, or `key` and what is inside it: key, type, default, and a sentence below."""
    for each in find_settings(group, key):
        default = "" if each.kind == "group" and each.default == "required" else f"; {_default(each.default)}"
        yield f"{each.key}  ({each.kind}{default})"
        yield f"    {each.sentence}"


def _default(text: str) -> str:
    return text if text == "required" else f"default {text}"
