"""Settings of step 3, and the arithmetic between them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tristage.config import (
    BatchPlan,
    EngineSpec,
    Holds,
    Kind,
    LoraSettings,
    OptimizerSettings,
    RolloutSpec,
    RunSettings,
    Settings,
    Sources,
)
from tristage.errors import UserError


class PPOOptimizerSettings(OptimizerSettings):
    """The same fields; eps defaults to 1e-5 as in PPO practice ("The 37 Implementation Details of PPO", detail 3)."""

    eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")


class TrainedModel(Settings):
    """Actor or critic: where it starts, how it is sharded and trained."""

    model: str | None = Field(
        None,
        description="Folder or id to start from. The critic's default is the reward model, or the actor with a new "
        "head if there is no reward model or it has its own tokenizer.",
    )
    deepspeed: str = Field(
        description="DeepSpeed JSON of this engine, any ZeRO stage: a path, or a name such as zero2."
    )
    optimizer: PPOOptimizerSettings
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters; null: all weights.")


class CriticModel(TrainedModel):
    """The critic; null if advantages come from groups of responses (ppo.advantage rloo or grpo)."""

    warmup_iterations: int = Field(
        0, ge=0, description="Number of first iterations in which only the critic is trained."
    )


class FrozenModel(Settings):
    """Reference or reward model; it is never trained."""

    model: str | None = Field(None, description="Folder or id; the reference defaults to the actor's.")
    deepspeed: str = Field(description="DeepSpeed JSON of this engine, ZeRO stage 0 (whole) or 3 (partitioned).")


class RewardFunction(Settings):
    """A Python function as a reward, alone or added to the reward model's score."""

    function: str = Field(
        description="package.module:function, (prompts, responses) -> scores, lists of the same length; with a "
        "parameter `rows`, the columns of `reward.labels` too."
    )
    weight: float = Field(1.0, description="Weight of its scores in the sum.")
    normalize: bool = Field(
        False, description="Train on (score - mean) / deviation, of all its scores since the start of the run."
    )
    timeout_seconds: float | None = Field(None, gt=0, description="Give a call up after this; null waits.")
    retries: int = Field(0, ge=0, description="Further calls after one that failed, 1, 2, 4, ... seconds apart.")

    @property
    def name(self) -> str:
        """As metrics and samples have it."""
        return self.function.rpartition(":")[2]


class RewardModel(FrozenModel):
    """Scores of responses: weight * reward model + the weighted functions."""

    deepspeed: str = Field("zero0", description="DeepSpeed JSON, ZeRO stage 0 (whole) or 3 (partitioned).")
    weight: float = Field(1.0, description="Weight of the reward model's score.")
    score: Literal["last", "mean"] = Field(
        "last", description="Score of a response: the value at its last token, or the mean over its tokens."
    )
    own_tokenizer: bool = Field(
        False,
        description="Decode responses and tokenise them again with the reward model's own tokenizer and template; the "
        "critic cannot start from it then, see critic.model.",
    )
    trust_remote_code: bool = Field(
        False,
        description="As the run's `trust_remote_code`, which does not count for a reward model of other tokens "
        "(own_tokenizer).",
    )
    functions: tuple[RewardFunction, ...] = Field((), description="Functions added to the reward model's score.")
    labels: tuple[str, ...] = Field(
        (), description="Columns of the prompts' rows that functions and grader get as `rows`, such as an answer."
    )
    share_critic_trunk: bool = Field(
        False,
        description="Score with the critic's frozen trunk, adapters off, instead of a second copy. Needs critic.lora.",
    )


class ValueHead(Settings):
    """The critic as one linear layer on the actor's hidden states, to save memory: one engine and one objective.

    surrogate - old_policy_kl_coef * KL(old, new) - coef * value loss, maximised in the actor's optimizer step.
    """

    coef: float = Field(0.1, gt=0, description="Weight of the value loss, whose gradient also reaches the trunk.")
    old_policy_kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL from the sampling policy to the policy in training."
    )


class EMASettings(Settings):
    """A moving average of the actor's weights in float32; it is also evaluated and exported."""

    decay: float = Field(0.992, gt=0, lt=1, description="Fraction of the average kept at each optimizer step.")
    start: float = Field(0.0, ge=0, lt=1, description="Fraction of all optimizer steps before averaging starts.")


class PretrainingMix(Settings):
    """The pretraining loss in the actor's step (InstructGPT, Ouyang et al. 2022, eq. 2)."""

    data: Sources = Field(min_length=1, description="Sources of plain text.")
    coef: float = Field(27.8, gt=0, description="Weight of the language-model loss, a mean over tokens.")
    block_tokens: int = Field(512, gt=1, description="Tokens per block of text.")
    blocks: int = Field(gt=0, description="Blocks per optimizer step, over all ranks.")


