"""The reward of configs/arithmetic: reasoning-gym's own verifier on the last number of a response."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

NUMBER = re.compile(r"-?\d+")


def correct(
    prompts: list[str], responses: list[str], rows: list[dict[str, Any]]
) -> tuple[list[float], dict[str, list[float | None]]]:
    """1 for the right number, else 0; and how often a response is a number and nothing else."""
    numbers = [NUMBER.findall(response) for response in responses]
    scores = [
        float(bool(found) and _verifier(row["metadata"]["source_dataset"])(found[-1], row) == 1)
        for found, row in zip(numbers, rows, strict=True)
    ]
    return scores, {"only_a_number": [float(NUMBER.fullmatch(response) is not None) for response in responses]}


@cache
def _verifier(task: str) -> Any:
    from reasoning_gym import get_score_answer_fn  # takes seconds, on the first call alone

    return get_score_answer_fn(task)
