"""Every setting of a step: key, type, default and sentence, read from the settings classes."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from tristage.config.settings import RunSettings, SourceSettings
from tristage.errors import UserError

WORDS = {bool: "true or false", int: "integer", float: "number", str: "string"}
BOUNDS = {annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", ">=")}
BOUNDS |= {annotated_types.Lt: ("lt", "<"), annotated_types.Le: ("le", "<=")}


class Setting(NamedTuple):
    """One setting, or one group of them."""

    key: str
    kind: str
    default: str
    sentence: str


def settings_of(group: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """All settings of a class at any depth. Items of a list have N in their key; those of sources are given once."""
    seen: set[type[BaseModel]] = set()

    def walk(group: type[BaseModel], prefix: str) -> Iterator[Setting]:
        for name, field in group.model_fields.items():
            yield describe(prefix + name, field)
            inner, is_list = inner_group(field)
            if inner is not None and not (is_list and inner in seen):
                seen.add(inner)
                yield from walk(inner, f"{prefix}{name}.N." if is_list else f"{prefix}{name}.")

    return walk(group, prefix)


def inner_group(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The settings class inside a field, and whether the field is a list of them."""
    kinds = [field.annotation, *get_args(field.annotation)]
    inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return inner, get_origin(field.annotation) is tuple


def describe(key: str, field: FieldInfo) -> Setting:
    """One setting in words."""
    inner, _ = inner_group(field)
    sentence = field.description or (inner.__doc__ or "" if inner else "").split("\n")[0]
    default = "required" if field.is_required() else as_yaml(field.get_default())
    return Setting(key, kind_of(field), default, sentence)


def kind_of(field: FieldInfo) -> str:
    """Type and bounds in words: "integer > 0 or null"."""
    if inner_group(field) == (SourceSettings, True):
        return "path, source or list of them"
    bounds = ", ".join(
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for kind, (name, sign) in BOUNDS.items()
        if isinstance(limit, kind)
    )
    kinds = get_args(field.annotation) if is_union(field.annotation) else (field.annotation,)
    words = [words_of(kind) for kind in kinds if kind is not type(None)]
    null = " or null" if type(None) in kinds else ""
    return f"{' or '.join(words)} {bounds}".rstrip() + null


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def words_of(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if is_union(kind):
        return " or ".join(map(words_of, parts))
    if origin is tuple:
        return f"list of {words_of(parts[0])}s" if parts[-1] is ... else f"list of {len(parts)} {words_of(parts[0])}s"
    if origin is dict:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "group"
    return words_of(parts[0]) if parts else WORDS[kind]  # Annotated[kind, ...]


def as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    plain = TypeAdapter(Any).dump_python(value, mode="json", exclude_unset=True)
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()


def find_settings(group: type[RunSettings], key: str | None) -> list[Setting]:
    """Settings by their key or its last part, with what is inside them; all without a key.

    Raises:
        UserError: there is no such setting.
    """
    settings = list(settings_of(group))
    if key is None:
        return settings
    name = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    roots = {each.key for each in settings if f".{each.key}".endswith(f".{name}")}
    found = [each for each in settings if any(f"{each.key}.".startswith(f"{root}.") for root in roots)]
    if not found:
        near = difflib.get_close_matches(name, [each.key for each in settings], n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else "leave it out to list all"
        raise UserError(f"no setting `{key}`; {fix}")
    return found
