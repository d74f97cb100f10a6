"""Every setting is described and read, and every config in configs/ is one that its step accepts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

from tests.helpers.recipes import STEP_YAMLS, name_of, ranks_of
from tristage.config import Settings, load_config, read_deepspeed_json
from tristage.config.steps import STEPS, settings_class
from tristage.training.conditions import CONDITIONS

REPO = Path(__file__).parents[2]
DEEPSPEED_JSONS = sorted((REPO / "configs" / "deepspeed").glob("*.json"))


def groups_of(cls: type[BaseModel]) -> list[type[BaseModel]]:
    """A settings class and the groups inside it, at any depth."""
    inner = [
        group
        for field in cls.model_fields.values()
        for kind in (field.annotation, *get_args(field.annotation))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for group in groups_of(kind)
    ]
    return [cls, *inner]


ALL_FIELDS = {
    (cls.__name__, name): field
    for step in STEPS
    for cls in groups_of(settings_class("", step))
    for name, field in cls.model_fields.items()
}


def read_attributes() -> set[tuple[str, str]]:
    """(class it stands in or "", name) of every attribute that the source of tristage and the steps reads.

    Names are compared, not types, so algo/, which takes no settings (but reads `torch.finfo(...).eps`), is left out.
    """
    found = set()

    def walk(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                found.add((inside, child.attr))
            walk(child, child.name if isinstance(child, ast.ClassDef) else inside)

    for folder in ("tristage", *STEPS):
        for path in (REPO / folder).rglob("*.py"):
            if path.parent.name != "algo":
                walk(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


READ = read_attributes()


def test_the_settings_of_every_step_are_found():
    assert sorted(STEPS) == sorted(path.parent.name for path in REPO.glob("step[0-9]_*/config.py"))
    assert {("SFTConfig", "model"), ("OptimizerSettings", "eps"), ("PPOSettings", "lam")} <= set(ALL_FIELDS)


@pytest.mark.parametrize("cls, name", ALL_FIELDS, ids=lambda part: part)
def test_a_setting_has_a_sentence(cls, name):
    field = ALL_FIELDS[cls, name]
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
        assert field.annotation.__doc__, f"the group {field.annotation.__name__} has no docstring"
    else:
        assert field.description and field.description.endswith("."), f"{cls}.{name}: {field.description!r}"
        assert len(field.description.split()) >= 2


@pytest.mark.parametrize("cls, name", ALL_FIELDS, ids=lambda part: part)
def test_a_setting_is_read_outside_its_class(cls, name):
    if (cls, name) in {("HealthSettings", condition.name) for condition in CONDITIONS}:
        return  # read by the condition's name
    assert any(attribute == name and inside != cls for inside, attribute in READ), f"{cls}.{name} is never read"


# -- configs/ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, ranks",
    [("# Step 1.\n", 2), ("# For 4 GPUs.\n# Of 80 GB.   ranks: 16\n", 16), ("# Step 1.\nepochs: 3 # ranks: 9\n", 2)],
)
def test_the_header_says_the_ranks(tmp_path, text, ranks):
    (tmp_path / "a.yaml").write_text(text)
    assert ranks_of(tmp_path / "a.yaml") == ranks


def load(path: Path) -> Any:
    return load_config(settings_class(str(path), None), ["--config", str(path)])


def test_there_is_a_config_for_every_step():
    assert set(STEPS) <= {path.stem for path in STEP_YAMLS}


@pytest.mark.parametrize("path", STEP_YAMLS, ids=name_of)
def test_a_config_loads_and_its_batches_divide(path):
    settings, ranks = load(path), ranks_of(path)
    plan = settings.plan(ranks)
    assert plan.micro_batch * plan.accumulation * ranks == plan.global_batch


@pytest.mark.parametrize("path", STEP_YAMLS, ids=name_of)
def test_the_deepspeed_jsons_of_a_config_are_found_and_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found beside the config, wherever one stands
    settings = load(path)
    specs = settings.engine_specs()
    stages = [read_deepspeed_json(spec.deepspeed, settings)["zero_optimization"]["stage"] for spec in specs]
    assert stages and all(stage in (0, 3) for stage, spec in zip(stages, specs, strict=True) if spec.frozen)


@pytest.mark.parametrize("path", DEEPSPEED_JSONS, ids=name_of)
def test_a_deepspeed_json_is_accepted_and_its_name_says_its_stage(path):
    zero = read_deepspeed_json(str(path), load(STEP_YAMLS[0]))["zero_optimization"]
    assert DeepSpeedZeroConfig(**zero).stage == zero["stage"]  # a misspelt key is refused here
    assert path.stem.startswith(f"zero{zero['stage']}")
