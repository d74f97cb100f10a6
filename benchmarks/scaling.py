"""What a PPO iteration costs with longer prompts and responses, more rows, a larger actor and more ranks.

    python -m benchmarks.scaling [OUT.json] [--repetitions N] [--smallest]

One thing is changed at a time from the middle of the grid: prompts and responses of 128 tokens, 8 rows per rank, an
actor of 30 million parameters, ZeRO-2 on two ranks. CPU seconds per response by phase, the median of the repetitions
after a warm-up; every response runs to its limit.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from benchmarks.against_peers import EXPERIMENTS, OURS, command_line, with_folder, write_result
from benchmarks.floor import phases
from benchmarks.models import SMALLEST, Sizes
from benchmarks.turns import Contestant

ROWS, RANKS = 8, 2


@dataclasses.dataclass(frozen=True)
class Point:
    sizes: Sizes
    rows: int = ROWS
    ranks: int = RANKS


def grid(base: Sizes) -> dict[str, dict[str, Point]]:
    """Axis -> value -> what is measured; the middle of the grid is in each axis."""
    change = dataclasses.replace
    widths = [base.width // 2, base.width, base.width * 3 // 2]
    return {
        "prompt": {str(n): Point(change(base, prompt=n)) for n in _around(base.prompt)},
        "response": {str(n): Point(change(base, response=n)) for n in _around(base.response)},
        "rows": {str(n): Point(base, rows=n) for n in (ROWS // 4, ROWS, ROWS * 4)},
        "width": {str(n): Point(change(base, width=n)) for n in widths},
        "ranks": {str(n): Point(base, ranks=n) for n in (1, 2)},
    }


def _around(middle: int) -> list[int]:
    return [middle // 2, middle, middle * 2]


def measure(point: Point, repetitions: int) -> dict[str, float]:
    """CPU seconds per response of each phase."""

    def run(folder: str) -> dict[str, float]:
        job = EXPERIMENTS["zero2"].job | {"rows": point.rows, "folder": folder}
        with Contestant(OURS, job, point.ranks) as contestant:
            return phases(contestant, repetitions, point.rows)

    return dict(with_folder(point.sizes, run))


def measure_all(base: Sizes, repetitions: int) -> dict[str, dict[str, Any]]:
    done: dict[Point, dict[str, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for axis, points in grid(base).items():
        for value, point in points.items():
            if point not in done:
                done[point] = measure(point, repetitions)
            found.setdefault(axis, {})[value] = done[point]
            shown = "  ".join(f"{phase} {seconds:.3f}" for phase, seconds in done[point].items())
            print(f"{axis:8} {value:>5}  {sum(done[point].values()):.3f} s per response  {shown}", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    options = command_line(__doc__, repetitions=2).parse_args(argv)
    axes = measure_all(SMALLEST if options.smallest else Sizes(), options.repetitions)
    write_result(options.out, "scaling", argv, {OURS: sys.executable}, axes=axes)


if __name__ == "__main__":
    main()
