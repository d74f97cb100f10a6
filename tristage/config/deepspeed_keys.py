"""Keys of a DeepSpeed JSON that this project refuses, and what to use instead. Read in the source of DeepSpeed 0.19.8.

They silently change the gradient, do nothing here, or end in a traceback once the models are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tristage.errors import UserError

_OWN_CHECKPOINTS = "checkpoints are written by tristage; remove it and use the YAML's save_every, keep_last and resume"
_NO_MODEL_PARALLELISM = "there is no tensor, sequence or expert parallelism; remove it and use ZeRO stage 3"
_REMOVED = "DeepSpeed has removed it; remove it"

# Key (dots reach into groups) -> (values that mean "off", next to those of _is_off; why not, and what to use instead).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # They change the gradient: losses are sums over a count of all ranks, and DeepSpeed's mean over ranks is undone.
    "gradient_allreduce_op": (("mean",), "gradients would be too large by the number of ranks; remove it or use mean"),
    "gradient_predivide_factor": ((1, 1.0), "at some ZeRO stages gradients would be scaled; remove it"),
    "prescale_gradients": ((), "ZeRO with reduce_scatter stops at it; remove it"),
    "zero_optimization.offload_optimizer.super_offload": (
        (),
        "without DeepSpeed's own gradient accumulation no gradient reaches its optimizer; remove it",
    ),
    "zero_optimization.zenflow": ((), "it needs DeepSpeed's own gradient accumulation; remove it"),
    # They change what the YAML sets.
    "torch_autocast": ((), "the YAML's `precision` sets the data type; remove it"),
    "data_types.param_dtype": ((), "the YAML's `precision` sets the data type; remove it"),
    "weight_quantization": ((), "remove it and use the YAML's `lora.quantize`"),
    "autotuning": ((), "it would end the run after some steps; remove it and use `tristage plan`"),
    "data_efficiency": ((), "the YAML's `data` sets which rows are read; remove it"),
    "activation_checkpointing": ((), "it does nothing here; remove it and use the YAML's `gradient_checkpointing`"),
    "checkpoint": ((), _OWN_CHECKPOINTS),
    # They need another engine than the ones that train here.
    "hybrid_engine": (
        (),
        "rollouts use the actor's own weights; remove it and see the YAML's `rollout.gather_weights`",
    ),
    "compile": ((), "models are not compiled; remove it"),
    "tensor_parallel": ((), _NO_MODEL_PARALLELISM),
    "expert_parallel": ((), _NO_MODEL_PARALLELISM),
    "sequence_parallel_size": ((), _NO_MODEL_PARALLELISM),
    "data_parallel_size": ((), _NO_MODEL_PARALLELISM),
    "pipeline": ((), "there is no pipeline parallelism; remove it and use ZeRO stage 3"),
    # Old names: DeepSpeed still reads the first three, but the checks of offload_* do not see them.
    "zero_optimization.cpu_offload": ((), 'write "offload_optimizer": {"device": "cpu"} instead'),
    "zero_optimization.cpu_offload_param": ((), 'write "offload_param": {"device": "cpu"} instead'),
    "zero_optimization.cpu_offload_use_pin_memory": ((), "write `pin_memory` in offload_optimizer or offload_param"),
}
# DeepSpeed stops at these whatever their value.
REMOVED = (
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
    "zero_optimization.zeropp_loco_param",
)


def check_keys(file: Path, values: dict[str, Any]) -> None:
    """Raises UserError for the first key of a DeepSpeed JSON that the tables refuse and that is not off."""
    for key in REMOVED:
        if _value_at(values, key) is not _MISSING:
            raise UserError(f"{file}: `{key}`: {_REMOVED}")
    for key, (off, instead) in REFUSED.items():
        value = _value_at(values, key)
        if not (_is_off(value) or value in off):
            raise UserError(f"{file}: `{key}`: {instead}")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage != 2 and _value_at(values, "zero_optimization.overlap_comm") is True:
        raise UserError(f"{file}: `zero_optimization.overlap_comm` works at stage 2 only; remove it at stage {stage}")
    if _value_at(values, "zero_optimization.compute_grad_norm") is False:
        raise UserError(f"{file}: `zero_optimization.compute_grad_norm`: every gradient norm is taken; remove it")
    if stage < 2 and not _is_off(_value_at(values, "data_types.grad_accum_dtype")):
        raise UserError(f"{file}: `data_types.grad_accum_dtype` works at stages 2 and 3 only; remove it")


_MISSING = object()


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return _MISSING
        values = values[part]
    return values


def _is_off(value: Any) -> bool:
    """Not there, null, false, {}, or a group with "enabled": false."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value is _MISSING or value is None or value is False
