"""Intervals hold what closed forms say, and win rates count ties as half."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tristage.intervals import Z, bootstrap_interval, wilson_interval, win_rate


def test_wilson_intervals_by_hand() -> None:
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, count", [(1, 3), (50, 100), (640, 1000), (31.5, 40)])
def test_at_the_ends_of_a_wilson_interval_the_share_is_1_96_standard_errors_away(successes: float, count: int) -> None:
    for end in wilson_interval(successes, count):
        assert abs(successes / count - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), rel=1e-4)


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).gamma(2.0, size=4000)
    half = Z * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)


def test_the_bootstrap_gives_the_same_interval_each_time_and_none_of_nothing():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval([3.0] * 7) == (3.0, 3.0)
    assert all(math.isnan(bound) for bound in bootstrap_interval([]))


def test_a_win_rate_counts_ties_as_half():
    rate, low, high = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0])  # won, tied, won, lost
    assert rate == 0.625 and 0.0 <= low < rate < high <= 1.0
    assert win_rate([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert win_rate([2.000001, 1e-7], [2.0, 0.0])[0] == 0.5  # rounding
