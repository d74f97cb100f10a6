"""Settings: YAML files and `key=value` overrides into frozen, checked pydantic models.

    settings = load_config(SFTConfig, ["--config", "step1.yaml", "optimizer.learning_rate=1e-5"])

Reading a config does no work and builds nothing; whatever is wrong raises `UserError` with the file, the
key and the fix. The groups of settings that several steps share live here, a step's own in its config.py.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from tristage.errors import UserError

Precision = Literal["float32", "bf16", "fp16"]

# The step's YAML owns these; a DeepSpeed JSON that sets one would silently win or lose against it.
OWNED_BY_YAML = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "managed_gradient_accumulation": "global_batch and micro_batch",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}


class Settings(BaseModel):
    """Base of every group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class OptimizerSettings(Settings):
    """AdamW and its schedule; all counts are optimizer steps."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; biases and norms get none.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's moment decays.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    clip_norm: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this; 0 is off.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="What the learning rate does after the warm-up: falls to 0, or stays."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")


class DataSettings(Settings):
    """Where rows come from: a .json, .jsonl or .jsonl.gz file, a saved datasets folder, or a hub id."""

    train: str = Field(description="Source of the training rows.")
    split: str = Field("train", description="Split of `train`, for hub ids and saved folders.")
    heldout: str | None = Field(None, description="Source of the held-out rows; null splits them off `train`.")
    heldout_split: str = Field("test", description="Split of `heldout`, for hub ids and saved folders.")
    heldout_fraction: float = Field(
        0.05, gt=0, lt=1, description="Share of prompts held out of `train` when `heldout` is null."
    )
    subset: str | None = Field(None, description="Folder inside a hub data set (its data_dir).")
    limit: int | None = Field(None, gt=0, description="Read at most this many rows of each source.")
    heldout_limit: int | None = Field(None, gt=0, description="Evaluate on at most this many held-out rows.")


class RunSettings(Settings):
    """What every step has."""

    output: str = Field(description="Folder of this run: metrics, checkpoints, final model.")
    seed: int = Field(0, ge=0, description="Seed of data order, new weights and sampling.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs when there are any.")
    precision: Precision = Field("bf16", description="Weights and activations; losses are always float32.")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves only at the end.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept on disk.")
    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations; 0: before and after only.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues from output/checkpoints when there is one; never starts again."
    )
    _folder: Path = PrivateAttr(default=Path("."))
    _file: str = PrivateAttr(default="settings")

    @property
    def folder(self) -> Path:
        """Folder of the YAML file: relative `deepspeed` paths are looked up here after the working folder."""
        return self._folder

    @property
    def file(self) -> str:
        """The YAML file's name, for messages."""
        return self._file


class TrainSettings(RunSettings):
    """Steps 1 and 2: one model trained for some epochs over rows."""

    model: str = Field(description="Hugging Face folder or id to start from.")
    data: DataSettings
    max_tokens: int = Field(512, gt=1, description="Prompt and answer together; longer rows are dropped, counted.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; null: all epochs.")
    global_batch: int = Field(gt=0, description="Rows in one optimizer step, over all ranks.")
    micro_batch: int = Field(gt=0, description="Rows in one forward and backward on one rank.")
    optimizer: OptimizerSettings
    deepspeed: str = Field(description="DeepSpeed JSON: ZeRO stage, offload, communication.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a run, in one place: global = micro x accumulation x ranks."""

    global_batch: int
    micro_batch: int
    world_size: int
    accumulation: int

    @classmethod
    def make(
        cls, global_batch: int, micro_batch: int, world_size: int, keys: str = "global_batch, micro_batch"
    ) -> BatchPlan:
        """Raises UserError, with the numbers, unless micro_batch x world_size divides global_batch."""
        rows = micro_batch * world_size
        if global_batch % rows:
            fit = max(rows, global_batch // rows * rows)
            raise UserError(
                f"{keys}: {global_batch} rows don't divide into micro-batches of {micro_batch} on {world_size} "
                f"ranks ({micro_batch} x {world_size} = {rows}); use for instance {fit} rows a step"
            )
        return cls(global_batch, micro_batch, world_size, global_batch // rows)

    def __str__(self) -> str:
        return (
            f"{self.global_batch} rows a step = micro-batch {self.micro_batch} "
            f"x accumulation {self.accumulation} x ranks {self.world_size}"
        )


S = TypeVar("S", bound=RunSettings)


def load_config(settings_class: type[S], argv: list[str]) -> S:
    """Read `--config FILE [key=value ...]` into a `settings_class`.

    Dots in a key reach into groups (`optimizer.learning_rate=1e-5`); values are YAML. `--local_rank=N`, which
    the deepspeed launcher appends, is accepted and ignored (ranks come from the environment).

    Raises:
        UserError: missing or unreadable file, unknown key, wrong type, impossible combination.
    """
    file, overrides = _split_arguments(argv)
    values = _read_yaml(file)
    for key, value in overrides:
        _set_key(values, key, value)
    try:
        settings = settings_class.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: {_explain(error, settings_class)}") from None
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


def _explain(error: ValidationError, settings_class: type[BaseModel]) -> str:
    """The first problem as one sentence: the key, what is wrong, what to do."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _all_keys(settings_class), n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else "remove it"
        return f"unknown key `{key}`; {fix}"
    if problem["type"] == "missing":
        return f"key `{key}` is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"key `{key}`: {message}; it is {json.dumps(problem['input'], default=str)} now"


def _all_keys(settings_class: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in settings_class.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def read_deepspeed_json(path: str, settings: RunSettings, key: str = "deepspeed") -> dict[str, Any]:
    """The DeepSpeed JSON that `key` names: looked up from the working folder, then beside the YAML file.

    Raises:
        UserError: no such file, not JSON, or it sets something that the YAML owns.
    """
    candidates = [Path(path), settings.folder / path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"{settings.file}: key `{key}`: no file {path}, here or beside the config; give its path")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); mend that line") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f'{file}: holds no settings of ZeRO; write {{"zero_optimization": {{"stage": 2}}}}')
    for name, owner in OWNED_BY_YAML.items():
        if name in values:
            raise UserError(f"{file}: `{name}` is set by `{owner}` in {settings.file}; remove it from the JSON")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    return values


def require_folder_or_hub_id(path: str, settings: RunSettings, key: str) -> None:
    """A model path must be a folder with a config.json, or look like a hub id (`owner/name`)."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{settings.file}: key `{key}`: {path} has no config.json; give a model folder")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or os.path.isdir(path.split("/")[0]):
        raise UserError(
            f"{settings.file}: key `{key}`: there is no folder {path}; "
            "give a Hugging Face folder, or run the step that writes it first"
        )


def world_size_from_environment() -> int:
    """Ranks of this launch, known before anything is set up; 1 outside the deepspeed launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


__all__ = [
    "BatchPlan",
    "DataSettings",
    "OptimizerSettings",
    "RunSettings",
    "Settings",
    "TrainSettings",
    "load_config",
    "model_validator",
    "read_deepspeed_json",
    "require_folder_or_hub_id",
    "world_size_from_environment",
]
