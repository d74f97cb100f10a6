"""YAML files of settings: what they inherit by `extends`, and the file and line that each value is from.

    extends: ../bases/step3_ppo.yaml    # relative to this file, or tristage:PATH, a file under the shipped configs/

The file's own values win. Groups of settings merge key by key; any other value replaces the base's whole, also a list
or a source of data. In memory a file is a tree: a dict per group, and a `PlacedValue` for every other value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel

from tristage.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"  # a link to configs/ in a clone, a copy of it in a wheel
COMMAND_LINE = "command line"
Tree = dict[str, Any]  # key -> PlacedValue, or the Tree of a group


class PlacedValue(NamedTuple):
    """A value and where it is from: "file:line", or the command line."""

    value: Any
    place: str


def shipped_path(path: str) -> Path:
    """`path`, where `tristage:PATH` is a file under the configs/ that tristage ships."""
    return CONFIGS / path.removeprefix("tristage:") if path.startswith("tristage:") else Path(path)


def group_in(group: type[BaseModel] | None, key: Any) -> type[BaseModel] | None:
    """The group of settings at `key` of `group`; None if the value there is not a group, such as a list."""
    field = group.model_fields.get(key) if group is not None else None
    if field is None or get_origin(field.annotation) is tuple:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def read_tree(file: Path, group: type[BaseModel]) -> tuple[Tree, tuple[Path, ...]]:
    """The tree of a YAML file on top of the files that it extends, and these files, its own first.

    Raises:
        UserError: a file is missing, is not valid YAML, sets a key twice or extends itself.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such config file; give the path of a YAML file after --config")
    return _read(file, group, ())


def _read(file: Path, group: type[BaseModel], above: tuple[Path, ...]) -> tuple[Tree, tuple[Path, ...]]:
    own = _read_file(file, group)
    extends = own.pop("extends", None)
    if extends is None:
        return own, (file,)
    base = _base_file(extends, file)
    if base.resolve() in (chain := (*above, file.resolve())):
        raise UserError(f"{extends.place}: `extends: {extends.value}` leads back to {base}; remove one `extends`")
    inherited, files = _read(base, group, chain)
    return _merge(inherited, own), (file, *files)


def _base_file(extends: PlacedValue, file: Path) -> Path:
    if not isinstance(extends.value, str):
        raise UserError(f"{extends.place}: `extends` is {extends.value!r}; give the path of one YAML file")
    base = Path(os.path.normpath(file.parent / shipped_path(extends.value)))
    if not base.is_file():
        raise UserError(f"{extends.place}: `extends: {extends.value}`: no such file {base}; fix the path")
    return base


def _read_file(file: Path, group: type[BaseModel]) -> Tree:
    """The tree of one file alone."""
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _refuse_repeated_keys(node, file)
        values = loader.construct_document(node) if isinstance(node, yaml.MappingNode) else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise UserError(f"{file}{line}: not valid YAML ({problem}); fix that line") from None
    if node is None or not isinstance(values, dict):
        raise UserError(f"{file}: holds no settings; write `key: value` lines")
    return _tree(values, node, group, file)


def _refuse_repeated_keys(node: yaml.Node | None, file: Path) -> None:
    """YAML readers take the last of two values of one key silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key.value, str):
            if key.value in lines:
                raise UserError(f"{file}:{line}: key `{key.value}` is already on line {lines[key.value]}; remove one")
            lines[key.value] = line
        if value.start_mark.index > key.start_mark.index:  # an alias refers to a node further up, checked there
            _refuse_repeated_keys(value, file)


def _tree(values: dict[str, Any], node: yaml.Node, group: type[BaseModel] | None, file: Path) -> Tree:
    found = {key.value: (f"{file}:{key.start_mark.line + 1}", value) for key, value in node.value}
    tree: Tree = {}
    for key, value in values.items():
        place, inner = found.get(str(key), (str(file), None))
        kind = group_in(group, key)
        grouped = kind is not None and isinstance(value, dict) and inner is not None
        tree[key] = _tree(value, inner, kind, file) if grouped else PlacedValue(value, place)
    return tree


def _merge(base: Tree, own: Tree) -> Tree:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def set_key(tree: Tree, key: str, value: Any) -> None:
    """Put a value of the command line at a dotted key. Raises UserError if a single value is in the way."""
    *groups, last = key.split(".")
    for group in groups:
        inner = tree.get(group)
        if inner is None or (isinstance(inner, PlacedValue) and inner.value is None):
            inner = {}
        elif isinstance(inner, PlacedValue) and isinstance(inner.value, dict):  # a source of data
            inner = {name: PlacedValue(part, inner.place) for name, part in inner.value.items()}
        if not isinstance(inner, dict):
            raise UserError(f"argument {key}={value}: `{group}` is a single value, not a group of settings")
        tree[group] = tree = inner
    tree[last] = PlacedValue(value, COMMAND_LINE)


def values_of(tree: Tree) -> dict[str, Any]:
    """The plain values of a tree."""
    return {key: values_of(value) if isinstance(value, dict) else value.value for key, value in tree.items()}


def places_of(tree: Tree, prefix: str = "") -> dict[str, str]:
    """Dotted key -> place, of every value of a tree."""
    places: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            places |= places_of(value, f"{prefix}{key}.")
        else:
            places[f"{prefix}{key}"] = value.place
    return places


def place_of(key: str, places: dict[str, str]) -> str:
    """Where the value at a dotted key is from: the places of its parts, else of the value it is in; "" for none."""
    if parts := {place for each, place in places.items() if f"{each}.".startswith(f"{key}.")}:
        return ", ".join(sorted(parts))
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")
