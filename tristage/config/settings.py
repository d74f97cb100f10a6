"""The groups of settings that several steps share, and the batch arithmetic; a step's own are in its config.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from tristage.errors import UserError

Precision = Literal["float32", "bf16", "fp16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]
Kind = Literal["sft", "ranking", "prompt", "text"]  # what a step makes of a row
MAX_ROW_BYTES = 4 * 2**20  # tokenising takes 140 to 220 bytes of memory per byte of text


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


def _split_at_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


SPLIT_AT_COMMAS = BeforeValidator(_split_at_commas, json_schema_input_type=str | tuple[str | float, ...])


class LoraSettings(Settings):
    """Low-rank adapters are trained beside linear layers, which are frozen like everything else but a scalar head."""

    rank: int = Field(16, gt=0, description="Inner dimension of the adapters.")
    alpha: float = Field(32.0, gt=0, description="The adapters' output is scaled by alpha / rank.")
    targets: Annotated[tuple[str, ...], SPLIT_AT_COMMAS] = Field(
        ("all-linear",),
        min_length=1,
        description="Endings of the names of linear layers, such as q_proj; all-linear: all but the output projection.",
    )
    quantize: Literal["nf4"] | None = Field(
        None, description="QLoRA: the frozen linear layers in 4 bits (nf4) through bitsandbytes; null: in `precision`."
    )


class CleanRule(Settings):
    """One regular expression over some text columns of a source, applied before a row is read."""

    columns: tuple[str, ...] = Field(description="Columns (after `columns` has renamed them) to clean.")
    pattern: str = Field(description="Regular expression, as Python's re.")
    replacement: str = Field("", description="What each match becomes.")


class SourceSettings(Settings):
    """One source of rows. A plain string in its place is its path."""

    path: str | None = Field(
        None, description="File, folder of files, datasets.save_to_disk folder, or hub id; a preset may give it."
    )
    preset: str | None = Field(
        None, description="YAML of these same keys that fills those not given here, such as configs/datasets/*.yaml."
    )
    name: str | None = Field(None, description="Configuration of a hub data set (its `name`).")
    subset: str | None = Field(None, description="Folder inside the data set (its `data_dir`).")
    split: str = Field("train", description="Split, where the source has splits.")
    columns: dict[str, str | tuple[str, ...]] = Field(
        {},
        description="Our column -> theirs, dots reach inside (`question.text`, `answers.0`), a list makes a list. "
        "When given, only these columns are read.",
    )
    clean: tuple[CleanRule, ...] = Field((), description="Regular expressions over text columns, in order.")
    best_first: bool = Field(False, description="`responses` without ranks or scores stand in order, best first.")
    limit: int | None = Field(None, gt=0, description="Read at most this many usable rows.")
    weight: float = Field(
        1.0, gt=0, description="Copies of each row an epoch: 2 repeats all, 0.5 takes a fixed random half."
    )
    on_bad_row: Literal["error", "skip"] | None = Field(None, description="Null: as `data.on_bad_row`.")


def _as_sources(value: Any) -> Any:
    """A path, one source or a list of either -> a list of sources."""
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": source} if isinstance(source, str) else source for source in several]


_Given = str | SourceSettings | tuple[str | SourceSettings, ...] | None  # as a YAML may give them
Sources = Annotated[tuple[SourceSettings, ...], BeforeValidator(_as_sources, json_schema_input_type=_Given)]


class DataSettings(Settings):
    """Which rows a step trains on, which are held out, and how they become tokens."""

    train: Sources = Field(min_length=1, description="Training rows: a path, a source, or a list of them.")
    heldout: Sources = Field((), description="Held-out rows, likewise; null splits them off `train` by prompt.")
    heldout_fraction: float = Field(
        0.05, gt=0, lt=1, description="Share of prompts held out of `train` when `heldout` is null."
    )
    data_split: Annotated[tuple[float, ...], SPLIT_AT_COMMAS] | None = Field(
        None, description="Shares of the training prompts for steps 1, 2 and 3, such as 2,4,4; null: all to each."
    )
    split_seed: int = Field(
        0, ge=0, description="Seed of `heldout_fraction`, `data_split` and weights; the same in all steps of a recipe."
    )
    limit: int | None = Field(None, gt=0, description="As `limit` of each training source that sets none.")
    heldout_limit: int | None = Field(None, gt=0, description="Evaluate on at most this many held-out rows.")
    template: str | None = Field(
        None, description="Jinja file of a chat template to use instead of the model folder's own."
    )
    train_on: Literal["answers", "last_answer", "everything"] = Field(
        "answers", description="SFT's loss: every assistant turn, the last one only, or prompts as well."
    )
    too_long: Literal["drop", "truncate_left", "truncate_right"] = Field(
        "drop", description="Rows over the token limit: dropped, or cut at the prompt's start or the answer's end."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A malformed row ends the run, or is skipped, counted and listed in a file."
    )
    max_row_bytes: int = Field(
        MAX_ROW_BYTES, gt=0, description="A row with more bytes than this is malformed; it is not read to its end."
    )
    overlap: Literal["error", "drop", "allow"] = Field(
        "error", description="Training rows whose prompt is held out: an error, dropped and counted, or kept."
    )
    cache: str | None = Field(
        None, description="Folder of tokenised sets; null: $TRISTAGE_CACHE, else ~/.cache/tristage. Local to a node."
    )
    workers: int = Field(0, ge=0, description="Processes that tokenise; 0: as many as the set and the node call for.")

    @field_validator("data_split")
    @classmethod
    def _three_shares(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and (len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0):
            raise ValueError("give three shares, for steps 1, 2 and 3, such as 2,4,4")
        return shares


class KeepBest(Settings):
    """Which checkpoint is the best one, which then stays however old it is."""

    metric: str = Field(description="A held-out metric of metrics.jsonl, such as sft/loss.")
    lower: bool = Field(True, description="Lower is better; false: higher is.")


class RunSettings(Settings):
    """What every step has."""

    output: str = Field(description="Folder of this run: metrics, checkpoints, final model.")
    data: DataSettings
    seed: int = Field(0, ge=0, description="Seed of data order, new weights and sampling.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs when there are any.")
    precision: Precision = Field("bf16", description="Weights and activations; losses are always float32.")
    attention: Attention = Field("auto", description="Implementation of attention in all models; auto: transformers'.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that model and tokenizer folders bring (auto_map); chat templates never do."
    )
    liger_kernel: bool = Field(False, description="Norms, rotary positions and MLPs by Liger's GPU kernels.")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves only at the end.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept on disk.")
    keep_every: int = Field(0, ge=0, description="Checkpoints of every so many-th step stay besides; 0: none.")
    keep_best: KeepBest | None = Field(None, description="The best checkpoint by a held-out metric stays besides.")
    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations; 0: before and after only.")
    max_bad_steps: int = Field(
        5, gt=0, description="Stop after this many steps in a row with a loss, gradient or score of nan or inf."
    )
    deterministic: bool = Field(
        False, description="Deterministic kernels on GPUs, where torch has them: slower. CPUs need no setting."
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto continues from output/checkpoints when there is one; never starts again; else a checkpoint's "
        "or a run's folder to start from (started again, the run goes on from what it has saved since).",
    )
    resume_changed: bool = Field(False, description="Continue although settings or data are not the checkpoint's.")
    check_disk: bool = Field(True, description="Refuse to train where the disk has no room for two checkpoints.")
    watchdog_seconds: float = Field(
        600,
        ge=0,
        description="A rank that gives no sign of life, or all ranks that do not move, for so long end the run, stacks "
        "in output/logs; three times as long before the first step and while saving. 0: never.",
    )
    kind: ClassVar[Kind]  # what the step makes of a row
    step: ClassVar[int]  # 1, 2 or 3: whose share of `data_split` it takes
    policies: ClassVar[tuple[str, ...]] = ()  # keys of models that must be language models
    _folders: tuple[Path, ...] = PrivateAttr(default=(Path("."),))
    _file: str = PrivateAttr(default="settings")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _best_is_measured(self) -> RunSettings:
        if self.keep_best is not None and self.save_every:
            if not self.evaluate_every or self.save_every % self.evaluate_every:
                raise ValueError(
                    f"key `keep_best` compares checkpoints, and not each of save_every {self.save_every} is evaluated; "
                    "set evaluate_every to the same"
                )
        return self

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

    def trusts(self, name: str) -> bool:
        """Whether code in the folder of the model that the group `name` names may run."""
        return self.trust_remote_code

    def plan(self, world_size: int) -> BatchPlan:
        """Batches of the optimizer steps. Raises UserError when rows don't divide over ranks."""
        raise NotImplementedError

    @property
    def row_tokens(self) -> int:
        """The longest row, in tokens, that the step takes."""
        raise NotImplementedError

    @property
    def tokenizer_path(self) -> str:
        """Folder or id of the model whose tokenizer and template the step uses."""
        raise NotImplementedError


class TrainSettings(RunSettings):
    """Steps 1 and 2: one model trained for some epochs over rows."""

    model: str = Field(description="Hugging Face folder or id to start from.")
    max_tokens: int = Field(512, gt=1, description="Prompt and answer together; see `data.too_long`.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; null: all epochs.")
    global_batch: int = Field(gt=0, description="Rows in one optimizer step, over all ranks.")
    micro_batch: int = Field(gt=0, description="Rows in one forward and backward on one rank.")
    optimizer: OptimizerSettings
    deepspeed: str = Field(description="DeepSpeed JSON: ZeRO stage, offload, communication.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters; null: all weights.")
    group_by_length: bool = Field(
        False, description="Steps of rows of like length: less padding, but rows of a step are then less mixed."
    )

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
                f"ranks ({micro_batch} x {world_size} = {rows}); use for instance {fit} rows a step"
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
            f"{self.global_batch} rows a step = micro-batch {self.micro_batch} "
            f"x accumulation {self.accumulation} x ranks {self.world_size}"
        )
