"""Rewards by rule, for tests: importable functions of (prompts, responses)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MOST = 10


def count_commas(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of MOST times that a response says ","; more is no better. 1 is the maximum."""
    return [min(response.count(","), MOST) / MOST for response in responses]


def longer(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def one_short(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def constant(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.5] * len(responses)


def commas_asked(
    prompts: list[str], responses: list[str], rows: list[dict[str, int]]
) -> tuple[list[float], dict[str, list[float | None]]]:
    """How near a response is to the commas that its row asks for; and how many it has, unless it has none."""
    commas = [response.count(",") for response in responses]
    scores = [-abs(count - row["commas"]) / MOST for count, row in zip(commas, rows, strict=True)]
    return scores, {"commas": [count or None for count in commas]}


def faulty(prompts: list[str], responses: list[str]) -> list[float]:
    """count_commas; but on rank 1 at iteration 2 (after the first evaluation: the third call) what $FAULT says, once.

    $FAULT is KIND:FILE; once FILE is there, the fault has happened.
    """
    global calls
    calls += 1
    kind, _, file = os.environ["FAULT"].partition(":")
    if os.environ["RANK"] == "1" and calls == 3 and not Path(file).exists():
        Path(file).touch()
        if kind == "hang":
            hang()
        if kind == "raise":
            raise ZeroDivisionError("by a user")
        os.kill(os.getpid(), signal.Signals[kind])
    return count_commas(prompts, responses)


calls = 0


def hang() -> None:
    while True:
        time.sleep(0.01)


def slow(prompts: list[str], responses: list[str]) -> list[float]:
    """count_commas, in longer than a rank takes between two looks at the others; rank 1 longest."""
    time.sleep(0.6 * (1 + int(os.environ["RANK"])))
    return count_commas(prompts, responses)
