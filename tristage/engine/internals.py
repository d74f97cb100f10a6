"""The names inside DeepSpeed that this package relies on and that DeepSpeed does not promise to keep.

Each engine is checked for them when it is made, so that another version of DeepSpeed ends in one sentence and not in a
step that does something else. tests/unit/test_internals.py checks each name against the installed version.

Where 0.19.8 has a public way it is used, except:
    - `deepspeed.utils.safe_get_local_*` and `safe_set_local_*` copy through the accelerator and cannot write Adam's
      moments before the first step has made them, which a resumed run must (state.py).
    - `deepspeed.runtime.zero.unwrap_model_for_generation` does not put the hooks back after an exception, and leaves
      one pre-forward hook where it was (engines.py, `_whole_parameters`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.runtime import compiler

from tristage.errors import UserError

REQUIRED: dict[str, tuple[str, ...]] = {
    "engine": (
        *("_take_model_step", "_step_applied", "_global_grad_norm", "clip_fp32_gradients", "basic_optimizer"),
        *("global_steps", "global_samples", "micro_steps", "skipped_steps", "_zero3_consolidated_16bit_state_dict"),
    ),
    "optimizer of ZeRO 1 and 2": (
        *("has_overflow", "scaled_global_norm", "_update_scale", "single_partition_of_fp32_groups"),
        *("update_lp_params", "loss_scale", "dynamic_loss_scale", "loss_scaler"),
    ),
    "parameter of ZeRO 1 and 2": ("_hp_mapping",),
    "parameter mapping of ZeRO 1 and 2": ("lp_fragment_address", "hp_fragment_address", "param_group_index"),
    "optimizer of ZeRO 3": (
        *("has_overflow", "_get_norm_groups", "_update_scale", "fp32_partitioned_groups_flat", "grad_position"),
        *("get_param_id", "_get_param_partition_rank", "persistent_parameters", "parameter_offload"),
        *("loss_scale", "dynamic_loss_scale", "loss_scaler"),
    ),
    "optimizer of ZeRO 3 with a part offloaded": ("backup_optimizer",),
    "module hooks of ZeRO 3": (
        *("_remove_module_hooks", "setup_zero_stage3_hooks", "forward_hooks", "backward_hooks"),
        "persistent_parameters",
    ),
    "parameter of ZeRO 3": ("ds_tensor", "ds_numel", "ds_shape", "partition", "all_gather"),
    "bf16 or fp16 optimizer without ZeRO": ("fp16_groups", "fp32_groups", "loss_scale", "loss_scale_config"),
    "fp16 loss scaler": ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"),
    "fp16 loss scaler without ZeRO": ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter"),
}


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which `deepspeed.initialize` does in any case, without compiling its functions.

    No engine here uses Muon, and `torch.compile` imports torch's compiler at once: 1.2 CPU seconds per rank.
    """
    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # of another version, which initialize imports or not
        pass
    finally:
        compiler.compile = compiled


def check_internals(engine: Any) -> None:
    """Raises UserError unless the engine, its optimizer and its parameters have the names of REQUIRED."""
    for kind, owner in _owners(engine):
        require(kind, owner)


def require(kind: str, owner: Any) -> None:
    """Raises UserError unless `owner` has the names of its kind."""
    for name in REQUIRED[kind]:
        if not hasattr(owner, name):
            raise _missing(kind, name)


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """`owner.name` is `function` inside the block; the class's own method after it."""
    if not hasattr(type(owner), name):  # it would replace nothing, in silence
        raise _missing(type(owner).__name__, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


def _owners(engine: Any) -> Iterator[tuple[str, Any]]:
    """(kind, object) of all that is checked in an engine. The caller checks each before the next is looked up."""
    yield "engine", engine
    optimizer, stage, trains = engine.optimizer, engine.zero_optimization_stage(), engine.basic_optimizer is not None
    if stage == 3:
        yield from _owners_of_zero3(engine, trains)
    elif trains and stage:
        yield from _owners_of_zero1_and_2(engine)
    elif trains and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        yield "bf16 or fp16 optimizer without ZeRO", optimizer
    if trains and engine.fp16_enabled():
        yield ("fp16 loss scaler", optimizer.loss_scaler) if stage else (
            "fp16 loss scaler without ZeRO", optimizer.loss_scale_config
        )  # fmt: skip


def _owners_of_zero1_and_2(engine: Any) -> Iterator[tuple[str, Any]]:
    yield "optimizer of ZeRO 1 and 2", engine.optimizer
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            yield "parameter of ZeRO 1 and 2", parameter
            if parameter._hp_mapping is not None:  # None where this rank holds nothing of it
                yield "parameter mapping of ZeRO 1 and 2", parameter._hp_mapping


def _owners_of_zero3(engine: Any, trains: bool) -> Iterator[tuple[str, Any]]:
    if trains:
        yield "optimizer of ZeRO 3", engine.optimizer
    if trains and engine.zero_partial_offload() not in (None, 1.0):
        yield "optimizer of ZeRO 3 with a part offloaded", engine.optimizer
    yield "module hooks of ZeRO 3", engine.optimizer.parameter_offload if trains else engine.optimizer
    yield from (("parameter of ZeRO 3", parameter) for parameter in engine.module.parameters())


def _missing(kind: str, name: str) -> UserError:
    return UserError(
        f"DeepSpeed {deepspeed.__version__}: its {kind} has no `{name}`, which tristage needs; install the version of "
        "deepspeed that constraints.txt names"
    )
