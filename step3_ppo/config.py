"""Settings of step 3, and the arithmetic between them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tristage.config import BatchPlan, Kind, OptimizerSettings, RunSettings, Settings
from tristage.errors import UserError


class PPOOptimizerSettings(OptimizerSettings):
    """As elsewhere, but for the epsilon that PPO wants ("The 37 Implementation Details of PPO", detail 3)."""

    eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")


class TrainedModel(Settings):
    """Actor or critic: where it starts, how it is sharded and trained."""

    model: str | None = Field(None, description="Folder or id; the critic's default is the reward model's.")
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, any ZeRO stage.")
    optimizer: PPOOptimizerSettings
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")


class FrozenModel(Settings):
    """Reference or reward model: only asked, never trained."""

    model: str | None = Field(None, description="Folder or id; the reference's default is the actor's.")
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, ZeRO stage 0 (whole) or 3 (partitioned).")


class RolloutSettings(Settings):
    """How responses are sampled."""

    prompts: int = Field(gt=0, description="Prompts of one iteration, over all ranks, one response each.")
    rows_at_once: int = Field(64, gt=0, description="Rows one rank decodes at once; independent of micro_batch.")
    max_response_tokens: int = Field(gt=0, description="A response without EOS ends here.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; log-probabilities are taken at it.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; below 1 the sampled law is not the scored one.")
    top_k: int = Field(0, ge=0, description="0 is off; else as top_p.")
    gather: Literal["auto", "never"] = Field(
        "auto", description="ZeRO-3: auto gathers the actor once a rollout when it fits; never: once a token."
    )


class PPOSettings(Settings):
    """The algorithm (Schulman et al. 2017) and the reward's shape."""

    epochs: int = Field(1, gt=0, description="Passes over the experience of one iteration.")
    minibatch: int = Field(gt=0, description="Rows in one optimizer step, over all ranks.")
    micro_batch: int = Field(gt=0, description="Rows in one forward and backward on one rank.")
    clip: float = Field(0.2, gt=0, description="The probability ratio is clipped to 1 +- this.")
    value_clip: float | None = Field(0.2, gt=0, description="Values move at most this far a rollout; null is off.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a token.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty in the reward.")
    kl_kind: Literal["k1", "k2", "k3"] = Field("k1", description="Estimator of the KL penalty.")
    reward_clip: float | None = Field(5.0, gt=0, description="The score is clipped to +- this; null is off.")


class PPOConfig(RunSettings):
    """PPO with four engines."""

    kind: ClassVar[Kind] = "prompt"
    step: ClassVar[int] = 3
    actor: TrainedModel
    critic: TrainedModel
    reference: FrozenModel
    reward: FrozenModel
    max_prompt_tokens: int = Field(256, gt=0, description="Tokens of a prompt; see `data.too_long`.")
    iterations: int = Field(gt=0, description="Rollouts, each followed by its updates.")
    rollout: RolloutSettings
    ppo: PPOSettings
    grader: str | None = Field(
        None,
        description="package.module:function, (prompts, responses) -> scores, that grades held-out responses. "
        "It is reported, never trained on.",
    )
    num_samples: int = Field(8, ge=0, description="Held-out responses written to samples.jsonl an evaluation.")

    @model_validator(mode="after")
    def _check(self) -> PPOConfig:
        if self.actor.model is None:
            raise ValueError("key `actor.model` is missing; give step 1's final folder")
        if self.reward.model is None:
            raise ValueError("key `reward.model` is missing; give step 2's final folder")
        if self.rollout.prompts % self.ppo.minibatch:
            raise ValueError(
                f"rollout.prompts {self.rollout.prompts} is not a multiple of ppo.minibatch {self.ppo.minibatch}; "
                "change one of them"
            )
        return self

    @property
    def actor_path(self) -> str:
        return str(self.actor.model)

    @property
    def reward_path(self) -> str:
        return str(self.reward.model)

    @property
    def critic_path(self) -> str:
        return self.critic.model or self.reward_path

    @property
    def reference_path(self) -> str:
        return self.reference.model or self.actor_path

    @property
    def row_tokens(self) -> int:
        return self.max_prompt_tokens

    @property
    def tokenizer_path(self) -> str:
        return self.actor_path

    @property
    def max_tokens(self) -> int:
        return self.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, the length of both schedules."""
        return self.iterations * self.ppo.epochs * (self.rollout.prompts // self.ppo.minibatch)

    def plan(self, world_size: int) -> BatchPlan:
        """Batches of the updates. Raises UserError when rows don't divide over ranks."""
        if self.rollout.prompts % world_size:
            raise UserError(
                f"{self.file}: rollout.prompts {self.rollout.prompts} is not a multiple of {world_size} ranks; "
                "change it or the number of ranks"
            )
        keys = f"{self.file}: ppo.minibatch, ppo.micro_batch"
        return BatchPlan.make(self.ppo.minibatch, self.ppo.micro_batch, world_size, keys)
