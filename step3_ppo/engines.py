"""The models of step 3: checked, loaded one after the other, each in a DeepSpeed engine of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from step3_ppo.config import PPOConfig
from tristage import dist
from tristage.config import BatchPlan, LoraSettings, require_folder_or_hub_id
from tristage.data.template import read_template
from tristage.engine import frozen_engine, train_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.kernels import check_kernels, check_quantized
from tristage.models.loading import Holds, check_model, is_reward_model
from tristage.models.lora import check_lora
from tristage.models.opening import check_vocabulary
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import SAME_TOKENIZER, load_tokenizer, require_same_tokenizer
from tristage.training import setup


class Engines(NamedTuple):
    """The DeepSpeed engines of step 3."""

    actor: Any
    critic: Any  # None where advantages come from groups of responses
    reference: Any  # None where it is the actor without its adapters
    reward: Any  # None where functions alone are the reward, or the critic without its adapters is
    reward_tokenizer: Any = None  # no engine: what the reward model reads with, where that is not the actor's

    def present(self) -> list[Any]:
        engines = (self.actor, self.critic, self.reference, self.reward)
        return [engine for engine in engines if engine is not None]

    def trained(self) -> dict[str, Any]:
        """Name -> engine of those that learn; checkpoints hold them."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})


def engine_configs(settings: PPOConfig, plan: BatchPlan) -> dict[str, dict[str, Any]]:
    """The DeepSpeed config of each engine that the settings ask for, by name.

    Raises:
        UserError: an unreadable JSON, or a frozen engine at ZeRO 1 or 2, which shard what it lacks.
    """
    found = {}
    for name in _paths(settings):
        engine, key = getattr(settings, name), f"{name}.deepspeed"
        if name in ("reference", "reward"):
            found[name] = setup.frozen_config(settings, engine.deepspeed, key, plan)
        else:
            found[name] = setup.trained_config(settings, engine.deepspeed, key, plan, engine.optimizer.clip_norm)
    setup.require_single_hpz_engine(settings, {f"{name}.deepspeed": config for name, config in found.items()})
    return found


def _paths(settings: PPOConfig) -> dict[str, str]:
    """Engine -> model folder or id, of the engines that the settings ask for."""
    paths = {
        "actor": settings.actor_path,
        "critic": settings.critic_path,
        "reference": settings.reference_path if settings.reference is not None else None,
        "reward": None if settings.reward.share_critic_trunk else settings.reward.model,
    }
    return {name: path for name, path in paths.items() if path is not None}


def check_models(settings: PPOConfig) -> Any:
    """The actor's tokenizer, after making sure that all folders are there, agree and hold what they should."""
    paths = _paths(settings)
    # The critic last: its folder is the reward model's unless it has a key of its own.
    order: list[str] = [name for name in ("actor", "reference", "reward", "critic") if name in paths]
    for name in order:
        require_folder_or_hub_id(paths[name], settings, f"{name}.model")
    labels = {name: f"{name}.model ({paths[name]})" for name in order}
    own = {name: load_tokenizer(paths[name], trust_remote_code=settings.trusts(name)) for name in order}
    tokenizers = {labels[name]: own[name] for name in order}
    if settings.reward.own_tokenizer:
        del tokenizers[labels["reward"]]
    fixes = {labels["reward"]: f"{SAME_TOKENIZER}, or set `reward.own_tokenizer: true`"} if "reward" in labels else {}
    if (template := read_template(settings)) is not None:
        label = f"data.template ({settings.data.template})"
        tokenizers[label] = load_tokenizer(settings.actor_path, template, settings.trust_remote_code)
        fixes[label] = "leave `data.template` out, or train step 1 with it"
    require_same_tokenizer(tokenizers, fixes)
    for name, path in paths.items():
        trust = settings.trusts(name)
        model = check_model(path, _max_tokens(settings, name), _holds(settings, name, path), trust)
        check_vocabulary(model, own[name])
        check_kernels(settings, path, model, trust)
        if name in ("actor", "critic"):
            lora = getattr(settings, name).lora
            check_lora(lora, path, f"{settings.file}: key `{name}.lora.targets`", trust)
            check_quantized(lora, settings.device, f"{settings.file}: key `{name}.lora.quantize`")
    tokenizer = next(iter(tokenizers.values()))
    _check_stop_ids(settings, len(tokenizer))
    return tokenizer


def _check_stop_ids(settings: PPOConfig, vocabulary: int) -> None:
    for id in settings.rollout.stop_token_ids or ():
        if id >= vocabulary:
            raise UserError(
                f"{settings.file}: key `rollout.stop_token_ids`: {id} is outside the vocabulary of actor.model "
                f"({settings.actor_path}); give ids below {vocabulary}"
            )


def _holds(settings: PPOConfig, name: str, path: str) -> Holds:
    """What the folder of an engine's model must hold."""
    if name in ("actor", "reference"):
        return "policy"
    return "new_reward_model" if name == "critic" and path == settings.actor_path else "reward_model"


def _max_tokens(settings: PPOConfig, name: str) -> int:
    """Tokens of the rows that a model must be able to read. Those of other tokens are cut to what it can."""
    return 1 if name == "reward" and settings.reward.own_tokenizer else settings.max_tokens


def build_engines(
    settings: PPOConfig, configs: dict[str, dict[str, Any]], tokenizer: Any, train: bool = True
) -> Engines:
    """Load the models, one after the other, and hand each to its engine; with train=False all only answer."""
    trust = settings.trusts("reward")
    reward_tokenizer = (
        load_tokenizer(str(settings.reward.model), None, trust) if settings.reward.own_tokenizer else None
    )

    def build(name: str, load: Any, path: str, lora: LoraSettings | None = None, **options: Any) -> Any:
        """`lora` is that of the policy for the reference too, which is then quantised alike."""
        if name not in configs:
            return None
        spec, config = getattr(settings, name), configs[name]
        own = reward_tokenizer if name == "reward" and reward_tokenizer is not None else tokenizer
        options |= setup.loading(settings, lora if train else None) | {"max_tokens": _max_tokens(settings, name)}
        options["trust_remote_code"] = settings.trusts(name)
        if name in ("reference", "reward") or not train:
            return frozen_engine(load(path, own, engine_config=config, **options), config)
        model = load(
            path,
            own,
            engine_config=config,
            gradient_checkpointing=spec.gradient_checkpointing,
            lora=lora,
            lora_seed=settings.seed,
            **options,
        )
        steps = settings.total_steps - (settings.warmup_steps if name == "actor" else 0)
        return train_engine(model, config, spec.optimizer, steps)

    critic_path = settings.critic_path or ""
    critic_lora = settings.critic.lora if settings.critic is not None else None
    # Without a reward model to start from, the critic is the actor's network with a head of its own.
    trained_head = not critic_path or is_reward_model(critic_path, settings.trust_remote_code)
    new_head: dict[str, Any] = {} if trained_head else {"new_head_seed": settings.seed}
    if not trained_head:
        dist.print0(f"critic: {critic_path} has no scalar head, a new one is drawn")
    if settings.reward.share_critic_trunk:
        new_head["keep_start"] = True
    return Engines(
        # Trained with a head, and exported without it.
        actor=build(
            "actor",
            load_causal_lm,
            settings.actor_path,
            settings.actor.lora,
            value_head=train and settings.value_head is not None,
        ),
        critic=build("critic", load_reward_model, critic_path, critic_lora, **new_head),
        reference=build("reference", load_causal_lm, settings.reference_path, settings.actor.lora),
        reward=build("reward", load_reward_model, settings.reward.model or ""),
        reward_tokenizer=reward_tokenizer,
    )
