"""Settings of step 3, and the arithmetic between them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tristage.config import BatchPlan, Kind, LoraSettings, OptimizerSettings, RunSettings, Settings, Sources
from tristage.errors import UserError


class PPOOptimizerSettings(OptimizerSettings):
    """As elsewhere, but for the epsilon that PPO wants ("The 37 Implementation Details of PPO", detail 3)."""

    eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")


class TrainedModel(Settings):
    """Actor or critic: where it starts, how it is sharded and trained."""

    model: str | None = Field(
        None,
        description="Folder or id; the critic's default is the reward model's, or the actor's with a new head where "
        "there is none or it reads other tokens (reward.retokenize).",
    )
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, any ZeRO stage.")
    optimizer: PPOOptimizerSettings
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters; null: all weights.")


class CriticModel(TrainedModel):
    """The critic: not there when advantages come from groups of responses (ppo.advantage rloo or grpo)."""

    warmup_iterations: int = Field(0, ge=0, description="First iterations in which only the critic learns.")


class FrozenModel(Settings):
    """Reference or reward model: only asked, never trained."""

    model: str | None = Field(None, description="Folder or id; the reference's default is the actor's.")
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, ZeRO stage 0 (whole) or 3 (partitioned).")


class RewardFunction(Settings):
    """A Python function as a reward, alone or beside the reward model."""

    function: str = Field(description="package.module:function, (prompts, responses) -> scores, lists of one length.")
    weight: float = Field(1.0, description="Factor of its scores in the sum.")


class RewardModel(FrozenModel):
    """What responses are trained towards: weight * reward model + the weighted functions."""

    deepspeed: str = Field("zero0", description="DeepSpeed JSON, ZeRO stage 0 or 3.")
    weight: float = Field(1.0, description="Factor of the reward model's score.")
    score: Literal["last", "mean"] = Field(
        "last", description="A response's score: the value at its last token, or the mean over its tokens."
    )
    retokenize: bool = Field(
        False,
        description="The reward model has a tokenizer and template of its own: responses are decoded and rendered by "
        "them. The critic cannot start from it then: see critic.model.",
    )
    trust_remote_code: bool = Field(
        False,
        description="As the run's `trust_remote_code`, which does not count for a reward model of other tokens "
        "(retokenize).",
    )
    functions: tuple[RewardFunction, ...] = Field((), description="Functions added to the reward model's score.")
    on_critic: bool = Field(
        False,
        description="No second copy: the reward model is the critic's frozen trunk, its adapters off (critic.lora).",
    )


class ValueHead(Settings):
    """The critic as one linear layer on the actor's hidden states, for want of memory: one engine, one objective.

    surrogate - old_kl_coef * KL(old, new) - coef * value loss, maximised in the actor's optimizer step.
    """

    coef: float = Field(0.1, gt=0, description="Weight of the value loss, whose gradient the trunk gets as well.")
    old_kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL from the policy that sampled to the one being trained."
    )


class EMASettings(Settings):
    """A moving average of the actor's weights in float32, evaluated and exported beside it."""

    decay: float = Field(0.992, gt=0, lt=1, description="Share that the average keeps at each optimizer step.")
    start: float = Field(0.0, ge=0, lt=1, description="Share of all optimizer steps before it starts to average.")


class PretrainingMix(Settings):
    """The pretraining loss in the actor's step (InstructGPT, Ouyang et al. 2022, eq. 2)."""

    data: Sources = Field(min_length=1, description="Sources of plain text.")
    coef: float = Field(27.8, gt=0, description="Weight of the language-model loss, a mean over tokens.")
    block_tokens: int = Field(512, gt=1, description="Tokens of one block of text.")
    blocks: int = Field(gt=0, description="Blocks in one optimizer step, over all ranks.")


