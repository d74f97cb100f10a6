"""From a step's settings to engine configs, tokenizer, model and loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from tristage import dist
from tristage.config import (
    BatchPlan,
    EngineSpec,
    RunSettings,
    TrainSettings,
    read_deepspeed_json,
    require_folder_or_hub_id,
    world_size_from_environment,
)
from tristage.data.loader import Loader
from tristage.data.template import read_template
from tristage.dist import progress
from tristage.engine import DTYPES, check_zero_support, engine_config, zero_stage
from tristage.errors import UserError
from tristage.models.kernels import Kernels, check_kernels, check_quantized
from tristage.models.loading import check_model
from tristage.models.lora import check_lora
from tristage.models.opening import check_vocabulary
from tristage.models.tokenizer import load_tokenizer


def check_training(settings: TrainSettings) -> tuple[BatchPlan, dict[str, Any], Any]:
    """(batch plan, engine config, tokenizer) of step 1 or 2, everything cheap checked before models load.

    Raises:
        UserError: no such device or folder, batches that don't divide, a JSON that sets what the YAML owns, a
            tokenizer without EOS.
    """
    dist.check_device(settings.device, settings.file)
    plan = settings.plan(world_size_from_environment())
    config = deepspeed_configs(settings, plan)["model"]
    spec = settings.engine_specs()[0]
    require_folder_or_hub_id(spec.path, settings, spec.path_key)
    tokenizer = load_tokenizer(spec.path, read_template(settings), spec.trust_remote_code)
    check_spec(settings, spec, tokenizer)
    return plan, config, tokenizer


def check_spec(settings: RunSettings, spec: EngineSpec, tokenizer: Any) -> None:
    """Check an engine's folder before its weights are read: what it holds, its tokenizer, kernels and adapters.

    Raises:
        UserError: what is wrong, with the key and the fix.
    """
    trust = spec.trust_remote_code
    model = check_model(spec.path, spec.positions, spec.holds, trust)
    check_vocabulary(model, tokenizer)
    check_kernels(settings, spec.path, model, trust)
    check_lora(spec.lora, spec.path, f"{settings.file}: key `{spec.key('lora.targets')}`", trust)
    check_quantized(spec.lora, settings.device, f"{settings.file}: key `{spec.key('lora.quantize')}`")


def deepspeed_configs(settings: RunSettings, plan: BatchPlan) -> dict[str, dict[str, Any]]:
    """The DeepSpeed config of each engine of the run, by its name.

    Raises:
        UserError: an unreadable JSON, one that this machine or a checkpoint cannot do, or a frozen engine at ZeRO 1
            or 2, which shard what it lacks.
    """
    configs, keys = {}, {}
    for spec in settings.engine_specs():
        key = spec.key("deepspeed")
        if spec.optimizer is None:
            configs[spec.name] = frozen_config(settings, spec.deepspeed, key, plan)
        else:
            configs[spec.name] = trained_config(settings, spec.deepspeed, key, plan, spec.optimizer.clip_norm)
        keys[key] = configs[spec.name]
    require_single_hpz_engine(settings, keys)
    return configs


def trained_config(
    settings: RunSettings, deepspeed_json: str, key: str, plan: BatchPlan, clip_norm: float = 0.0
) -> dict[str, Any]:
    """The DeepSpeed config of an engine that trains, from the JSON that `key` names.

    Raises:
        UserError: an unreadable JSON, or a setting that this machine or checkpoints do not support.
    """
    config = _config(settings, deepspeed_json, key, plan, clip_norm)
    for part in ("offload_optimizer", "offload_param"):
        if (config["zero_optimization"].get(part) or {}).get("device") == "nvme":
            raise UserError(
                f"{settings.file}: key `{key}`: {deepspeed_json}: zero_optimization.{part} to nvme is for frozen "
                "models only: checkpoints don't hold what is on disk; offload to cpu"
            )
    return config


def _config(
    settings: RunSettings, deepspeed_json: str, key: str, plan: BatchPlan, clip_norm: float = 0.0
) -> dict[str, Any]:
    config = engine_config(read_deepspeed_json(deepspeed_json, settings, key), settings.precision, plan, clip_norm)
    check_zero_support(config, dist.uses_gpu(settings.device), f"{settings.file}: key `{key}`: {deepspeed_json}")
    return config


def frozen_config(settings: RunSettings, deepspeed_json: str, key: str, plan: BatchPlan) -> dict[str, Any]:
    """The DeepSpeed config of a frozen model, from the JSON that `key` names.

    Raises:
        UserError: an unreadable JSON, or ZeRO 1 or 2, which shard what a frozen model does not have.
    """
    config = _config(settings, deepspeed_json, key, plan)
    if zero_stage(config) not in (0, 3):
        raise UserError(
            f"{settings.file}: key `{key}`: ZeRO stage {zero_stage(config)} shards gradients and "
            "optimizer, which a frozen model does not have; use stage 0 or 3"
        )
    return config


def loading(settings: RunSettings, quantize: Literal["nf4"] | None = None) -> dict[str, Any]:
    """Keyword arguments for loading a model of the run; `quantize` is that of its EngineSpec."""
    return {
        "dtype": DTYPES[settings.precision],
        "kernels": Kernels(settings.attention, settings.liger_kernel, quantize),
        "trust_remote_code": settings.trust_remote_code,
    }


def require_single_hpz_engine(settings: RunSettings, configs: dict[str, dict[str, Any]]) -> None:
    """Refuse ZeRO++'s secondary partition (hpz) in several engines: DeepSpeed allows one per process, by an assertion.

    Args:
        configs: DeepSpeed config of each engine, by the key that names its JSON.

    Raises:
        UserError: several engines have it.
    """
    size = "zero_hpz_partition_size"
    keys = [f"`{key}`" for key, config in configs.items() if config["zero_optimization"].get(size, 1) > 1]
    if len(keys) > 1:
        raise UserError(
            f"{settings.file}: keys {' and '.join(keys)} have zero_optimization.{size}, and only one "
            "engine of a run can; leave it out of the other JSON"
        )


def load_trained(
    load: Callable[..., Any], settings: TrainSettings, config: dict[str, Any], tokenizer: Any, **options: Any
) -> Any:
    """The model that step 1 or 2 trains: `load` is load_causal_lm or load_reward_model, with `options` of its own."""
    spec = settings.engine_specs()[0]
    with progress.telling(f"loading {spec.path}"):
        return load(
            spec.path,
            tokenizer,
            engine_config=config,
            gradient_checkpointing=spec.gradient_checkpointing,
            lora=spec.lora,
            lora_seed=settings.seed,
            max_tokens=spec.tokens,
            **loading(settings, spec.quantize),
            **options,
        )


def train_loader(settings: TrainSettings, lengths: Sequence[int] | np.ndarray, plan: BatchPlan) -> Loader:
    """This rank's batches of step 1 or 2, of rows of these `lengths` in tokens; prints which limit ends the run."""
    loader = Loader(
        lengths, plan, dist.rank(), settings.seed, settings.epochs, settings.max_steps, settings.group_by_length
    )
    dist.print0(loader.which_limit())
    return loader
