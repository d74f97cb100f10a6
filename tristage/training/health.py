"""Detects nan and inf on any rank, logs the rows that caused them, and stops after too many in a row.

A step with such a number changes nothing (engine.optimizer_steps). OUT/health.jsonl has a line per bad
step, OUT/bad_batches/ the rows that each rank was computing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tristage import dist
from tristage.checkpoint import Checkpoint
from tristage.config import RunSettings
from tristage.engine import StepReport
from tristage.errors import UserError
from tristage.storage.durable import append_json, explain_disk_errors

RowIds = Sequence[Sequence[str]]  # of this rank's micro-batches, in the order of their backwards


class Health:
    """Counts the steps that were taken, and those in a row that were skipped because of nan or inf.

    An fp16 step that is skipped while the loss scale adapts counts as neither.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.limit, self.output = settings.max_bad_steps, Path(settings.output)
        self.taken = self.skipped = self.in_a_row = 0

    @classmethod
    def restored(cls, settings: RunSettings, found: Checkpoint | None) -> Health:
        """The counts in the checkpoint that the run resumes from, or new ones."""
        health = cls(settings)
        if found is not None:
            health.taken, health.skipped, health.in_a_row = (found.control or {})["health"]
        return health

    def state(self) -> list[int]:
        """The counts, as a checkpoint saves them."""
        return [self.taken, self.skipped, self.in_a_row]

    def after_step(self, step: int, report: StepReport, rows: RowIds) -> None:
        """Record what optimizer step (or iteration) `step` did with these rows of this rank. A collective."""
        if not report.skipped:
            self.taken, self.in_a_row = self.taken + 1, 0
            return
        if not report.bad:
            self.skipped += 1
            return
        batches = [
            {"loss": repr(loss), "rows": list(ids)}
            for loss, ids in zip(report.losses, rows, strict=False)
            if report.bad_gradient or not math.isfinite(loss)
        ]
        self.record_bad_step(step, "loss" if report.bad_loss else "gradient", batches)

    def record_bad_step(self, step: int, what: str, batches: list[dict[str, Any]]) -> None:
        """Count and log a skipped step; `batches`: this rank's, empty if it was finite. A collective."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if batches:
            folder = self.output / "bad_batches"
            with explain_disk_errors(folder):
                folder.mkdir(exist_ok=True)
            append_json(folder / f"step_{step:06d}_rank{dist.rank()}.jsonl", batches)
        blamed = [rank for rank, has_bad in enumerate(dist.gather_objects(bool(batches))) if has_bad]
        if dist.is_main():
            line = {"step": step, "bad": what, "ranks": blamed, "in_a_row": self.in_a_row}
            append_json(self.output / "health.jsonl", [line])
        dist.print0(
            f"warning: step {step}: a {what} is not finite: skipped, no weight changed ({self.in_a_row} in a row, "
            f"max_bad_steps {self.limit}); its rows are in {self.output / 'bad_batches'}"
        )

    @property
    def must_stop(self) -> bool:
        """Whether `max_bad_steps` steps in a row were bad; the same on every rank."""
        return self.in_a_row >= self.limit

    def check(self, step: int) -> None:
        """After the checkpoint of `step`: raises UserError if the run must stop."""
        if not self.must_stop:
            return
        raise UserError(
            f"{self.output}: stopped at step {step}: {self.in_a_row} steps in a row had numbers that are not finite; "
            f"the checkpoint has the weights from before them. Look at the rows in {self.output / 'bad_batches'}, "
            "lower the learning rate, or use `precision: bf16` or `float32`"
        )

    def check_finished(self) -> None:
        """A run in which no step was taken has trained nothing. Raises UserError instead of an export."""
        if self.skipped and not self.taken:
            raise UserError(
                f"{self.output}: every optimizer step was skipped because its numbers were not finite: nothing was "
                "trained, nothing is exported; lower the learning rate or use `precision: bf16` or `float32`"
            )


def row_ids(rows: Any, micro_batches: Sequence[Sequence[int | None]]) -> RowIds:
    """Where the rows of each micro-batch came from; `rows` is a set with a method `where`."""
    return [[rows.where(row) for row in micro if row is not None] for micro in micro_batches]
