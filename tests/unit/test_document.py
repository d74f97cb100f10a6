"""The generated files are fresh, and the schemas accept what the steps accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tristage.config import STEPS, settings_class
from tristage.config.describe import settings_of
from tristage.config.document import generated, settings_page

REPO = Path(__file__).parents[2]
FILES = sorted((REPO / "configs").glob("*/step[0-9]_*.yaml"))
GENERATED = generated()


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.relative_to(REPO).as_posix())
def test_a_generated_file_is_fresh(file):
    assert file.read_text() == GENERATED[file], "run: python -m tristage.config.document"


@pytest.mark.parametrize("step", STEPS)
def test_the_page_has_a_row_for_every_setting(step):
    page = settings_page()
    for setting in settings_of(settings_class("", step)):
        assert f"\n| `{setting.key}` | " in page


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
TYPES |= {"object": dict, "array": list}


def accepts(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Whether a value fits: the keywords of JSON Schema that pydantic writes for our settings."""
    if "$ref" in schema:
        return accepts(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if "anyOf" in schema and not any(accepts(option, value, whole) for option in schema["anyOf"]):
        return False
    if not set(schema.get("required", ())) <= set(value if isinstance(value, dict) else ()):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if kind in ("integer", "number") and not in_bounds(schema, value):
        return False
    if isinstance(value, list):
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return all(accepts(item, part, whole) for item, part in zip(items, value, strict=True))
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not isinstance(value, dict) or kind != "object":
        return True
    return all(accepts(known[key], part, whole) if key in known else bool(others) for key, part in value.items())


def in_bounds(schema: dict[str, Any], value: float) -> bool:
    above = value > schema.get("exclusiveMinimum", -1e300) and value >= schema.get("minimum", -1e300)
    return above and value < schema.get("exclusiveMaximum", 1e300) and value <= schema.get("maximum", 1e300)


def schema_of(step: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((REPO / "configs" / "schema" / f"{step}.json").read_text())
    return schema


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_schema_accepts_every_recipe_and_base(file):
    schema, values = schema_of(file.stem), yaml.safe_load(file.read_text())
    if file.parent.name == "bases":
        values["extends"] = "none.yaml"  # a base lacks the keys that only a whole file needs
    assert accepts(schema, values, schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizr": {}},
        {"optimizer": {"learning_rat": 1e-5}},
        {"optimizer": {"learning_rate": -1}},
        {"optimizer": {"schedule": "step"}},
        {"optimizer": {"betas": [0.9, "b"]}},
        {"data": {"train": [{"pth": "a.jsonl"}]}},
        {"epochs": "many"},
        {"lora": 3},
        {"extends": ["a.yaml"]},
        {"extends": None, "model": "a"},
    ],
)
def test_a_schema_refuses_what_the_step_refuses(wrong):
    schema = schema_of("step1_sft")
    assert accepts(schema, {"extends": "a.yaml"}, schema)
    assert not accepts(schema, {"extends": "a.yaml"} | wrong, schema)


def test_a_file_without_a_base_must_have_the_required_keys():
    schema = schema_of("step1_sft")
    values = yaml.safe_load((REPO / "configs/quickstart/step1_sft.yaml").read_text())
    del values["model"]
    assert not accepts(schema, values, schema)
    assert accepts(schema, values | {"extends": "a.yaml"}, schema)
