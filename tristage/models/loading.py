"""What loading a policy and a reward model have in common: config, dtype, ZeRO-3, dropout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from tristage.algo import masking
from tristage.config import NOT_A_POLICY, SCORER, Holds
from tristage.data import hub
from tristage.errors import UserError
from tristage.models.kernels import Kernels
from tristage.models.opening import cannot_open, check_vocabulary, check_weights

ALIGNMENT = 64  # bytes, as torch allocates
MASK_WITHOUT_POSITIONS = ("opt", "falcon")  # as of transformers 5.23; step 1 checks any family when it starts


def load_config_without_dropout(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config with every dropout 0, so that a forward pass in training equals that of evaluation."""
    hub.prepare(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "model config", error) from None
    for name, value in list(config.to_dict().items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def from_pretrained(
    auto_class: Any,
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    engine_config: dict[str, Any] | None,
    kernels: Kernels,
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """`auto_class.from_pretrained`; under ZeRO-3 no rank holds all parameters (rank 0 maps the files).

    Quantised parameters are the exception: each rank packs them all, and the engine partitions them.
    """
    options = kernels.loading_options(dtype)
    stage = (engine_config or {}).get("zero_optimization", {}).get("stage", 0)
    # transformers partitions while it loads for as long as this object is alive.
    zero3 = HfDeepSpeedConfig(engine_config) if stage == 3 and kernels.quantize is None else None
    try:
        model = auto_class.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise cannot_open(path, "model", error) from None
    finally:
        del zero3
    kernels.finish(model)
    align_weights(model)
    return model


def align_weights(model: nn.Module) -> None:
    """Copy weights that a file maps into memory at addresses that are not multiples of ALIGNMENT.

    On some processors a product of one row rounds differently there: the length of a file's header would decide the
    last bit, and a weight in ZeRO's flat partition would differ from the same weight at ZeRO 0.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point() and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def align_special_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Model and tokenizer name the same terminator and pad in the folders that we write."""
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Embeddings never learn the pad id, and transformers finds a row's last token by `id != pad`: EOS would
        # be skipped in both. Without a pad id it scores single rows correctly and refuses padded batches.
        config.pad_token_id = None
    check_vocabulary(config, tokenizer)


def backbone_inputs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of a forward pass: positions counted from the first real token of each row, or `position_ids` [B,T].

    Packed rows come with positions and no mask: transformers then keeps attention between places where they start
    again at 0 (`find_packed_sequence_indices`; padding at the end is a sequence of its own). A few families take
    positions but build their mask without them: they get the complete mask.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        mask = None
        config: Any = model.config
        if config.model_type in MASK_WITHOUT_POSITIONS:
            mask = packed_mask(position_ids, next(model.parameters()).dtype)
        return inputs | {"attention_mask": mask, "position_ids": position_ids}
    if takes_positions(model):
        inputs["position_ids"] = masking.position_ids(attention_mask)
    return inputs | {"attention_mask": attention_mask.long()}


def packed_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """position_ids [B,T] -> [B,1,T,T], 0 where a token may attend: itself and the tokens before it in its example."""
    example = (position_ids == 0).cumsum(dim=1)  # [B,T] the number of the example that a token is in
    may_look = (example.unsqueeze(2) == example.unsqueeze(1)).tril().unsqueeze(1)
    return torch.zeros(may_look.shape, dtype=dtype, device=may_look.device).masked_fill(
        ~may_look, torch.finfo(dtype).min
    )


def takes_positions(model: nn.Module) -> bool:
    """Families with ALiBi (BLOOM) have no position_ids: their rows can be padded but not packed."""
    return "position_ids" in _parameters(type(model).forward)


@functools.cache  # every forward asks
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def empty_causal_lm(path: str, trust_remote_code: bool = False) -> Any:
    """The model of a folder without its weights, to look at."""
    config = load_config_without_dropout(path, trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_packable(
    path: str, attention: str = "auto", micro_batch: int = 1, trust_remote_code: bool = False
) -> None:
    """Raises UserError for a family whose rows can't be packed, since it has no position_ids, or not by `attention`."""
    model = empty_causal_lm(path, trust_remote_code)
    config = model.config
    if not takes_positions(model.base_model):
        raise UserError(
            f"{path}: a {config.model_type} model takes no position_ids, so packed rows would see each other; "
            "set `packing: false`"
        )
    if attention in ("flash_attention_2", "flex_attention") and config.model_type in MASK_WITHOUT_POSITIONS:
        raise UserError(
            f"{path}: packed rows of a {config.model_type} model are kept apart by a mask, which {attention} "
            "does not take; set `attention: sdpa` or `packing: false`"
        )
    if attention == "flash_attention_2" and micro_batch > 1:
        # transformers finds where packed rows begin in a batch of one sequence, and only there.
        raise UserError(
            f"{path}: with flash_attention_2 packed rows are kept apart in micro-batches of one sequence only; "
            "set `micro_batch: 1`, which `max_tokens` may make up for"
        )


def check_model(path: str, max_tokens: int, holds: Holds, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config, once it and the weights' names and shapes fit: before any weights are read.

    Raises:
        UserError: no config, fewer positions than `max_tokens`, another kind of model than `holds`, weights that are
            not all there, or that cannot be read.
    """
    config = load_config_without_dropout(path, trust_remote_code)
    positions, scores = max_positions(config), has_scalar_head(config)
    if positions is not None and max_tokens > positions:
        raise UserError(f"{path}: the model has {positions} positions, rows up to {max_tokens}; lower the limits")
    if holds == "reward_model" and not scores:
        raise UserError(f"{path}: holds no reward model but a {config.architectures}; give step 2's final folder")
    if holds == "policy" and scores:
        raise UserError(NOT_A_POLICY.format(path))
    if holds != "policy":
        config.num_labels = 1
    check_weights(path, config, holds != "policy", holds != "policy" and not scores, trust_remote_code)
    return config


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest row that the model can read; None where its family sets no limit."""
    return getattr(config, "max_position_embeddings", None)


def is_reward_model(path: str, trust_remote_code: bool = False) -> bool:
    """Whether a model folder holds a trained scalar head, by its config."""
    return has_scalar_head(load_config_without_dropout(path, trust_remote_code))


def has_scalar_head(config: PretrainedConfig) -> bool:
    """Whether the folder of this config holds a trained reward model or critic."""
    return any(name.endswith(SCORER) for name in config.architectures or [])
