"""DeepSpeed engines: the only file (rollout/'s interface aside) that imports deepspeed.

A model enters through `train_engine` or `frozen_engine` and leaves through `full_state_dict`; in between,
`backward_mean` and `optimizer_step` are one optimizer step, and `generation_mode` is what a rollout needs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import register_external_parameter
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tristage import dist
from tristage.config import BatchPlan, OptimizerSettings
from tristage.dist import progress
from tristage.engine.internals import check_internals, import_muon_uncompiled
from tristage.engine.optimizer import _adamw, schedule_factor
from tristage.errors import UserError
from tristage.storage.free_space import free_for_rank

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far rounding may move a token's log-probability between two forwards of the same weights: beyond that something is
# wrong (dropout left on, another mask, rows that see each other).
FORWARD_TOLERANCE = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.05}


def engine_config(template: dict[str, Any], precision: str, plan: BatchPlan, clip_norm: float = 0.0) -> dict[str, Any]:
    """A DeepSpeed JSON (ZeRO, offload, communication) completed with what the step's YAML owns."""
    config = deepcopy(template)
    config.update(
        train_micro_batch_size_per_gpu=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        # The caller owns the step boundary: backward() accumulates, step() reduces and updates.
        managed_gradient_accumulation=False,
        # Never 0: float32 at ZeRO 0 takes the gradient's norm only while it clips (see _keep_gradient_norm).
        gradient_clipping=clip_norm or math.inf,
        bf16={"enabled": precision == "bf16"},
        fp16={"enabled": precision == "fp16"},
        # The optimizer is built here (engine/optimizer.py), not by DeepSpeed's own rules.
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", 10**9)
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage", 0) != 2:
        zero.setdefault("overlap_comm", False)  # managed_gradient_accumulation=False allows it at stage 2 only
    if zero.get("stage", 0) in (1, 2):
        # `true` sends as much: DeepSpeed 0.19 then also reduces each bucket entirely on every rank, after copying it.
        zero.setdefault("reduce_scatter", False)
    return config


def check_zero_support(config: dict[str, Any], has_gpu: bool, where: str) -> None:
    """Refuse ZeRO++ or NVMe settings this machine cannot serve: DeepSpeed would fail with a traceback later.

    Raises:
        UserError: names the setting.
    """
    zero = config["zero_optimization"]
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(name) and not has_gpu:
            raise UserError(f"{where}: zero_optimization.{name} has kernels for GPUs only; remove it")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme" and not _has_async_io():
            raise UserError(
                f"{where}: zero_optimization.{name} to nvme needs the library libaio, which a compiler does not find "
                "here; install its development package, or offload to cpu"
            )


def _has_async_io() -> bool:
    return bool(get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible())


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def train_engine(
    model: nn.Module, config: dict[str, Any], optimizer: OptimizerSettings, total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """A ZeRO-sharded model with AdamW and a schedule in optimizer steps; `config` from `engine_config`."""
    _prepare(model, config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_adamw(model, config, optimizer),
        lr_scheduler=lambda opt: LambdaLR(opt, lambda step: schedule_factor(step, total_steps, optimizer)),
        config=config,
        dist_init_required=False,
    )
    assert not engine.managed_gradient_accumulation(), "this deepspeed ignores managed_gradient_accumulation"
    check_internals(engine)
    _keep_gradient_norm(engine)
    return engine


def _keep_gradient_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Record the norm in float32 at ZeRO 0, the one path where DeepSpeed clips without storing it."""

    def clip() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip


def frozen_engine(model: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """A model for forward passes only (reference, reward), complete on each rank or partitioned (ZeRO-3).

    ZeRO 1 and 2 shard gradients and optimizer, which it does not have: they are treated as ZeRO 0.
    """
    if zero_stage(config) in (1, 2):
        config = config | {"zero_optimization": {"stage": 0}}
    _prepare(model, config)
    model.requires_grad_(False)
    model.eval()
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    check_internals(engine)
    engine.eval()
    return engine


def _prepare(model: Any, config: dict[str, Any]) -> None:
    """Count each forward as progress; register with ZeRO-3 weights used outside their modules (output head)."""
    import_muon_uncompiled()
    # The backbone runs both in the wrapper's forward and, token by token, in the inner model's `generate`.
    inner = getattr(model, "model", model)
    getattr(inner, "base_model", inner).register_forward_hook(lambda *_: progress.made_progress())
    if zero_stage(config) == 3 and hasattr(model, "external_parameters"):
        for parameter in model.external_parameters():
            register_external_parameter(model, parameter)


def backward_mean(engine: deepspeed.DeepSpeedEngine, loss_sum: torch.Tensor, global_count: float) -> torch.Tensor:
    """Backward of one micro-batch's share of `sum over the whole optimizer step / global_count`.

    The one place that undoes DeepSpeed's two hidden divisions: by accumulation steps (switched off) and by
    ranks (its gradient reduction averages). So 1 rank x 8 rows, 2 ranks x 4 rows and 8 micro-batches x 1 row
    give the same gradient.

    Args:
        loss_sum: scalar, the sum over this micro-batch's real tokens or rows.
        global_count: real tokens or rows of the optimizer step, over all ranks and micro-batches.

    Returns:
        scalar float32, `loss_sum` without its graph: what `optimizer_steps` checks.
    """
    engine.backward(loss_sum * (dist.world_size() / max(global_count, 1.0)), scale_wrt_gas=False)
    return loss_sum.detach().float()


def gathered(parameters: list[nn.Parameter], config: dict[str, Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Under a ZeRO-3 `config`, gather the parameters inside the block; what rank 0 writes there is kept."""
    if config is None or zero_stage(config) != 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def gathered_to_read(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Parameters whole inside the block, where ZeRO-3 has partitioned them. A collective there."""
    return deepspeed.zero.GatheredParameters(parameters)


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All weights on the CPU of rank 0 (elsewhere empty); under ZeRO-3 gathered module by module."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict() or {}
    if not dist.is_main():
        return {}
    return {name: tensor.detach().cpu() for name, tensor in engine.module.state_dict().items()}


@contextlib.contextmanager
def generation_mode(engine: deepspeed.DeepSpeedEngine, gather: bool = True) -> Iterator[bool]:
    """Evaluation mode, with parameters gathered for the whole block; yields whether they are complete.

    Under ZeRO-3 every token would otherwise gather all parameters again. Gathering once is not enough: the
    module hooks release the parameters after the first forward, so they are removed for the block. With complete
    parameters ranks need not wait for each other; with `gather=False` they must all run the same forwards.
    """
    was_training = engine.module.training
    engine.module.eval()
    try:
        if engine.zero_optimization_stage() != 3:
            yield True
        elif not gather:
            yield False
        else:
            with _whole_parameters(engine):
                yield True
    finally:
        engine.module.train(was_training)


@contextlib.contextmanager
def _whole_parameters(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        offload._remove_module_hooks()
        offload.forward_hooks.clear()  # it keeps handles of removed hooks, a list that would grow with every rollout
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def refresh_persistent(engine: deepspeed.DeepSpeedEngine) -> None:
    """Call after writing ds_tensor directly: ZeRO-3 also keeps small parameters whole, and those copies are stale."""
    small = engine.optimizer.persistent_parameters if engine.zero_optimization_stage() == 3 else []
    if small:
        small[0].partition(small)
        small[0].all_gather(small)


def free_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the weights' memory. Dropping the engine would not: under ZeRO-3 DeepSpeed keeps its module."""
    for parameter in engine.module.parameters():
        share = parameter.ds_tensor if engine.zero_optimization_stage() == 3 else parameter  # of this rank
        for tensor in (parameter, share):
            tensor.data = tensor.data.new_empty(0)


def parameters_fit(engine: deepspeed.DeepSpeedEngine, device: torch.device, headroom: float = 0.5) -> bool:
    """Whether all parameters, gathered, take at most `headroom` of this device's free memory."""
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.module.parameters())
    return size <= headroom * free_for_rank(device)
