"""The models of step 3: checked, loaded one after the other, each in a DeepSpeed engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from step3_ppo.config import PPOConfig
from tristage import dist
from tristage.config import EngineSpec, require_folder_or_hub_id
from tristage.data.template import read_template
from tristage.dist import progress
from tristage.engine import frozen_engine, train_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.loading import empty_causal_lm, is_reward_model
from tristage.models.reward_model import load_reward_model
from tristage.models.rows import unknown_attention
from tristage.models.tokenizer import SAME_TOKENIZER, load_tokenizer, require_same_tokenizer
from tristage.rollout import check_vllm
from tristage.training import setup


class Engines(NamedTuple):
    """The DeepSpeed engines of step 3."""

    actor: Any
    critic: Any  # None where advantages come from groups of responses
    reference: Any  # None where it is the actor without its adapters
    reward: Any  # None if functions are the only reward, or the critic without adapters is it
    reward_tokenizer: Any = None  # the reward model's own tokenizer, if it differs

    def present(self) -> list[Any]:
        engines = (self.actor, self.critic, self.reference, self.reward)
        return [engine for engine in engines if engine is not None]

    def trained(self) -> dict[str, Any]:
        """Name -> engine of those that learn; checkpoints hold them."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})


def check_models(settings: PPOConfig) -> Any:
    """The actor's tokenizer, after making sure that all folders are there, agree and hold what they should."""
    specs = settings.engine_specs()
    for spec in specs:
        require_folder_or_hub_id(spec.path, settings, spec.path_key)
    own = {spec.name: load_tokenizer(spec.path, None, spec.trust_remote_code) for spec in specs}
    tokenizers = {f"{spec.path_key} ({spec.path})": own[spec.name] for spec in specs if not spec.own_tokenizer}
    fix = f"{SAME_TOKENIZER}, or set `reward.own_tokenizer: true`"
    fixes = {f"reward.model ({settings.reward.model})": fix}
    if (template := read_template(settings)) is not None:
        label = f"data.template ({settings.data.template})"
        tokenizers[label] = load_tokenizer(settings.actor_path, template, settings.trust_remote_code)
        fixes[label] = "leave `data.template` out, or train step 1 with it"
    require_same_tokenizer(tokenizers, fixes)
    for spec in specs:
        setup.check_spec(settings, spec, own[spec.name])
    tokenizer = next(iter(tokenizers.values()))
    _check_stop_ids(settings, len(tokenizer))
    _check_backend(settings)
    return tokenizer


def _check_backend(settings: PPOConfig) -> None:
    if settings.rollout.backend == "vllm":
        rollout = settings.rollout
        check_vllm(settings.actor_path, settings.trust_remote_code, rollout.tensor_parallel, str(settings.file))
    if settings.rollout.cuda_graphs and not dist.uses_gpu(settings.device):
        raise UserError(f"{settings.file}: key `rollout.cuda_graphs` needs a GPU; remove it")
    if settings.rollout.backend != "static":
        return
    model = empty_causal_lm(settings.actor_path, settings.trust_remote_code)
    if (why := unknown_attention(model, settings.max_tokens)) is not None:
        raise UserError(
            f"{settings.file}: key `rollout.backend`: static does not know a {model.config.model_type} model "
            f"({settings.actor_path}): {why}; set it to padded"
        )


def _check_stop_ids(settings: PPOConfig, vocabulary: int) -> None:
    for id in settings.rollout.stop_token_ids or ():
        if id >= vocabulary:
            raise UserError(
                f"{settings.file}: key `rollout.stop_token_ids`: {id} is outside the vocabulary of actor.model "
                f"({settings.actor_path}); give ids below {vocabulary}"
            )


def build_engines(
    settings: PPOConfig, configs: dict[str, dict[str, Any]], tokenizer: Any, train: bool = True
) -> Engines:
    """Load the models of `configs`, one after the other, and hand each to its engine; with train=False all are frozen.
    """
    engines: dict[str, Any] = dict.fromkeys(("actor", "critic", "reference", "reward"))
    reward_tokenizer = None
    for spec in settings.engine_specs():
        own = tokenizer
        if spec.own_tokenizer:
            own = reward_tokenizer = load_tokenizer(spec.path, None, spec.trust_remote_code)
        if spec.name in configs:
            with progress.telling(f"loading the {spec.name}, {spec.path}"):
                engines[spec.name] = _build(settings, spec, configs[spec.name], own, train)
    return Engines(**engines, reward_tokenizer=reward_tokenizer)


def _build(settings: PPOConfig, spec: EngineSpec, config: dict[str, Any], tokenizer: Any, train: bool) -> Any:
    options = setup.loading(settings, spec.quantize if train else None) | {"max_tokens": spec.positions}
    options |= {"trust_remote_code": spec.trust_remote_code, "engine_config": config}
    if spec.holds == "policy":
        load: Callable[..., Any] = load_causal_lm
        options |= {"value_head": spec.value_head and train}  # exported without it
    else:
        load = load_reward_model
        options |= _critic_head(settings, spec) if spec.name == "critic" else {}
    if spec.optimizer is None or not train:
        return frozen_engine(load(spec.path, tokenizer, **options), config)
    options |= {"gradient_checkpointing": spec.gradient_checkpointing, "lora": spec.lora, "lora_seed": settings.seed}
    steps = settings.total_steps - (settings.warmup_steps if spec.name == "actor" else 0)
    return train_engine(load(spec.path, tokenizer, **options), config, spec.optimizer, steps)


def _critic_head(settings: PPOConfig, spec: EngineSpec) -> dict[str, Any]:
    """Without a reward model to start from, the critic is the actor's network with a head of its own."""
    options: dict[str, Any] = {"keep_start": True} if settings.reward.share_critic_trunk else {}
    if is_reward_model(spec.path, spec.trust_remote_code):
        return options
    dist.print0(f"critic: {spec.path} has no scalar head, a new one is drawn")
    return options | {"new_head_seed": settings.seed}
