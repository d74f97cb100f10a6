"""Settings of learning from preferences without a reward model, and which go together."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tristage.config import EngineSpec, Kind, Settings, TrainSettings


class ReferenceModel(Settings):
    """The model that the policy is compared with; it is never trained."""

    model: str | None = Field(None, description="Folder or id of the reference model; null uses the policy's start.")
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, ZeRO stage 0 (whole) or 3 (partitioned).")


class DPOConfig(TrainSettings):
    """DPO, IPO or SimPO: rows are prompts with two or more ranked answers; batches count prompts."""

    kind: ClassVar[Kind] = "ranking"
    step: ClassVar[int] = 2
    loss: Literal["sigmoid", "ipo", "ipo_sum", "simpo"] = Field(
        "sigmoid",
        description="sigmoid: DPO; ipo: a fixed gap of means per token; ipo_sum: of sums over an answer; simpo: means "
        "per token, without a reference.",
    )
    beta: float = Field(
        0.1, gt=0, description="Scale of the implicit reward; 2 to 10 for simpo, whose rewards are means per token."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="sigmoid only: probability that a label is flipped (conservative DPO)."
    )
    gamma: float | None = Field(
        None, ge=0, description="simpo only: target margin between the rewards; 0.25 to 1 times beta is usual."
    )
    reference: ReferenceModel | None = Field(
        None, description="Reference model, required by all losses but simpo; null for simpo."
    )
    precompute_reference: bool = Field(
        False,
        description="Compute reference log-probabilities once before training, then free the model; cached in "
        "output/reference.",
    )

    @model_validator(mode="after")
    def _check(self) -> DPOConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"key `label_smoothing`: {self.loss} has none; remove it or use `loss: sigmoid`")
        return self._check_simpo() if self.loss == "simpo" else self._check_with_reference()

    def _check_simpo(self) -> DPOConfig:
        if self.reference is not None:
            raise ValueError("key `reference`: simpo has no reference model; remove it")
        if self.precompute_reference:
            raise ValueError("key `precompute_reference`: simpo has no reference model; remove it")
        for key in ("beta", "gamma"):
            if key not in self.model_fields_set or getattr(self, key) is None:
                raise ValueError(f"key `{key}` is missing; simpo needs one, `beta: 2.0` and `gamma: 1.0` are usual")
        return self

    def _check_with_reference(self) -> DPOConfig:
        if self.gamma is not None:
            raise ValueError(f"key `gamma`: {self.loss} has no target margin; remove it or use `loss: simpo`")
        if self.reference is None:
            raise ValueError(f"key `reference.deepspeed` is missing; {self.loss} needs a reference model, add it")
        return self

    @property
    def reference_path(self) -> str:
        """The reference's folder or id. Only for the losses that have one."""
        assert self.reference is not None
        return self.reference.model or self.model

    def engine_specs(self) -> list[EngineSpec]:
        """The policy and, for the losses that have one, the reference."""
        (model,) = super().engine_specs()
        model = dataclasses.replace(model, rows=2 * self.micro_batch)  # two answers per prompt
        if self.reference is None:
            return [model]
        reference = dataclasses.replace(
            model,
            name="reference",
            prefix="reference.",
            path=self.reference_path,
            path_key="reference.model" if self.reference.model else "model",
            deepspeed=self.reference.deepspeed,
            optimizer=None,
            gradient_checkpointing=False,
            lora=None,
            freed_before_training=self.precompute_reference,
        )
        return [model, reference]
