"""The GPU recipes share bases: a base is complete but for names, and a recipe says only what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.recipes import STEP_YAMLS, name_of
from tristage.config import load_config
from tristage.config.steps import settings_class

REPO = Path(__file__).parents[2]
BASES = sorted((REPO / "configs" / "bases").glob("*.yaml"))
WHOLE = {"quickstart", "hh-helpful", "imdb-sentiment", "arithmetic"}  # read on their own by newcomers
NAMES = {
    "step3_ppo": ["output=out", "actor.model=some/model", "reward.model=some/model"],
    **dict.fromkeys(("step1_sft", "step2_reward_model", "step2_dpo"), ["output=out", "model=some/model"]),
}


@pytest.mark.parametrize("base", BASES, ids=name_of)
def test_a_base_lacks_only_models_and_output(base):
    settings = load_config(settings_class(str(base), None), ["--config", str(base), *NAMES[base.stem]])
    assert settings.output == "out" and "optimizer.learning_rate" in " ".join(settings.places)


def test_the_gpu_recipes_extend_the_base_of_their_step_and_the_others_are_whole():
    for file in STEP_YAMLS:
        extends = yaml.safe_load(file.read_text()).get("extends")
        assert extends == (None if file.parent.name in WHOLE else f"../bases/{file.name}"), file


def repeated(own: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Keys whose value the base has too."""
    found = []
    for key, value in own.items():
        if isinstance(value, dict) and key not in ("train", "heldout"):
            found += [f"{key}.{inner}" for inner in repeated(value, base.get(key) or {})]
        elif key in base and base[key] == value:
            found.append(key)
    return found


@pytest.mark.parametrize("file", [file for file in STEP_YAMLS if file.parent.name not in WHOLE], ids=name_of)
def test_a_recipe_repeats_nothing_of_its_base(file):
    base = yaml.safe_load((REPO / "configs" / "bases" / file.name).read_text())
    assert repeated(yaml.safe_load(file.read_text()), base) == []


@pytest.mark.parametrize("file", [*STEP_YAMLS, *BASES], ids=name_of)
def test_a_recipe_names_the_schema_of_its_step_for_editors(file):
    first = file.read_text().split("\n")[0]
    assert first == f"# yaml-language-server: $schema=../schema/{file.stem}.json"