class RolloutSettings(Settings):
    """How responses are sampled."""

    prompts: int = Field(gt=0, description="Prompts per iteration, over all ranks.")
    samples: int = Field(1, gt=0, description="Responses per prompt; rloo and grpo need two or more.")
    backend: Literal["auto", "static", "padded", "vllm"] = Field(
        "auto",
        description="Sampler: our own decoding loop (static), transformers' generate (padded), static where it knows "
        "the model's family and padded elsewhere (auto), or vLLM with a second copy of the weights (vllm).",
    )
    tensor_parallel: int = Field(1, gt=0, description="For backend vllm: ranks of a node that share one engine.")
    importance_sampling: Literal["off", "truncate", "mask"] = Field(
        "truncate",
        description="For backend vllm, which rounds differently from training: multiply each token's policy loss by "
        "the ratio of its probabilities in training and sampling, at most importance_cap (truncate), or by 0 if the "
        "ratio is outside [1/importance_cap, importance_cap] (mask).",
    )
    importance_cap: float = Field(2.0, gt=1, description="Bound of the ratio of importance_sampling.")
    cuda_graphs: bool = Field(
        False,
        description="For backend static: decode with CUDA graphs, so that a GPU does not wait for Python. Not yet run "
        "on a GPU: compare times with and without it.",
    )
    rows_at_once: int = Field(64, gt=0, description="Rows that one rank decodes at once; independent of micro_batch.")
    max_response_tokens: int = Field(gt=0, description="Token limit of a response.")
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Token ids that end a response like the tokenizer's EOS, such as a chat model's end of turn."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, also used for log-probabilities.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling; below 1 the sampling and scoring distributions differ, which biases the KL.",
    )
    top_k: int = Field(
        0, ge=0, description="Sample from the k likeliest tokens, with the same bias as top_p; 0 disables."
    )
    gather_weights: Literal["auto", "never"] = Field(
        "auto",
        description="ZeRO-3: gather the actor once per rollout if it fits (auto), or each layer at every token "
        "(never).",
    )

    @field_validator("importance_sampling", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @property
    def weighs_tokens(self) -> bool:
        """Whether importance sampling weighs the policy loss."""
        return self.backend == "vllm" and self.importance_sampling != "off"


class PPOSettings(Settings):
    """The algorithm (Schulman et al. 2017) and the reward's shape."""

    epochs: int = Field(1, gt=0, description="Number of passes over the experience of one iteration.")
    minibatch: int = Field(gt=0, description="Rows per optimizer step, over all ranks.")
    micro_batch: int | None = Field(None, gt=0, description="Rows per forward and backward on one rank.")
    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens (prompts and responses) per forward and backward on one rank, in place of micro_batch.",
    )
    advantage: Literal["gae", "rloo", "grpo"] = Field(
        "gae", description="Advantages from the critic (gae), or from the other responses to a prompt (rloo, grpo)."
    )
    clip: float = Field(0.2, gt=0, lt=1, description="Clip the probability ratio to 1 +- this.")
    clip_high: float | None = Field(None, gt=0, description="Upper clip of the ratio (DAPO); null uses `clip`.")
    dual_clip: float | None = Field(
        None, gt=1, description="Dual clip: bound the loss of a negative advantage to c*|A|; 3 is usual, null disables."
    )
    value_loss: Literal["clipped", "huber"] = Field(
        "clipped", description="Squared error with clipping, or Huber's loss."
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="Clip the change of a value per rollout to this; null disables."
    )
    huber_delta: float = Field(1.0, gt=0, description="Error above which Huber's loss is linear.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus, in nats per token.")
    target_kl: float | None = Field(
        None, gt=0, description="Skip the remaining epochs once policy/approx_kl of one exceeds this; null runs all."
    )
    whiten: bool = Field(
        True, description="Scale gae's advantages to mean 0 and variance 1 over the tokens of an iteration."
    )
    bootstrap: bool = Field(
        False,
        description="After a response cut off at the token limit, count the value of its last state instead of 0.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty.")
    kl_kind: Literal["k1", "k2", "k3"] = Field("k1", description="Estimator of the KL penalty.")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="Where the KL penalty goes: into the rewards, or into the loss with its own gradient."
    )
    adaptive_kl_target: float | None = Field(
        None, gt=0, description="Target KL in nats per response for an adaptive kl_coef; null keeps it fixed."
    )
    adaptive_kl_horizon: float = Field(
        10_000.0, gt=0, description="Number of responses over which an adaptive kl_coef reacts; smaller is faster."
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="Subtracted from the score of a response without EOS.")
    scale_reward: bool = Field(False, description="Divide scores by the standard deviation of all scores so far.")
    reward_clip: float | None = Field(
        5.0, gt=0, description="Clip the penalised and scaled score to +- this; null disables."
    )