class RolloutSettings(Settings):
    """How responses are sampled."""

    prompts: int = Field(gt=0, description="Prompts of one iteration, over all ranks.")
    samples: int = Field(1, gt=0, description="Responses to each prompt; rloo and grpo need two or more.")
    rows_at_once: int = Field(64, gt=0, description="Rows one rank decodes at once; independent of micro_batch.")
    max_response_tokens: int = Field(gt=0, description="A response without EOS ends here.")
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Tokens that end a response like the tokenizer's EOS, such as a chat model's end of turn."
    )
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
    advantage: Literal["gae", "rloo", "grpo"] = Field(
        "gae", description="From the critic (gae), or from the other responses to the prompt, without a critic."
    )
    clip: float = Field(0.2, gt=0, lt=1, description="The probability ratio is clipped to 1 +- this.")
    clip_high: float | None = Field(None, gt=0, description="The upper clip, where it is another one (DAPO).")
    dual_clip: float | None = Field(
        None, gt=1, description="A negative advantage costs at most this times itself; 3 is usual, null is off."
    )
    value_loss: Literal["clipped", "huber"] = Field("clipped", description="Squared and clipped, or Huber's.")
    value_clip: float | None = Field(0.2, gt=0, description="Values move at most this far a rollout; null is off.")
    huber_delta: float = Field(1.0, gt=0, description="Error at which Huber's loss turns linear.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus, nats a token.")
    target_kl: float | None = Field(
        None, gt=0, description="No further epoch once policy/approx_kl of one is above this; null: all epochs."
    )
    whiten: bool = Field(True, description="Advantages of gae to mean 0 and variance 1 over the iteration's tokens.")
    bootstrap: bool = Field(
        False, description="A response cut off at the token limit is worth its last state's value, not 0, afterwards."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a token.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty.")
    kl_kind: Literal["k1", "k2", "k3"] = Field("k1", description="Estimator of the KL penalty.")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="The penalty is part of the rewards, or added to the loss with its own gradient."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Nats a response that an adaptive kl_coef steers to; null: kl_coef is fixed."
    )
    kl_horizon: float = Field(10_000.0, gt=0, description="Responses that an adaptive kl_coef takes to react.")
    missing_eos_penalty: float = Field(0.0, ge=0, description="Taken off the score of a response without EOS.")
    scale_reward: bool = Field(False, description="Divide scores by the standard deviation of all scores so far.")
    reward_clip: float | None = Field(
        5.0, gt=0, description="The score, penalised and scaled, is clipped to +- this; null is off."
    )


