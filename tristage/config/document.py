"""Writes docs/settings.md, docs/deepspeed-keys.md and configs/schema/*.json. Run it after a change of a setting:

    python -m tristage.config.document
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tristage.config import deepspeed_keys
from tristage.config.describe import Setting, settings_of
from tristage.config.settings import RunSettings, TrainSettings
from tristage.config.steps import STEPS, settings_class

REPO = Path(__file__).parents[2]
INTRO = """# Settings

Generated from the settings classes by `python -m tristage.config.document`; edit the sentences there.

A step reads one YAML, `key=value` words after it win over the file, and dots in a key reach into groups:
`bash launch/step1_sft.sh my.yaml optimizer.learning_rate=1e-5`. An unknown key is refused.

- `tristage settings STEP [KEY]` prints these tables in a terminal.
- `tristage config CONFIG [key=value ...]` prints what a run would use, and the file and line of each value.
- `extends: ../bases/step3_ppo.yaml` builds on another YAML: a path from the folder of the YAML that says so, or
  `tristage:bases/step3_ppo.yaml` for one of the shipped configs. Groups merge key by key; any other value, also a list
  or a source of data, replaces that of the base.
- `deepspeed` and `preset` take a path (from the working folder, the YAML's, or a base's) or the name of a file of
  `configs/deepspeed/` and `configs/datasets/`: `deepspeed: zero2`, `preset: rm-static`.
- N in a key stands for an item of a list, from 0. Items of `data.heldout` and `pretraining.data` have the settings of
  `data.train.N`.
"""
DEEPSPEED_INTRO = """# Keys of a DeepSpeed JSON

Generated from `tristage/config/deepspeed_keys.py` by `python -m tristage.config.document`; `tristage doctor
--deepspeed` prints it.

Every key that DeepSpeed 0.19 reads is here, and a run checks its JSONs before it reads weights:

- **works**: tested with four engines in one process. After three steps on two CPU ranks, losses, weights and moments
  are those of ZeRO 0 without the key. "Not run" says why the tests leave one out. At a ZeRO stage that is not named
  the key would do nothing, and is refused.
- **YAML**: the step's YAML sets it.
- **refused**: it would change the gradient in silence, do nothing, or end in a traceback once the models are loaded.
  Its off value, such as `false`, is accepted.

A key that is not here is refused too. `deepspeed_unchecked: [zero_optimization.new_key]` in the YAML hands it to
DeepSpeed untested. A group that has one row, such as `flops_profiler`, holds what DeepSpeed documents. `comms_logger`
and `log_level` are of the whole process: one engine's JSON sets them for all.
"""
TITLES = {
    "step1_sft": "Step 1: supervised fine-tuning",
    "step2_reward_model": "Step 2: reward model",
    "step2_dpo": "Step 2: DPO",
    "step3_ppo": "Step 3: PPO",
}
EXTENDS = {"type": "string", "description": "Another YAML to build on: relative to this file, or tristage:PATH."}


def main() -> None:
    for file, text in generated().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def generated() -> dict[Path, str]:
    """Each generated file and its text."""
    schemas = {REPO / "configs" / "schema" / f"{step}.json": _schema_text(step) for step in STEPS}
    docs = REPO / "docs"
    return {docs / "settings.md": settings_page(), docs / "deepspeed-keys.md": deepspeed_page(), **schemas}


def settings_page() -> str:
    """docs/settings.md: a table for all steps, one for steps 1 and 2, and one for what each step has alone."""
    parts = [INTRO, "## Every step\n", *_table(RunSettings, set())]
    parts += ["## Steps 1 and 2\n", *_table(TrainSettings, set(RunSettings.model_fields))]
    for step in STEPS:
        group = settings_class("", step)
        shared = TrainSettings if issubclass(group, TrainSettings) else RunSettings
        parts += [f"## {TITLES[step]}\n", *_table(group, set(shared.model_fields))]
    return "\n".join(parts)


def deepspeed_page() -> str:
    """docs/deepspeed-keys.md: one row per key."""
    table = ["| key | | ZeRO | |", "|---|---|---|---|"]
    table += [f"| `{key}` | {verdict} | {stages} | {says} |" for key, verdict, stages, says in deepspeed_keys.rows()]
    return "\n".join([DEEPSPEED_INTRO, *table, ""])


def _table(group: type[RunSettings], without: set[str]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    yield from (_row(each) for each in settings_of(group) if each.key.split(".")[0] not in without)
    yield ""


def _row(setting: Setting) -> str:
    kind, sentence = setting.kind.replace("|", r"\|"), setting.sentence.replace("|", r"\|")
    default = "required" if setting.default == "required" else f"`{setting.default}`"
    return f"| `{setting.key}` | {kind} | {default} | {sentence} |"


def _schema_text(step: str) -> str:
    return json.dumps(schema(settings_class("", step)), indent=1) + "\n"


def schema(group: type[RunSettings]) -> dict[str, Any]:
    """The JSON Schema of a step's YAML, for editors. Keys are required only in a file that extends none."""
    whole = group.model_json_schema()
    required = whole["required"]
    plain = _without_required(whole)
    plain["properties"] = {"extends": EXTENDS, **plain["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **plain} | {
        "anyOf": [{"required": ["extends"]}, {"required": required}]
    }


def _without_required(node: Any) -> Any:
    """A schema without `required`, which a base may give, and without titles, which repeat the keys."""
    if isinstance(node, list):
        return [_without_required(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_required(part) for name, part in value.items()} if key in ("properties", "$defs")
        else _without_required(value)
        for key, value in node.items()
        if key not in ("title", "required")
    }  # fmt: skip


if __name__ == "__main__":
    main()