class PPOConfig(RunSettings):
    """PPO with four engines."""

    kind: ClassVar[Kind] = "prompt"
    step: ClassVar[int] = 3
    actor: TrainedModel
    critic: CriticModel | None = Field(None, description="The critic, required by ppo.advantage gae; else null.")
    value_head: ValueHead | None = Field(None, description="A value head on the actor's trunk in place of a critic.")
    reference: FrozenModel | None = Field(
        None, description="The reference model; null with actor.lora uses the actor without its adapters."
    )
    reward: RewardModel
    ema: EMASettings | None = Field(None, description="A moving average of the actor's weights; null keeps none.")
    pretraining: PretrainingMix | None = Field(
        None, description="Pretraining text in the actor's steps; null adds none."
    )
    max_prompt_tokens: int = Field(256, gt=0, description="Token limit of a prompt; see `data.too_long`.")
    iterations: int = Field(gt=0, description="Number of iterations: a rollout and its updates.")
    rollout: RolloutSettings
    ppo: PPOSettings
    grader: str | None = Field(
        None,
        description="package.module:function, (prompts, responses) -> scores, that grades held-out responses; only "
        "reported.",
    )
    logged_samples: int = Field(
        8, ge=0, description="Responses written to samples.jsonl: of each evaluation, and of an iteration's rollout."
    )
    samples_every: int = Field(
        10, ge=0, description="Iterations between rollouts of which samples are written; 0 writes held-out ones only."
    )

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
        if (self.ppo.micro_batch is None) is (self.ppo.micro_batch_tokens is None):
            raise ValueError("give one of `ppo.micro_batch` and `ppo.micro_batch_tokens`, and not both")
        self._check_advantage()
        self._check_on_critic()
        self._check_unused()
        self._check_vllm()
        return self

    def _check_vllm(self) -> None:
        rollout, lora = self.rollout, self.actor.lora
        if rollout.backend != "vllm":
            return
        if lora is not None and lora.quantize is not None:
            raise ValueError(
                "rollout.backend vllm takes whole weights; remove `actor.lora.quantize` or use another backend"
            )
        if (rollout.top_p < 1 or rollout.top_k) and rollout.temperature != 1:
            raise ValueError(
                "rollout.backend vllm gives no log-probabilities at a temperature before top_p or top_k; set "
                "rollout.temperature to 1, remove `rollout.top_p` and `rollout.top_k`, or use another backend"
            )

    def _check_unused(self) -> None:
        """Refuse a setting that would have no effect."""
        of_vllm = {"tensor_parallel", "importance_sampling", "importance_cap"}
        idle = {"gather_weights"} if self.rollout.backend == "vllm" else of_vllm
        idle |= {"cuda_graphs"} if self.rollout.backend in ("padded", "vllm") else set()
        idle |= {"importance_cap"} if self.rollout.importance_sampling == "off" else set()
        for key in sorted(idle & self.rollout.model_fields_set):
            raise ValueError(f"key `rollout.{key}` has no effect with these settings; remove it")
        without_critic = {"whiten", "bootstrap", "gamma", "lam", "value_loss", "value_clip", "huber_delta"}
        unused = without_critic if self.critic is None and self.value_head is None else set()
        unused |= {"value_clip"} if self.ppo.value_loss == "huber" else {"huber_delta"}
        unused |= set() if self.ppo.adaptive_kl_target is not None else {"adaptive_kl_horizon"}
        for key in sorted(unused & self.ppo.model_fields_set):
            raise ValueError(f"key `ppo.{key}` has no effect with these settings; remove it")
        if self.reward.trust_remote_code and not self.reward.own_tokenizer:
            raise ValueError("key `reward.trust_remote_code` is for `reward.own_tokenizer`; use `trust_remote_code`")
        if self.ppo.adaptive_kl_target is not None and self.ppo.kl_coef == 0:
            raise ValueError(
                "key `ppo.adaptive_kl_target` steers kl_coef by factors, and 0 stays 0; give ppo.kl_coef a value"
            )
        if self.reward.model is None:
            of_model = {"weight", "score", "deepspeed", "share_critic_trunk", "own_tokenizer", "trust_remote_code"}
            for key in sorted(of_model & self.reward.model_fields_set):
                raise ValueError(f"key `reward.{key}` is of the reward model, and there is none; remove it")

    def _check_on_critic(self) -> None:
        if not self.reward.share_critic_trunk:
            return
        if self.critic is None or self.critic.lora is None:
            raise ValueError(
                "reward.share_critic_trunk shares the critic's frozen trunk; train the critic by `critic.lora`"
            )
        if self.critic.model not in (None, self.reward.model):
            raise ValueError("reward.share_critic_trunk: `critic.model` is another than `reward.model`; remove it")
        if self.reward.own_tokenizer:
            raise ValueError(
                "reward.share_critic_trunk: the critic reads the actor's tokens; remove `reward.own_tokenizer`"
            )
        if "deepspeed" in self.reward.model_fields_set:
            raise ValueError("key `reward.deepspeed` has no effect with reward.share_critic_trunk; remove it")

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
        """Whether code in the folder of an engine's model may run. A reward model of other tokens is trusted by a key
        of its own: it comes from elsewhere.
        """
        own = name == "reward" and self.reward.own_tokenizer
        return self.reward.trust_remote_code if own else self.trust_remote_code

    def engine_specs(self) -> list[EngineSpec]:
        """Actor and critic learn, reference and reward model are frozen; what the settings leave out is not there."""
        specs = [self._trained_spec("actor", self.actor, self.actor_path, "actor.model", "policy")]
        if self.critic is not None:
            assert self.critic_path is not None
            holds: Holds = "new_reward_model" if self.critic_path == self.actor_path else "reward_model"
            specs.append(self._trained_spec("critic", self.critic, self.critic_path, self._critic_key, holds))
        if self.reference is not None:
            lora = self.actor.lora
            quantize = lora.quantize if lora is not None else None
            key = "reference.model" if self.reference.model else "actor.model"
            specs.append(self._spec("reference", self.reference, self.reference_path, key, "policy", quantize=quantize))
        if self.reward.model is not None and not self.reward.share_critic_trunk:
            more = {"own_tokenizer": self.reward.own_tokenizer}
            specs.append(self._spec("reward", self.reward, self.reward.model, "reward.model", "reward_model", **more))
        return specs

    def _trained_spec(self, name: str, model: TrainedModel, path: str, path_key: str, holds: Holds) -> EngineSpec:
        is_actor = name == "actor"
        return self._spec(
            name,
            model,
            path,
            path_key,
            holds,
            optimizer=model.optimizer,
            gradient_checkpointing=model.gradient_checkpointing,
            lora=model.lora,
            quantize=model.lora.quantize if model.lora is not None else None,
            value_head=is_actor and self.value_head is not None,
            entropy=is_actor and self.ppo.entropy_coef > 0,
            averaged=is_actor and self.ema is not None,
        )

    def _spec(
        self, name: str, model: TrainedModel | FrozenModel, path: str, path_key: str, holds: Holds, **more: Any
    ) -> EngineSpec:
        return EngineSpec(
            name=name,
            prefix=f"{name}.",
            path=path,
            path_key=path_key,
            holds=holds,
            deepspeed=model.deepspeed,
            tokens=self.max_tokens,
            rows=self.micro_rows,
            scored=self.rollout.max_response_tokens,
            trust_remote_code=self.trusts(name),
            **more,
        )

    def rollout_spec(self) -> RolloutSpec:
        rollout = self.rollout
        return RolloutSpec(self.responses, rollout.rows_at_once, self.max_tokens, rollout.gather_weights)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch, if all are as long as can be."""
        if self.ppo.micro_batch is not None:
            return self.ppo.micro_batch
        assert self.ppo.micro_batch_tokens is not None
        return max(1, self.ppo.micro_batch_tokens // self.max_tokens)

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
        same_tokens = None if self.reward.own_tokenizer else self.reward.model
        return self.critic.model or same_tokens or self.actor_path

    @property
    def _critic_key(self) -> str:
        """The key that names `critic_path`."""
        if self.critic is not None and self.critic.model:
            return "critic.model"
        return "actor.model" if self.reward.own_tokenizer or not self.reward.model else "reward.model"

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
    def labels(self) -> tuple[str, ...]:
        return self.reward.labels

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
        """Optimizer steps of the iterations in which the actor is not trained."""
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
        # By tokens a micro-batch may be one row, and no number of rows is asked to divide.
        return BatchPlan.make(self.ppo.minibatch, self.ppo.micro_batch or 1, world_size, keys)

    def pretraining_plan(self, world_size: int) -> BatchPlan:
        """Batches of the pretraining mix. Raises UserError when blocks don't divide over ranks."""
        assert self.pretraining is not None
        keys = f"{self.file}: pretraining.blocks, ppo.micro_batch"
        return BatchPlan.make(self.pretraining.blocks, self.ppo.micro_batch or 1, world_size, keys)
