"""Tokenizers, policies and reward models by Hugging Face folder or id.

A module is imported when a name of it is first used: who needs a tokenizer only (`tristage data`) then waits for none
of transformers' models, DeepSpeed and peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tristage.models.causal_lm import CausalLM, load_causal_lm
    from tristage.models.kernels import Kernels, check_kernels, check_quantized
    from tristage.models.loading import Holds, check_model, check_packable, is_reward_model, max_positions
    from tristage.models.lora import adapters_off, check_lora
    from tristage.models.opening import check_vocabulary
    from tristage.models.reward_model import RewardModel, last_token_scores, load_reward_model
    from tristage.models.saving import merge_adapter, save_model
    from tristage.models.scalar_head import register_scalar_head
    from tristage.models.sizes import ModelShape, model_shape
    from tristage.models.tokenizer import SAME_TOKENIZER, generation_stop_ids, load_tokenizer, require_same_tokenizer

_NAMES = {
    "causal_lm": ("CausalLM", "load_causal_lm"),
    "kernels": ("Kernels", "check_kernels", "check_quantized"),
    "loading": ("Holds", "check_model", "check_packable", "is_reward_model", "max_positions"),
    "lora": ("adapters_off", "check_lora"),
    "opening": ("check_vocabulary",),
    "reward_model": ("RewardModel", "last_token_scores", "load_reward_model"),
    "saving": ("merge_adapter", "save_model"),
    "scalar_head": ("register_scalar_head",),
    "sizes": ("ModelShape", "model_shape"),
    "tokenizer": ("SAME_TOKENIZER", "generation_stop_ids", "load_tokenizer", "require_same_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

__all__ = [
    "CausalLM",
    "Holds",
    "Kernels",
    "ModelShape",
    "RewardModel",
    "SAME_TOKENIZER",
    "adapters_off",
    "check_kernels",
    "check_lora",
    "check_model",
    "check_packable",
    "check_quantized",
    "check_vocabulary",
    "generation_stop_ids",
    "is_reward_model",
    "last_token_scores",
    "load_causal_lm",
    "load_reward_model",
    "load_tokenizer",
    "max_positions",
    "merge_adapter",
    "model_shape",
    "register_scalar_head",
    "require_same_tokenizer",
    "save_model",
]
