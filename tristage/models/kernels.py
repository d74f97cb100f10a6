"""Kernel choices: attention implementation, Liger kernels, 4-bit frozen weights.

None of them changes results beyond rounding, except `quantize`, which rounds the frozen weights themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from tristage import dist
from tristage.config import LoraSettings, RunSettings
from tristage.errors import UserError

LIGER = "liger_kernel.transformers.monkey_patch"  # imported where it is used: it needs a GPU's compiler


class Kernels(NamedTuple):
    """The settings `attention`, `liger_kernel` and `lora.quantize`, for the functions that load models."""

    attention: str = "auto"
    liger: bool = False
    quantize: str | None = None

    def loading_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of transformers' from_pretrained."""
        options: dict[str, Any] = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        if self.quantize is not None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantize,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=dtype,  # ZeRO-3 shares out parameters of one dtype
            )
            options["device_map"] = {"": dist.current_device()}  # bitsandbytes would use a GPU if there is one
        return options

    def finish(self, model: PreTrainedModel) -> None:
        """Apply what remains to be done to a loaded model."""
        if self.liger:
            apply_liger(model)
        for module in model.modules() if self.quantize is not None else ():
            # In evaluation mode bitsandbytes would round the scales of a CPU's weights to bf16, and they stay rounded.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False


PLAIN = Kernels()  # transformers' own kernels, unquantised weights


def check_kernels(
    settings: RunSettings, path: str, config: PretrainedConfig, trust_remote_code: bool = False
) -> None:
    """Check that this machine supports `attention` and `liger_kernel` for the model in `path`, before weights are read.

    Raises:
        UserError: names the setting and what to use instead.
    """
    if settings.attention != "auto":
        _check_attention(settings, path, config, trust_remote_code)
    if settings.liger_kernel:
        _check_liger(settings, path, config)


def _check_attention(settings: RunSettings, path: str, config: PretrainedConfig, trust_remote_code: bool) -> None:
    where, attention = f"{settings.file}: key `attention`", settings.attention
    if attention == "flex_attention" and not dist.uses_gpu(settings.device):
        raise UserError(f"{where}: flex_attention has no backward pass on CPUs; use auto, eager or sdpa")
    if attention == "flash_attention_2" and settings.precision == "float32":
        raise UserError(f"{where}: flash_attention_2 computes in half precision only; set `precision: bf16`")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (ImportError, ValueError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"{where}: {path} cannot have {attention} here ({reason}); use auto") from None


def _check_liger(settings: RunSettings, path: str, config: PretrainedConfig) -> None:
    where = f"{settings.file}: key `liger_kernel`"
    if not dist.uses_gpu(settings.device):
        raise UserError(f"{where}: Liger's kernels run on GPUs only; remove it")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{where}: the package liger-kernel is not installed; `pip install liger-kernel`, or remove it")
    if config.model_type not in importlib.import_module(LIGER).MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"{where}: Liger has no kernels for a {config.model_type} model ({path}); remove it")


def apply_liger(model: PreTrainedModel) -> None:
    """Put Liger's norms, rotary positions and MLPs into a loaded model of a family that check_kernels accepted.

    Its losses are not used: nothing here computes a model's own loss. Rotary positions are a function of transformers'
    module and change for the whole process.
    """
    importlib.import_module(LIGER)._apply_liger_kernel_to_instance(
        model, cross_entropy=False, fused_linear_cross_entropy=False
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its linear layers are bitsandbytes'."""
    return getattr(model, "is_quantized", False)


def check_quantized(lora: LoraSettings | None, device: str, key: str) -> None:
    """Check that bitsandbytes is installed if `lora.quantize` is set.

    Args:
        device: the run's setting.
        key: file and key of `lora.quantize`, for the message.

    Raises:
        UserError: it is not installed, or does not support this device.
    """
    if lora is None or lora.quantize is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: the package bitsandbytes is not installed; `pip install bitsandbytes`, or remove it")
    wanted = "cuda" if dist.uses_gpu(device) else "cpu"
    devices = getattr(importlib.import_module("bitsandbytes"), "supported_torch_devices", {"cuda"})
    if wanted not in devices:
        raise UserError(f"{key}: this version of bitsandbytes has no kernels for {wanted}; install 0.50, or remove it")
