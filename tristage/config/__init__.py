"""Settings: checked pydantic models from YAML and overrides, DeepSpeed JSON, paths. Never imports torch."""

from tristage.config.deepspeed_json import read_deepspeed_json, world_size_from_environment
from tristage.config.engines import EngineSpec, Holds, RolloutSpec
from tristage.config.files import CONFIGS, shipped_path
from tristage.config.paths import NOT_A_POLICY, SCORER, named_paths, require_folder_or_hub_id
from tristage.config.reading import find_file, load_config, read_values
from tristage.config.settings import (
    MAX_ROW_BYTES,
    Attention,
    BatchPlan,
    CleanRule,
    DataSettings,
    KeepBest,
    Kind,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSettings,
    Settings,
    Sources,
    SourceSettings,
    TrainSettings,
)
from tristage.config.steps import STEPS, settings_class

__all__ = [
    "Attention",
    "BatchPlan",
    "CleanRule",
    "DataSettings",
    "EngineSpec",
    "Holds",
    "KeepBest",
    "Kind",
    "LoraSettings",
    "MAX_ROW_BYTES",
    "NOT_A_POLICY",
    "OptimizerSettings",
    "Precision",
    "RolloutSpec",
    "RunSettings",
    "SCORER",
    "CONFIGS",
    "STEPS",
    "Settings",
    "SourceSettings",
    "Sources",
    "TrainSettings",
    "find_file",
    "load_config",
    "named_paths",
    "read_deepspeed_json",
    "read_values",
    "require_folder_or_hub_id",
    "settings_class",
    "shipped_path",
    "world_size_from_environment",
]
