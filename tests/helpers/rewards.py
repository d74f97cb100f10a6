"""Rewards by rule, for tests: importable functions of (prompts, responses)."""

from __future__ import annotations

MOST = 10


def count_commas(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of MOST times that a response says ","; more is no better. 1 is the maximum."""
    return [min(response.count(","), MOST) / MOST for response in responses]


def longer(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def one_short(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)
