"""What an engine has learned, as named pieces: float32 weights and Adam's moments, whatever ZeRO stage holds them.

Pieces carry the names of the model's parameters and places inside them, so that what one number of ranks and one ZeRO
stage wrote another reads, exactly. Only what is trained is there: under LoRA the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tristage import dist
from tristage.engine import refresh_persistent
from tristage.errors import UserError
from tristage.storage.pieces import Piece, PieceReader

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # fp16's
MOMENTS = ("exp_avg", "exp_avg_sq")


class Share(NamedTuple):
    """This rank's part of one trained parameter, inside a tensor that the optimizer knows."""

    name: str
    start: int  # index in the flattened parameter
    total: int
    owner: torch.Tensor  # what the optimizer updates: the parameter, its float32 copy, or a flat partition of many
    offset: int  # index in the flattened owner
    numel: int
    writes: bool  # False if another rank writes the same

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[numel] of the owner, or of a moment of the same shape; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def engine_pieces(engine: Any) -> list[Piece]:
    """This rank's pieces: "weights/<parameter>", and once it has stepped "exp_avg/..", "exp_avg_sq/..", "step/.."."""
    pieces = []
    for share in _shares(engine):
        if not share.writes:
            continue
        pieces.append(Piece(f"weights/{share.name}", share.start, share.total, share.of(share.owner)))
        state = _adam_state(engine, share.owner)
        if state:
            for moment in MOMENTS:
                pieces.append(Piece(f"{moment}/{share.name}", share.start, share.total, share.of(state[moment])))
            step = torch.tensor([float(state["step"])], dtype=torch.float32)
            pieces.append(Piece(f"step/{share.name}", 0, 1, step))
    return pieces


def engine_size(engine: Any) -> int:
    """Bytes of this rank's pieces once the optimizer has stepped."""
    mine = (share for share in _shares(engine) if share.writes)
    return sum((1 + len(MOMENTS)) * share.numel * share.owner.element_size() for share in mine)


@torch.no_grad()
def restore_engine(engine: Any, pieces: PieceReader, numbers: dict[str, Any]) -> None:
    """Restore the result of `engine_pieces` and `engine_numbers`: weights, moments, schedule, counters. A collective.

    Raises:
        UserError: they are of another model.
    """
    for share in _shares(engine):
        if pieces.total(f"weights/{share.name}") != share.total:
            raise UserError(
                f"{pieces.folder}: {share.name} has {pieces.total(f'weights/{share.name}')} elements there and "
                f"{share.total} in this model; it is a checkpoint of another model, start again with resume=never"
            )
        pieces.read(f"weights/{share.name}", share.start, share.of(share.owner))
        if f"step/{share.name}" in pieces:
            step = torch.zeros(1)
            pieces.read(f"step/{share.name}", 0, step)
            state = _new_adam_state(engine, share.owner, float(step))
            for moment in MOMENTS:
                pieces.read(f"{moment}/{share.name}", share.start, share.of(state[moment]))
    _refresh_model_weights(engine)
    for counter in COUNTERS:
        setattr(engine, counter, numbers[counter])
    _set_schedule(engine.lr_scheduler, numbers["schedule_step"])
    if (scaler := _loss_scaler(engine)) is not None:
        for name, value in numbers["loss_scaler"].items():
            setattr(scaler, name, value)


def engine_numbers(engine: Any) -> dict[str, Any]:
    """Counters, place in the schedule and fp16's loss scale; the same on every rank, and JSON."""
    scaler = _loss_scaler(engine)
    scaler_fields = {} if scaler is None else vars(scaler)
    return {
        **{counter: int(getattr(engine, counter)) for counter in COUNTERS},
        "schedule_step": engine.lr_scheduler.last_epoch,
        "loss_scaler": {name: scaler_fields[name] for name in LOSS_SCALER_FIELDS if name in scaler_fields},
    }


def _shares(engine: Any) -> Iterator[Share]:
    """This rank's shares, in the order of the model's parameters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    masters = _whole_masters(optimizer)
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    for i, (name, parameter) in enumerate(trained):
        if stage == 3:
            yield from _zero3_share(optimizer, name, parameter)
        elif stage in (1, 2):
            if (mapping := parameter._hp_mapping) is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield Share(name, lp.start, parameter.numel(), owner, hp.start, lp.numel, True)
        else:
            owner, numel = masters.get(id(parameter), parameter), parameter.numel()
            yield Share(name, 0, numel, owner, 0, numel, i % dist.world_size() == dist.rank())


def _zero3_share(optimizer: Any, name: str, parameter: Any) -> Iterator[Share]:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * size
    numel = min(size, parameter.ds_numel - start)  # the last partitions may be padded, or padding alone
    if numel > 0:
        owner = optimizer.fp32_partitioned_groups_flat[group]
        yield Share(name, start, parameter.ds_numel, owner, offset, numel, True)


def _whole_masters(optimizer: Any) -> dict[int, nn.Parameter]:
    """Parameter id -> its float32 copy, if ZeRO 0 trains in bf16 or fp16; empty in float32."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(p): master for low, high in groups for p, master in zip(low, high, strict=True)}


def _optimizer_of(engine: Any, owner: torch.Tensor) -> Any:
    """The torch optimizer that steps `owner`: offloading a part (`ratio`) has a second one for the rest."""
    second = getattr(engine.optimizer, "backup_optimizer", None)
    return second if second is not None and owner.device.type != "cpu" else engine.basic_optimizer


def _adam_state(engine: Any, owner: torch.Tensor) -> dict[str, Any]:
    return _optimizer_of(engine, owner).state.get(owner, {})  # type: ignore[no-any-return]


def _new_adam_state(engine: Any, owner: torch.Tensor, step: float) -> dict[str, Any]:
    """The optimizer's state of `owner`, created as after its first step."""
    optimizer = _optimizer_of(engine, owner)
    state = optimizer.state[owner]
    if not state:
        state.update({moment: torch.zeros_like(owner) for moment in MOMENTS})
    if isinstance(optimizer, torch.optim.AdamW):
        fused = optimizer.defaults.get("fused")
        state["step"] = torch.tensor(step, dtype=torch.float32, device=owner.device if fused else "cpu")
    else:
        state["step"] = int(step)  # DeepSpeedCPUAdam counts in Python
    return state  # type: ignore[no-any-return]


def _refresh_model_weights(engine: Any) -> None:
    """Copy the float32 weights to those that the model computes with."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                master = optimizer.fp32_partitioned_groups_flat[group].narrow(0, offset, size)
                parameter.ds_tensor.copy_(master.view_as(parameter.ds_tensor))
        refresh_persistent(engine)
    elif engine.zero_optimization_stage() in (1, 2):
        optimizer.update_lp_params()
    else:
        masters = _whole_masters(optimizer)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.copy_(masters[id(parameter)])


def _set_schedule(scheduler: Any, step: int) -> None:
    """Set the schedule as after `step` steps; peak rates and shape come from the settings, which may have changed."""
    rates = [base * shape(step) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    state, changed = scheduler.state_dict(), {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    assert changed.keys() <= state.keys(), "torch's schedulers keep their place under other names"
    scheduler.load_state_dict(state | changed)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _loss_scaler(engine: Any) -> Any:
    """The object that holds fp16's dynamic loss scale; None if it is not dynamic."""
    holder = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)  # ZeRO 0 has it in a separate group
    if not getattr(holder, "dynamic_loss_scale", False):
        return None
    return getattr(holder, "loss_scaler", holder)
