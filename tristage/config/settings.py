"""The groups of settings that several steps share, and the batch arithmetic; a step's own are in its config.py."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from tristage.config.base import SPLIT_AT_COMMAS, Settings
from tristage.config.engines import EngineSpec, RolloutSpec
from tristage.config.health import HealthSettings
from tristage.errors import UserError

Precision = Literal["float32", "bf16", "fp16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]
Kind = Literal["sft", "ranking", "prompt", "text"]  # what a step makes of a row
MAX_ROW_BYTES = 4 * 2**20  # tokenising takes 140 to 220 bytes of memory per byte of text


class OptimizerSettings(Settings):
    """AdamW and its schedule; all counts are optimizer steps."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; not applied to biases and norms.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's decay rates of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    clip_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm to this; 0 disables.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: cosine and linear fall to 0, constant stays."
    )
    warmup_steps: int = Field(0, ge=0, description="Number of optimizer steps of linear warm-up.")


class LoraSettings(Settings):
    """Low-rank adapters on linear layers; all other weights are frozen, except a scalar head."""

    rank: int = Field(16, gt=0, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters' output: alpha / rank.")
    targets: Annotated[tuple[str, ...], SPLIT_AT_COMMAS] = Field(
        ("all-linear",),
        min_length=1,
        description="Name endings of the linear layers to adapt, such as q_proj; all-linear: all but the output "
        "projection.",
    )
    quantize: Literal["nf4"] | None = Field(
        None, description="QLoRA: store frozen linear layers in 4 bits (nf4) by bitsandbytes; null keeps `precision`."
    )


class CleanRule(Settings):
    """One regular expression over some text columns of a source, applied before a row is read."""

    columns: tuple[str, ...] = Field(description="Columns to clean, by their names after `columns` has renamed them.")
    pattern: str = Field(description="Regular expression in Python's syntax.")
    replacement: str = Field("", description="Text that replaces each match.")


class SourceSettings(Settings):
    """One source of rows. A plain string in its place is its path."""

    path: str | None = Field(
        None, description="File, folder of files, datasets.save_to_disk folder or hub id; optional if a preset has one."
    )
    preset: str | None = Field(
        None,
        description="YAML with these same keys, for those not set here: a path, or a name in configs/datasets, such "
        "as rm-static.",
    )
    name: str | None = Field(None, description="Configuration of a hub data set (its `name`).")
    subset: str | None = Field(None, description="Folder inside the data set (its `data_dir`).")
    split: str = Field("train", description="Split to read, if the source has splits.")
    columns: dict[str, str | tuple[str, ...]] = Field(
        {},
        description="Our column: theirs. Dots reach inside (`question.text`, `answers.0`), a list makes a list; only "
        "these columns are read.",
    )
    clean: tuple[CleanRule, ...] = Field((), description="Regular expressions to apply to text columns, in order.")
    best_first: bool = Field(
        False, description="Take the order of `responses` without ranks or scores as a ranking, best first."
    )
    limit: int | None = Field(None, gt=0, description="Read at most this many usable rows.")
    weight: float = Field(
        1.0, gt=0, description="Copies of each row per epoch: 2 repeats all, 0.5 takes a fixed random half."
    )
    on_bad_row: Literal["error", "skip"] | None = Field(
        None, description="What to do with a malformed row; null: see `data.on_bad_row`."
    )


def _as_sources(value: Any) -> Any:
    """A path, one source or a list of either -> a list of sources."""
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": source} if isinstance(source, str) else source for source in several]


_Given = str | SourceSettings | tuple[str | SourceSettings, ...] | None  # as a YAML may give them
Sources = Annotated[tuple[SourceSettings, ...], BeforeValidator(_as_sources, json_schema_input_type=_Given)]


class DataSettings(Settings):
    """Rows that a step trains on, rows that are held out, and how they become tokens."""

    train: Sources = Field(min_length=1, description="Training rows: a path, a source or a list of them.")
    heldout: Sources = Field((), description="Held-out rows, in the same forms; null holds out prompts of `train`.")
    heldout_fraction: float = Field(
        0.05, gt=0, lt=1, description="Share of prompts held out of `train` when `heldout` is null."
    )
    data_split: Annotated[tuple[float, ...], SPLIT_AT_COMMAS] | None = Field(
        None,
        description="Shares of the training prompts for steps 1, 2 and 3, such as 2,4,4; null gives each step all.",
    )
    split_seed: int = Field(
        0, ge=0, description="Seed of `heldout_fraction`, `data_split` and source weights; use the same in all steps."
    )
    limit: int | None = Field(None, gt=0, description="Default for `limit` of every training source.")
    heldout_limit: int | None = Field(None, gt=0, description="Evaluate on at most this many held-out rows.")
    template: str | None = Field(
        None, description="Jinja file of a chat template; null uses the one in the model folder."
    )
    train_on: Literal["answers", "last_answer", "everything"] = Field(
        "answers", description="Tokens in SFT's loss: every assistant turn, the last one only, or prompts too."
    )
    too_long: Literal["drop", "truncate_left", "truncate_right"] = Field(
        "drop", description="Rows over the token limit: drop them, or cut the prompt's start or the answer's end."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A malformed row: stop with an error, or skip it, count it and list it in a file."
    )
    max_row_bytes: int = Field(
        MAX_ROW_BYTES, gt=0, description="A row with more bytes than this is malformed; it is not read to its end."
    )
    heldout_overlap: Literal["error", "drop", "allow"] = Field(
        "error",
        description="Training rows whose prompt is also held out: an error, drop and count them, or allow them.",
    )
    cache: str | None = Field(
        None, description="Folder for tokenised sets, one per node; null: $TRISTAGE_CACHE, else ~/.cache/tristage."
    )
    workers: int = Field(0, ge=0, description="Number of processes that tokenise; 0 chooses by set size and cores.")

    @field_validator("data_split")
    @classmethod
    def _three_shares(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and (len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0):
            raise ValueError("give three shares, for steps 1, 2 and 3, such as 2,4,4")
        return shares


class KeepBest(Settings):
    """Which checkpoint is the best and is kept however old it is."""

    metric: str = Field(description="Held-out metric in metrics.jsonl to compare, such as sft/loss.")
    lower_is_better: bool = Field(True, description="True if lower values are better, false if higher are.")


class EvalCommandSettings(Settings):
    """A command that measures the model during training: it is run on an exported folder."""

    command: str = Field(
        description="Program and arguments, without a shell; {model} stands for the exported folder. The last line "
        "that it prints is a JSON object, whose numbers become the metrics eval/<name>."
    )
    every: int = Field(0, ge=0, description="Steps between runs of it; 0 runs it only after training.")
    timeout_seconds: float = Field(3600.0, gt=0, description="Stop it after this time, and go on without its numbers.")

    @field_validator("command")
    @classmethod
    def _names_the_model(cls, command: str) -> str:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"is not a command line ({error})") from None
        if not any("{model}" in word for word in words):
            raise ValueError("does not name the model; write {model} where the exported folder goes")
        return command


class RunSettings(Settings):
    """Settings that every step has."""

    output: str = Field(description="Output folder of the run: metrics, checkpoints, final model.")
    data: DataSettings
    seed: int = Field(0, ge=0, description="Seed of data order, new weights and sampling.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to run on; auto uses GPUs if there are any."
    )
    precision: Precision = Field("bf16", description="Data type of weights and activations; losses are always float32.")
    attention: Attention = Field(
        "auto", description="Attention implementation in all models; auto leaves it to transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that model and tokenizer folders bring (auto_map); chat templates never do."
    )
    liger_kernel: bool = Field(False, description="Use Liger's GPU kernels for norms, rotary positions and MLPs.")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves only at the end.")
    keep_last: int = Field(2, ge=1, description="Number of newest checkpoints to keep on disk.")
    keep_every_n_steps: int = Field(0, ge=0, description="Also keep every N-th step's checkpoint; 0 keeps none.")
    keep_best: KeepBest | None = Field(None, description="Also keep the checkpoint that is best by a held-out metric.")
    evaluate_every: int = Field(
        0, ge=0, description="Steps between evaluations; 0 evaluates only before and after training."
    )
    max_bad_steps: int = Field(
        5, gt=0, description="Stop after this many steps in a row with nan or inf in a loss, gradient or score."
    )
    health: HealthSettings = Field(
        HealthSettings.model_validate({}),
        description="When the health monitor warns, and what ends the run; see docs/health.md.",
    )
    deterministic: bool = Field(
        False, description="Use deterministic kernels on GPUs, which are slower; CPUs need no setting."
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: continue from the newest checkpoint in output, if any; never: start from scratch; else the "
        "folder of a checkpoint or run to start from, until this run has a checkpoint of its own.",
    )
    resume_changed: bool = Field(False, description="Resume even if settings or data differ from the checkpoint's.")
    deepspeed_unchecked: Annotated[tuple[str, ...], SPLIT_AT_COMMAS] = Field(
        (), description="Keys of DeepSpeed JSONs that tristage does not know and hands on as they are, with dots."
    )
    check_disk: bool = Field(True, description="Refuse to start if the disk has no room for two checkpoints.")
    watchdog_seconds: float = Field(
        600,
        ge=0,
        description="End the run if a rank sends no heartbeat, or no rank makes progress, for this long (3x before "
        "the first step and while saving); stacks go to output/logs. 0 disables.",
    )
    eval_command: EvalCommandSettings | None = Field(
        None, description="A command of yours, such as a benchmark, that measures the model during training."
    )
    trackers: Annotated[tuple[Literal["wandb", "mlflow", "trackio"], ...], SPLIT_AT_COMMAS] = Field(
        (), description="Experiment trackers that also get the metrics; their own environment variables say where."
    )
    profile: str | None = Field(
        None,
        description="Steps to run under torch's profiler, such as 10..12: a trace and a table go to output/profile.",
    )
    kind: ClassVar[Kind]  # what the step makes of a row
    step: ClassVar[int]  # 1, 2 or 3: whose share of `data_split` it takes
    _folders: tuple[Path, ...] = PrivateAttr(default=(Path("."),))
    _file: str = PrivateAttr(default="settings")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_keep_best(self) -> RunSettings:
        if self.keep_best is not None and self.save_every:
            if not self.evaluate_every or self.save_every % self.evaluate_every:
                raise ValueError(
                    f"key `keep_best` compares checkpoints, and not each of save_every {self.save_every} is evaluated; "
                    "set evaluate_every to the same"
                )
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> RunSettings:
        if self.profile is not None and not re.fullmatch(r"[1-9]\d*\.\.[1-9]\d*", self.profile):
            raise ValueError(f"key `profile`: {self.profile!r} is not a range of steps; write it like 10..12")
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"key `profile`: {self.profile} ends before it begins; write it like 10..12")
        return self

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition("..")
        return int(first), int(last)

    @property
    def folder(self) -> Path:
        """Folder of the YAML file."""
        return self._folders[0]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the YAML file and of its bases, searched after the working folder for files that it names."""
        return self._folders

    @property
    def places(self) -> dict[str, str]:
        """Dotted key -> "file:line" or "command line" of the values that are not defaults."""
        return self._places

    @property
    def file(self) -> str:
        """The YAML file's name, for messages."""
        return self._file

    def engine_specs(self) -> list[EngineSpec]:
        """The engines of the run; the first is the one that learns to answer or to score."""
        raise NotImplementedError

    def rollout_spec(self) -> RolloutSpec | None:
        """How the run samples, if it does."""
        return None

    def plan(self, world_size: int) -> BatchPlan:
        """Batches of the optimizer steps. Raises UserError when rows don't divide over ranks."""
        raise NotImplementedError

    @property
    def row_tokens(self) -> int:
        """The longest row, in tokens, that the step takes."""
        raise NotImplementedError

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns of a row that reward functions read in addition to the prompt."""
        return ()

    @property
    def tokenizer_path(self) -> str:
        """Folder or id of the model whose tokenizer and template the step uses."""
        raise NotImplementedError


class TrainSettings(RunSettings):
    """Steps 1 and 2: one model trained for some epochs over rows."""

    model: str = Field(description="Hugging Face folder or id of the model to start from.")
    max_tokens: int = Field(
        512, gt=1, description="Token limit of a row, prompt and answer together; see `data.too_long`."
    )
    epochs: float = Field(1.0, gt=0, description="Number of passes over the training rows.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; null runs all epochs.")
    global_batch: int = Field(gt=0, description="Rows per optimizer step, over all ranks.")
    micro_batch: int = Field(gt=0, description="Rows per forward and backward on one rank.")
    optimizer: OptimizerSettings
    deepspeed: str = Field(
        description="DeepSpeed JSON (ZeRO stage, offload, communication): a path, or a name such as zero2."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters; null trains all weights.")
    group_by_length: bool = Field(
        False, description="Put rows of similar length into one step: less padding, but less mixed steps."
    )

    def engine_specs(self) -> list[EngineSpec]:
        return [
            EngineSpec(
                name="model",
                prefix="",
                path=self.model,
                path_key="model",
                holds="policy",
                deepspeed=self.deepspeed,
                tokens=self.max_tokens,
                rows=self.micro_batch,
                scored=self.max_tokens - 1,
                optimizer=self.optimizer,
                gradient_checkpointing=self.gradient_checkpointing,
                lora=self.lora,
                quantize=self.lora.quantize if self.lora is not None else None,
                trust_remote_code=self.trust_remote_code,
            )
        ]

    def plan(self, world_size: int) -> BatchPlan:
        keys = f"{self.file}: global_batch, micro_batch"
        return BatchPlan.make(self.global_batch, self.micro_batch, world_size, keys)

    @property
    def row_tokens(self) -> int:
        return self.max_tokens

    @property
    def tokenizer_path(self) -> str:
        return self.model


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
                f"ranks ({micro_batch} x {world_size} = {rows}); use for instance {fit} rows per step"
            )
        return cls(global_batch, micro_batch, world_size, global_batch // rows)

    def table(self) -> str:
        """Two lines: micro-batch x accumulation x ranks = rows per step."""
        heads = ("micro-batch", "accumulation", "ranks", "rows per step")
        row = (self.micro_batch, self.accumulation, self.world_size, self.global_batch)
        cells = [f"{value:>{len(head)}}" for head, value in zip(heads, row, strict=True)]
        return "\n".join(f"{a} x {b} x {c} = {d}" for a, b, c, d in (heads, cells))

    def __str__(self) -> str:
        return (
            f"{self.global_batch} rows per step = micro-batch {self.micro_batch} "
            f"x accumulation {self.accumulation} x ranks {self.world_size}"
        )
