"""The health monitor: looks at every line of metrics and says once what seems wrong, why it matters, what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tristage.config import RunSettings
from tristage.storage.durable import append_json
from tristage.training.conditions import CONDITIONS, Condition, History, Metrics

REPLAYED = 2000  # lines of a resumed run that conditions look at again: enough for any that holds


class Alarms:
    """On rank 0: which conditions hold, for how many lines in a row, and which have been told.

    All of it follows from the lines, so that a resumed run reads it again from metrics.jsonl.
    """

    def __init__(self, settings: RunSettings) -> None:
        specs = {spec.name: spec.path for spec in settings.engine_specs()}
        self.limits, self.output = settings.health, Path(settings.output)
        self.history = History(same_start="actor" in specs and specs.get("reference", specs["actor"]) == specs["actor"])
        self.in_a_row: dict[str, int] = {}
        self.told: set[str] = set()
        self.stops: str | None = None  # why the run must end

    @property
    def holding(self) -> list[str]:
        """The conditions that hold now."""
        patience = {condition.name: condition.patience for condition in CONDITIONS}
        return [name for name, count in self.in_a_row.items() if count >= patience[name]]

    def replay(self, lines: Sequence[Mapping[str, Any]], logged: Iterable[Mapping[str, Any]]) -> None:
        """Take in what an earlier attempt has written: the lines of metrics, and `logged`, those of health.jsonl."""
        self.told = {str(line["alarm"]) for line in logged if "alarm" in line}
        for line in lines[:-REPLAYED]:
            self.history.add(line["split"], _finite(line))
        for line in lines[-REPLAYED:]:
            self._begin(line["step"], line["split"], line)

    def look(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Take in a line. What begins to hold goes to health.jsonl, and to the screen if it is the first time."""
        for condition, value in self._begin(step, split, metrics):
            limit = getattr(self.limits, condition.name)
            seen = condition.seen.format(value=f"{value:.4g}", limit=f"{limit:g}")
            line = {"step": step, "alarm": condition.name, "value": value, "limit": limit, "seen": seen}
            append_json(self.output / "health.jsonl", [line | {"why": condition.why, "fix": condition.fix}])
            if self.limits.stops_on(condition.name):
                self.stops = f"stopped at step {step} by health.stop_on {condition.name}: {seen}. {condition.fix}"
            if condition.name not in self.told:
                self.told.add(condition.name)
                reason = f"  why it matters: {condition.why}\n  to change: {condition.fix}"
                print(f"warning: step {step}: {condition.name}: {seen}\n{reason}", flush=True)

    def _begin(self, step: int, split: str, metrics: Mapping[str, Any]) -> list[tuple[Condition, float]]:
        """The conditions that begin to hold with this line, and the value of each."""
        finite = _finite(metrics)
        found = [self._check(condition, step, split, finite) for condition in CONDITIONS]
        self.history.add(split, finite)
        return [begun for begun in found if begun is not None]

    def _check(self, condition: Condition, step: int, split: str, line: Metrics) -> tuple[Condition, float] | None:
        limit = getattr(self.limits, condition.name)
        if limit is None or condition.split != split:
            return None
        value = condition.value(line, self.history, step)
        if value is None or not condition.holds(value, limit):
            self.in_a_row.pop(condition.name, None)
            return None
        self.in_a_row[condition.name] = self.in_a_row.get(condition.name, 0) + 1
        return (condition, value) if self.in_a_row[condition.name] == condition.patience else None


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value) and name != "step"}


def table() -> str:
    """The conditions as docs/health.md has them."""
    rows = ["| condition | what is seen | why it matters | what to change |", "|---|---|---|---|"]
    for each in CONDITIONS:
        lasting = f", {each.patience} times in a row" if each.patience > 1 else ""
        seen = each.seen.format(value="...", limit=f"`health.{each.name}`") + lasting
        rows.append(f"| `{each.name}` | {seen} | {each.why} | {each.fix} |")
    return "\n".join(rows)
