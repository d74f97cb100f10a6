"""Does a rerun of an experiment agree with what is published?

    python -m results.ablations output/results/ablations --seeds 2 --publish output/results
    python -m results.check ablations output/results/ablations.json

A number of the rerun agrees if it lies where a mean of as many seeds is expected in 99 of 100 cases, by the mean and
deviation of the published seeds (Student's t). Exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from results.record import read, student_t


@dataclass(frozen=True)
class Comparison:
    """One number: what was published, where a rerun should be, and where it is."""

    name: str
    published: float
    low: float
    high: float
    rerun: float

    @property
    def agrees(self) -> bool:
        return self.low <= self.rerun <= self.high


def compare(published: dict[str, Any], rerun: dict[str, Any]) -> list[Comparison]:
    """Every number that both have."""
    ours, theirs = dict(numbers(published)), dict(numbers(rerun))
    return [expect(name, ours[name], theirs[name]) for name in ours if name in theirs]


def expect(name: str, published: Sequence[float], rerun: Sequence[float]) -> Comparison:
    """published [S], rerun [K]: the interval is mean +- t * deviation * sqrt(1/S + 1/K)."""
    mean, half = fmean(published), student_t(len(published) - 1, 0.99) * stdev(published)
    half *= math.sqrt(1 / len(published) + 1 / len(rerun))
    return Comparison(name, mean, mean - half, mean + half, fmean(rerun))


def numbers(found: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """(name, a number per seed) of each measure of each policy; of several prompts their mean."""
    for policy, measures in found["policies"].items():
        for measure, seeds in measures.items():
            if measure == "curves" or not isinstance(seeds, list):
                continue
            yield f"{policy}: {measure}", [fmean(seed) if isinstance(seed, list) else float(seed) for seed in seeds]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m results.check")
    parser.add_argument("experiment", help="such as ablations: results/data has its JSON")
    parser.add_argument("rerun", type=Path, help="the JSON that --publish wrote")
    given = parser.parse_args(argv)
    found = compare(read(given.experiment), json.loads(given.rerun.read_text(encoding="utf-8")))
    if not found:
        raise SystemExit(f"error: {given.rerun} has no number that {given.experiment} has")
    table = Table("number", "published", "expected", "rerun", "", title=given.experiment)
    for each in found:
        expected = f"{each.low:.3f} to {each.high:.3f}"
        verdict = "agrees" if each.agrees else "[red]differs[/red]"
        table.add_row(each.name, f"{each.published:.3f}", expected, f"{each.rerun:.3f}", verdict)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    differ = [each.name for each in found if not each.agrees]
    print(f"{len(found) - len(differ)} of {len(found)} numbers agree", *differ, sep="; not ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
