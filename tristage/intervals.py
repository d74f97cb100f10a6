"""95 % confidence intervals of shares and means, and win rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2000
TIE = 1e-5
NUMBERS_AT_ONCE = 2**22  # of the resamples held in memory


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """The interval of a share (Wilson 1927); (0, 1) of nothing. 8 of 10: (0.490, 0.943)."""
    if not count:
        return 0.0, 1.0
    share = successes / count
    centre = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return float(centre - half) / (1 + Z**2 / count), float(centre + half) / (1 + Z**2 / count)


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of `values` [N]: percentiles of the means of 2000 resamples (Efron 1979), drawn with a
    fixed seed. Of paired differences it is the interval of the mean difference. (nan, nan) of nothing.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return math.nan, math.nan
    generator, rows = np.random.default_rng(seed), max(1, NUMBERS_AT_ONCE // len(numbers))
    means: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(len(numbers), size=(min(rows, RESAMPLES - start), len(numbers)))
        means.append(numbers[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def win_rate(now: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """(share, low, high): how often `now` [N] is above `before` [N] on the same prompt, ties as half, and the interval
    over prompts. Numbers that agree to five digits tie: the same response scored in another batch differs by rounding.
    """
    after, old = np.asarray(now, dtype=np.float64), np.asarray(before, dtype=np.float64)
    tie = np.isclose(after, old, rtol=TIE, atol=TIE)
    wins = np.where(tie, 0.5, after > old)
    return float(wins.mean()), *bootstrap_interval(wins)
