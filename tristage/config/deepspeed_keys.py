"""Every key that a DeepSpeed JSON can hold, and what becomes of it here. Read in the source of DeepSpeed 0.19.8.

A key works (tests/distributed/test_deepspeed_keys.py trains with each), or is the YAML's, or is refused: it would
change the gradient in silence, do nothing, or end in a traceback once the models are loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tristage.errors import UserError

ZERO = "zero_optimization"
EVERY_STAGE, SHARDED = (0, 1, 2, 3), (1, 2, 3)


@dataclass(frozen=True)
class Key:
    """One key, or one group with all that it holds."""

    verdict: Literal["works", "YAML", "refused"]
    says: str  # what it does; the YAML's key; or why it is refused, and what to do
    stages: tuple[int, ...] = EVERY_STAGE  # of ZeRO, where DeepSpeed reads it
    off: tuple[Any, ...] = (None, False)  # values that change nothing, accepted where the key is not
    not_run: str = ""  # why the tests do not train with it

    def is_off(self, value: Any) -> bool:
        """One of `off`, {}, or a group with "enabled": false."""
        if isinstance(value, dict):
            return not value or value.get("enabled") is False
        return value in self.off


def _works(says: str, stages: tuple[int, ...] = EVERY_STAGE, not_run: str = "") -> Key:
    return Key("works", says, stages, not_run=not_run)


def _yaml(key: str) -> Key:
    return Key("YAML", key)


def _refused(says: str, *off: Any) -> Key:
    return Key("refused", says, off=off or (None, False))


_OWN_CHECKPOINTS = "checkpoints are written by tristage; remove it and use the YAML's save_every, keep_last and resume"
_NO_MODEL_PARALLELISM = "there is no tensor, sequence or expert parallelism; remove it and use ZeRO stage 3"
_OWN_OPTIMIZER = "the optimizer is made by tristage; remove it and use the YAML's `optimizer`"
_OWN_TRACKERS = "metrics are written by tristage; remove it and use the YAML's `trackers`"
_NOTHING = "DeepSpeed reads it nowhere that a run comes by; remove it"
_REMOVED = "DeepSpeed has removed it; remove it"
_NEEDS_GPU, _NEEDS_AIO = "its kernels are for GPUs", "it needs an NVMe disk and libaio"

_TOP: dict[str, Key] = {
    "train_batch_size": _yaml("global_batch"),
    "train_micro_batch_size_per_gpu": _yaml("micro_batch"),
    "gradient_accumulation_steps": _yaml("global_batch and micro_batch"),
    "managed_gradient_accumulation": _yaml("global_batch and micro_batch"),
    "bf16": _yaml("precision"),
    "bfloat16": _yaml("precision"),
    "fp16": _yaml("precision"),
    "gradient_clipping": _yaml("optimizer.clip_norm"),
    "optimizer": _yaml("optimizer"),
    "scheduler": _yaml("optimizer.schedule"),
    "communication_data_type": _works("the data type in which gradients are sent"),
    "comms_logger": _works("logs collectives and their sizes"),
    "dump_state": _works("logs the engine's settings when it is made"),
    "flops_profiler": _works("counts the operations of one step and logs them"),
    "log_level": _works("how much DeepSpeed logs"),
    "memory_breakdown": _works("logs memory around each forward, backward and step"),
    "steps_per_print": _works("logs learning rate and throughput every so many steps"),
    "wall_clock_breakdown": _works("logs the time of each forward, backward and step"),
    "aio": _works("how NVMe is read and written", (3,), _NEEDS_AIO),
    "data_types.grad_accum_dtype": _works("the data type in which gradients are added up", (2, 3)),
    # They change the gradient: losses are sums over a count of all ranks, and DeepSpeed's mean over ranks is undone.
    "gradient_allreduce_op": _refused(
        "gradients would be too large by the number of ranks; remove it or use mean", None, "mean"
    ),
    "gradient_predivide_factor": _refused("at some ZeRO stages gradients would be scaled; remove it", None, 1),
    "prescale_gradients": _refused("ZeRO with reduce_scatter stops at it; remove it"),
    # They change what the YAML sets.
    "torch_autocast": _refused("the YAML's `precision` sets the data type; remove it"),
    "data_types.param_dtype": _refused("the YAML's `precision` sets the data type; remove it"),
    "data_types.buffer_dtype": _refused("buffers such as rotary frequencies keep their data type; remove it"),
    "data_types.keep_in_fp32_modules": _refused(
        "which buffers stay in float32 is up to the model; remove it", None, "auto"
    ),
    "weight_quantization": _refused("remove it and use the YAML's `lora.quantize`"),
    "zero_allow_untested_optimizer": _refused(_OWN_OPTIMIZER, None, True),
    "zero_force_ds_cpu_optimizer": _refused(_OWN_OPTIMIZER),
    "autotuning": _refused("it would end the run after some steps; remove it and use `tristage plan`"),
    "data_efficiency": _refused("the YAML's `data` sets which rows are read; remove it"),
    "dataloader_drop_last": _refused("the YAML's `data` sets which rows are read; remove it"),
    "activation_checkpointing": _refused("it does nothing here; remove it and use the YAML's `gradient_checkpointing`"),
    "checkpoint": _refused(_OWN_CHECKPOINTS),
    "datastates_ckpt": _refused(_OWN_CHECKPOINTS),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _refused(_OWN_TRACKERS)),
    "timers": _refused("tokens per second are in metrics.jsonl; remove it"),
    "disable_python_gc": _refused("nothing would collect Python's garbage in its place; remove it"),
    "disable_allgather": _refused(_NOTHING),
    "vocabulary_size": _refused(_NOTHING),
    # They need another engine than the ones that train here.
    "hybrid_engine": _refused(
        "rollouts use the actor's own weights; remove it and see the YAML's `rollout.gather_weights`"
    ),
    "compile": _refused("models are not compiled; remove it"),
    "pipeline": _refused("there is no pipeline parallelism; remove it and use ZeRO stage 3"),
    **dict.fromkeys(
        (
            *("tensor_parallel", "expert_parallel", "sequence_parallel_size", "data_parallel_size"),
            *("seq_parallel_communication_data_type", "use_data_before_expert_parallelism"),
        ),
        _refused(_NO_MODEL_PARALLELISM),
    ),
}

_ZERO: dict[str, Key] = {
    "stage": _works("what is sharded over ranks: 1 optimizer states, 2 gradients too, 3 weights too"),
    "contiguous_gradients": _works("copies gradients into one buffer as they arrive", SHARDED),
    "reduce_scatter": _works("sends each rank its share of the gradients alone; false here unless set", SHARDED),
    "reduce_bucket_size": _works("gradients sent at once, in numbers", SHARDED),
    "allgather_bucket_size": _works("weights gathered at once after a step, in numbers", (1, 2)),
    "overlap_comm": _works("sends gradients while the backward goes on", (2,)),
    "use_multi_rank_bucket_allreduce": _works("one reduction for the shares of several ranks", (1, 2)),
    "parameter_alignment": _works("each parameter starts at 16 bytes in its buffer", (1, 2)),
    "ignore_unused_parameters": _works("false: stops if a parameter got no gradient", (1, 2)),
    "sub_group_size": _works("numbers that the optimizer updates at once", (3,)),
    "stage3_prefetch_bucket_size": _works("weights fetched ahead, in numbers", (3,)),
    "stage3_param_persistence_threshold": _works("smaller parameters are not sharded", (3,)),
    "stage3_model_persistence_threshold": _works("numbers in all that are not sharded", (3,)),
    "stage3_max_live_parameters": _works("numbers that may be gathered at once", (3,)),
    "stage3_max_reuse_distance": _works("a parameter needed again so soon is not released", (3,)),
    "stage3_gather_16bit_weights_on_model_save": _works("needs not be set: final/ is gathered anyhow", (3,)),
    "stage3_use_all_reduce_for_fetch_params": _works("gathers by an all-reduce", (3,)),
    "stage3_allgather_sequential": _works("gathers one parameter at a time", (3,)),
    "leaf_module": _works("modules that are gathered whole, such as a mixture of experts", (3,)),
    "memory_efficient_linear": _works("true: a linear layer keeps no gathered weight for its backward", (3,)),
    "log_trace_cache_warnings": _works("warns when modules run in another order than before", (3,)),
    "enable_sanity_checks": _works("checks that ranks gather the same parameters", (3,)),
    "zero_hpz_partition_size": Key(
        "works", "ranks of a node that hold all weights among them (ZeRO++)", (3,), (None, 1)
    ),
    "zero_quantized_weights": _works("gathers weights in 8 bits (ZeRO++)", (3,), _NEEDS_GPU),
    "zero_quantized_nontrainable_weights": _works("gathers frozen weights in 8 bits (ZeRO++)", (3,), _NEEDS_GPU),
    "zero_quantized_gradients": _works("sends gradients in 4 bits (ZeRO++)", (3,), _NEEDS_GPU),
    "offload_optimizer.device": _works("cpu: optimizer states and step are the host's; nvme at stage 3", SHARDED),
    "offload_optimizer.pin_memory": _works("page-locked host memory", SHARDED),
    "offload_optimizer.ratio": _works("the share of the step that is the host's", (3,), "on a CPU both parts are"),
    "offload_optimizer.nvme_path": _works("folder for optimizer states", (3,), _NEEDS_AIO),
    "offload_optimizer.buffer_count": _works("buffers between NVMe and host", (3,), _NEEDS_AIO),
    "offload_optimizer.pipeline_read": _works("reads ahead from NVMe", (3,), _NEEDS_AIO),
    "offload_optimizer.pipeline_write": _works("writes behind to NVMe", (3,), _NEEDS_AIO),
    "offload_optimizer.fast_init": _works("writes the first states to NVMe at once", (3,), _NEEDS_AIO),
    "offload_param.device": _works("cpu or nvme: weights live there between uses", (3,)),
    "offload_param.pin_memory": _works("page-locked host memory", (3,)),
    "offload_param.nvme_path": _works("folder for weights", (3,), _NEEDS_AIO),
    "offload_param.buffer_count": _works("buffers between NVMe and host", (3,), _NEEDS_AIO),
    "offload_param.buffer_size": _works("numbers in a buffer", (3,), _NEEDS_AIO),
    "offload_param.max_in_cpu": _works("numbers kept on the host", (3,), _NEEDS_AIO),
    "offload_optimizer.super_offload": _refused(
        "without DeepSpeed's own gradient accumulation no gradient reaches its optimizer; remove it"
    ),
    "offload_optimizer.cpuadam_cores_perc": _refused("super_offload alone reads it; remove it"),
    "round_robin_gradients": _refused(
        "DeepSpeed's map from parameters to their float32 copies is wrong with it, and checkpoints would be; remove it"
    ),
    "stage3_module_granularity_threshold": _refused(
        "DeepSpeed's forward fails on weights that it has not gathered; remove it and use leaf_module", None, 0
    ),
    "zenflow": _refused("it needs DeepSpeed's own gradient accumulation; remove it"),
    "compute_grad_norm": _refused("every gradient norm is taken; remove it", None, True),
    "save_muon_momentum_buffer_in_memory": _refused("the optimizer is AdamW; remove it"),
    "override_module_apply": _refused("DeepSpeed keeps it for all engines at once; remove it", None, True),
    "allgather_partitions": _refused(_NOTHING, None, True, False),
    **dict.fromkeys(("elastic_checkpoint", "legacy_stage1", "pipeline_loading_checkpoint"), _refused(_OWN_CHECKPOINTS)),
    "load_from_fp32_weights": _refused(_OWN_CHECKPOINTS, None, True),
    # Old names: DeepSpeed still reads them, but the checks of the new ones do not see them.
    "cpu_offload": _refused('write "offload_optimizer": {"device": "cpu"} instead'),
    "cpu_offload_param": _refused('write "offload_param": {"device": "cpu"} instead'),
    "cpu_offload_use_pin_memory": _refused("write `pin_memory` in offload_optimizer or offload_param"),
    "stage3_gather_fp16_weights_on_model_save": _refused("write `stage3_gather_16bit_weights_on_model_save`"),
    # DeepSpeed stops at them whatever their value.
    **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _refused(_REMOVED)),
}
_GONE = (
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
)
KEYS: dict[str, Key] = _TOP | {f"{ZERO}.{name}": key for name, key in _ZERO.items()}
KEYS |= dict.fromkeys(_GONE, _refused(_REMOVED))
_GROUPS = {key.rpartition(".")[0] for key in KEYS} - {""}  # whose keys are in the table one by one


def check_keys(file: Path, values: dict[str, Any], yaml: str, unchecked: Sequence[str] = ()) -> None:
    """Raises UserError for the first key of a DeepSpeed JSON that would not do what it says.

    Args:
        yaml: the run's YAML, which owns some keys.
        unchecked: keys not in the table that are let through.
    """
    stage = values.get(ZERO, {}).get("stage", 0)
    for name, value in _flat(values):
        key = KEYS.get(name)
        if name in _GROUPS:
            raise UserError(f"{file}: `{name}` is {value!r}; write its keys in braces")
        if key is None and name in unchecked:
            continue
        if key is None:
            near = difflib.get_close_matches(name, KEYS, 1)
            fix = f"did you mean `{near[0]}`?" if near else "remove it"
            raise UserError(
                f"{file}: unknown key `{name}`; {fix} (`deepspeed_unchecked` in {yaml} hands keys on untested)"
            )
        if key.verdict == "YAML":
            raise UserError(f"{file}: `{name}` is set by `{key.says}` in {yaml}; remove it from the JSON")
        if key.verdict == "refused" and (key.says == _REMOVED or not key.is_off(value)):
            raise UserError(f"{file}: `{name}`: {key.says}")
        if stage not in key.stages and not key.is_off(value):
            stages = " or ".join(map(str, key.stages))
            raise UserError(f"{file}: `{name}` does nothing at stage {stage}; remove it or use stage {stages}")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value), into the groups whose keys the table has one by one; offload to nowhere is left out."""
    for name, value in values.items():
        if prefix + name in _GROUPS and isinstance(value, dict | None):
            if value is not None and value.get("device") != "none":
                yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(key, verdict, ZeRO stages, what it does or what to do) of every key: what works first."""
    order = ("works", "YAML", "refused")
    for name, key in sorted(KEYS.items(), key=lambda item: (order.index(item[1].verdict), item[0])):
        says = f"set by the YAML's `{key.says}`" if key.verdict == "YAML" else key.says
        says += f" (not run: {key.not_run})" if key.not_run else ""
        yield name, key.verdict, " ".join(map(str, key.stages)) if key.verdict == "works" else "", says
