"""One optimizer step of several engines together: all of them step, or none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch

from tristage import dist
from tristage.engine.internals import replaced
from tristage.errors import UserError

Losses = Sequence[torch.Tensor]  # [] each: an optimizer step's loss sums, as `backward_mean` returns them


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    grad_norm: float
    """Norm of the global gradient before clipping; inf when the step was skipped."""
    learning_rate: float
    skipped: bool
    """True if a loss or gradient was not finite: no weight changed."""
    losses: tuple[float, ...]
    """This rank's loss sums, one per micro-batch, in the order of their backwards."""
    bad_loss: bool
    """True if a loss of any rank, and of any engine that steps together, is not finite."""
    bad_gradient: bool
    """True if all losses are finite but a gradient is not; never in fp16, whose loss scale adapts by overflow."""
    loss_scale: float | None
    """Of fp16; None otherwise."""

    @property
    def bad(self) -> bool:
        return self.bad_loss or self.bad_gradient

    def metrics(self, engine: str = "optimizer") -> dict[str, float]:
        scale = {} if self.loss_scale is None else {f"{engine}/loss_scale": self.loss_scale}
        return scale | {
            f"{engine}/grad_norm": self.grad_norm,
            f"{engine}/learning_rate": self.learning_rate,
            f"{engine}/skipped": float(self.skipped),
        }


def optimizer_step(engine: deepspeed.DeepSpeedEngine, losses: Losses) -> StepReport:
    """Reduce the accumulated gradients over ranks, clip, update, advance the schedule. A collective."""
    return optimizer_steps([engine], [losses])[0]


def optimizer_steps(engines: Sequence[deepspeed.DeepSpeedEngine], losses: Sequence[Losses]) -> list[StepReport]:
    """One optimizer step of every engine, or of none: if a loss or gradient of one is not finite on any rank, all
    keep their weights, moments and schedules. In fp16 that engine's loss scale falls, those of the others stay.

    Args:
        losses: of each engine, what its `backward_mean`s of this step returned.

    Raises:
        UserError: fp16 with the loss scale at its minimum and gradients that still overflow.
    """
    learning_rates = [engine.get_lr()[0] for engine in engines]
    for engine in engines:
        _reduce_gradients(engine)
    overflows = [_has_overflow(engine) for engine in engines]
    loss_sums = [torch.stack(list(of_engine)).tolist() for of_engine in losses]
    flags = {"loss": float(not all(map(math.isfinite, itertools.chain(*loss_sums)))), "gradient": float(any(overflows))}
    worst = dist.max_over_ranks(flags, engines[0].device)
    bad_loss = worst["loss"] > 0
    skip = bad_loss or worst["gradient"] > 0
    reports = []
    for engine, rate, own_losses, own in zip(engines, learning_rates, loss_sums, overflows, strict=True):
        if skip:
            _discard_gradients(engine, own)
        else:
            engine._take_model_step(None)
        norm, skipped = engine.get_global_grad_norm(), not engine.was_step_applied()
        report = StepReport(
            grad_norm=math.inf if skipped else float("nan") if norm is None else float(norm),
            learning_rate=rate,
            skipped=skipped,
            losses=tuple(own_losses),
            bad_loss=bad_loss,
            bad_gradient=skipped and not bad_loss and not engine.fp16_enabled(),
            loss_scale=float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None,
        )
        reports.append(report)
    return reports


def _reduce_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """The first half of engine.step(): gradients are averaged over ranks. The second is engine._take_model_step."""
    with replaced(engine, "_take_model_step", lambda lr_kwargs: None):
        engine.step()


def _has_overflow(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether a reduced gradient is not finite; under ZeRO, which partitions them, on any rank."""
    if engine.zero_optimization():
        return bool(engine.optimizer.has_overflow())
    return not all(bool(p.grad.isfinite().all()) for p in engine.module.parameters() if p.grad is not None)


def _discard_gradients(engine: deepspeed.DeepSpeedEngine, own_overflow: bool) -> None:
    """Forget the reduced gradients without a step, as DeepSpeed does after an overflow.

    `own_overflow`: this engine's gradients overflowed, so its loss scale must fall.
    """
    if own_overflow and (engine.zero_optimization() or engine.fp16_enabled()):
        try:
            engine._take_model_step(None)
        except Exception as error:
            if "loss scale" not in str(error):
                raise
            raise UserError(
                "fp16: gradients overflow although the loss scale is at its minimum; use `precision: bf16`, or lower "
                "optimizer.learning_rate"
            ) from None
    elif engine.zero_optimization():
        # An infinite norm is the only way to run all of DeepSpeed's clean-up.
        norm = "_get_norm_groups" if engine.zero_optimization_stage() == 3 else "scaled_global_norm"
        infinite = torch.tensor(math.inf, device=engine.device)
        with (
            replaced(engine.optimizer, norm, lambda *_: [infinite] if norm == "_get_norm_groups" else infinite),
            replaced(engine.optimizer, "_update_scale", lambda has_overflow=False: None),
        ):
            engine._take_model_step(None)
    else:  # ZeRO 0 in float32 would step: it does not check the gradients
        engine.zero_grad()
        engine.skipped_steps += 1
        engine._step_applied = False
    assert not engine.was_step_applied()
