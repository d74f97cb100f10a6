"""From a step's settings to engine configs, tokenizer, model and loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tristage import dist
from tristage.config import (
    BatchPlan,
    LoraSettings,
    RunSettings,
    TrainSettings,
    read_deepspeed_json,
    require_folder_or_hub_id,
    world_size_from_environment,
)
from tristage.data.loader import Loader
from tristage.data.template import read_template
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
    config = trained_config(settings, settings.deepspeed, "deepspeed", plan, settings.optimizer.clip_norm)
    require_folder_or_hub_id(settings.model, settings, "model")
    trust: Any = {"trust_remote_code": settings.trust_remote_code}
    holds: Any = "policy" if "model" in settings.policies else "new_reward_model"
    model = check_model(settings.model, settings.max_tokens, holds, **trust)
    check_kernels(settings, settings.model, model, **trust)
    tokenizer = load_tokenizer(settings.model, read_template(settings), **trust)
    check_vocabulary(model, tokenizer)
    check_lora(settings.lora, settings.model, f"{settings.file}: key `lora.targets`", **trust)
    check_quantized(settings.lora, settings.device, f"{settings.file}: key `lora.quantize`")
    return plan, config, tokenizer


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


def loading(settings: RunSettings, lora: LoraSettings | None = None) -> dict[str, Any]:
    """Keyword arguments for loading the models of a run; `lora` is the policy's: its reference is quantised alike."""
    quantize = lora.quantize if lora is not None else None
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
    return load(
        settings.model,
        tokenizer,
        engine_config=config,
        gradient_checkpointing=settings.gradient_checkpointing,
        lora=settings.lora,
        lora_seed=settings.seed,
        max_tokens=settings.max_tokens,
        **loading(settings, settings.lora),
        **options,
    )


def train_loader(settings: TrainSettings, lengths: Sequence[int] | np.ndarray, plan: BatchPlan) -> Loader:
    """This rank's batches of step 1 or 2, of rows of these `lengths` in tokens; prints which limit ends the run."""
    loader = Loader(
        lengths, plan, dist.rank(), settings.seed, settings.epochs, settings.max_steps, settings.group_by_length
    )
    dist.print0(loader.which_limit())
    return loader