class PPOConfig(RunSettings):
    """PPO with four engines."""

    kind: ClassVar[Kind] = "prompt"
    step: ClassVar[int] = 3
    policies: ClassVar[tuple[str, ...]] = ("actor.model", "reference.model")
    actor: TrainedModel
    critic: CriticModel | None = Field(None, description="The critic, which ppo.advantage gae needs; else null.")
    value_head: ValueHead | None = Field(None, description="In place of a critic: a head on the actor's trunk.")
    reference: FrozenModel | None = Field(
        None, description="The reference; null with actor.lora: the actor without its adapters, no second copy."
    )
    reward: RewardModel
    ema: EMASettings | None = Field(None, description="A moving average of the actor's weights; null: none.")
    pretraining: PretrainingMix | None = Field(None, description="Text in the actor's steps; null: none.")
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
        if self.reward.model is None and not self.reward.functions:
            raise ValueError("key `reward.model` is missing; give step 2's final folder, or `reward.functions`")
        if self.responses % self.ppo.minibatch:
            what = "rollout.prompts" if self.rollout.samples == 1 else "rollout.prompts x rollout.samples"
            raise ValueError(
                f"{what} {self.responses} is not a multiple of ppo.minibatch {self.ppo.minibatch}; change one of them"
            )
        if self.reference is None and self.actor.lora is None:
            raise ValueError(
                "key `reference` is missing; give `reference.deepspeed`, or train the actor by `actor.lora`: without "
                "its adapters it is the reference"
            )
        self._check_advantage()
        self._check_on_critic()
        self._check_unused()
        return self

    def _check_unused(self) -> None:
        """A setting that would do nothing beside the others is refused, not ignored."""
        without_critic = {"whiten", "bootstrap", "gamma", "lam", "value_loss", "value_clip", "huber_delta"}
        unused = without_critic if self.critic is None and self.value_head is None else set()
        unused |= {"value_clip"} if self.ppo.value_loss == "huber" else {"huber_delta"}
        unused |= set() if self.ppo.kl_target is not None else {"kl_horizon"}
        for key in sorted(unused & self.ppo.model_fields_set):
            raise ValueError(f"key `ppo.{key}` does nothing beside the other settings; remove it")
        if self.reward.trust_remote_code and not self.reward.retokenize:
            raise ValueError("key `reward.trust_remote_code` is for `reward.retokenize`; use `trust_remote_code`")
        if self.ppo.kl_target is not None and self.ppo.kl_coef == 0:
            raise ValueError("key `ppo.kl_target` steers kl_coef by factors, and 0 stays 0; give ppo.kl_coef a value")
        if self.reward.model is None:
            of_model = {"weight", "score", "deepspeed", "on_critic", "retokenize", "trust_remote_code"}
            for key in sorted(of_model & self.reward.model_fields_set):
                raise ValueError(f"key `reward.{key}` is of the reward model, and there is none; remove it")

    def _check_on_critic(self) -> None:
        if not self.reward.on_critic:
            return
        if self.critic is None or self.critic.lora is None:
            raise ValueError("reward.on_critic shares the critic's frozen trunk; train the critic by `critic.lora`")
        if self.critic.model not in (None, self.reward.model):
            raise ValueError("reward.on_critic: `critic.model` is another than `reward.model`; remove it")
        if self.reward.retokenize:
            raise ValueError("reward.on_critic: the critic reads the actor's tokens; remove `reward.retokenize`")
        if "deepspeed" in self.reward.model_fields_set:
            raise ValueError("key `reward.deepspeed` does nothing beside reward.on_critic; remove it")

    def _check_advantage(self) -> None:
        if self.ppo.advantage == "gae":
            if self.critic is None and self.value_head is None:
                raise ValueError(
                    "key `critic` is missing; give it, or `value_head`, or set `ppo.advantage` to rloo or grpo"
                )
            if self.critic is not None and self.value_head is not None:
                raise ValueError("`critic` and `value_head` are two critics; remove one of them")
            if self.value_head is not None and self.actor.lora is not None and self.actor.lora.quantize is not None:
                raise ValueError("`value_head` needs the actor's trunk in full; remove `actor.lora.quantize`")
            return
        if self.rollout.samples < 2:
            raise ValueError(
                f"ppo.advantage {self.ppo.advantage} compares responses to one prompt; set rollout.samples to 2 or more"
            )
        for key in ("critic", "value_head"):
            if getattr(self, key) is not None:
                raise ValueError(f"ppo.advantage {self.ppo.advantage} has no critic; remove `{key}` or set it to null")

    def trusts(self, name: str) -> bool:
        """A reward model of other tokens is trusted by a key of its own: it comes from elsewhere."""
        own = name == "reward" and self.reward.retokenize
        return self.reward.trust_remote_code if own else self.trust_remote_code

    @property
    def actor_path(self) -> str:
        return str(self.actor.model)

    @property
    def critic_path(self) -> str | None:
        """The reward model's weights by default; without one, or where it reads other tokens, the actor's, with a
        new head.
        """
        if self.critic is None:
            return None
        same_tokens = None if self.reward.retokenize else self.reward.model
        return self.critic.model or same_tokens or self.actor_path

    @property
    def responses(self) -> int:
        """Responses of one iteration, over all ranks."""
        return self.rollout.prompts * self.rollout.samples

    @property
    def reference_path(self) -> str:
        return (self.reference.model if self.reference is not None else None) or self.actor_path

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
        return self.iterations * self.ppo.epochs * (self.responses // self.ppo.minibatch)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the iterations in which the actor stands still."""
        warm = 0 if self.critic is None else min(self.critic.warmup_iterations, self.iterations)
        return warm * (self.total_steps // self.iterations)

    def plan(self, world_size: int) -> BatchPlan:
        """Batches of the updates. Raises UserError when rows don't divide over ranks."""
        if self.rollout.prompts % world_size:
            raise UserError(
                f"{self.file}: rollout.prompts {self.rollout.prompts} is not a multiple of {world_size} ranks; "
                "change it or the number of ranks"
            )
        if self.pretraining is not None:
            self.pretraining_plan(world_size)
        keys = f"{self.file}: ppo.minibatch, ppo.micro_batch"
        return BatchPlan.make(self.ppo.minibatch, self.ppo.micro_batch, world_size, keys)

    def pretraining_plan(self, world_size: int) -> BatchPlan:
        """Batches of the pretraining mix. Raises UserError when blocks don't divide over ranks."""
        assert self.pretraining is not None
        keys = f"{self.file}: pretraining.blocks, ppo.micro_batch"
        return BatchPlan.make(self.pretraining.blocks, self.ppo.micro_batch, world_size, keys)
