"""Metrics of a reward model on ranked answers: accuracy, calibration, length bias.

Letters: P prompts, M pairs (a better and a worse answer of one prompt), N answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tristage.algo.masking import correlation
from tristage.intervals import wilson_interval

MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)  # log-odds
LENGTH_EDGES = (-math.inf, -64.0, -16.0, 0.0, 1.0, 17.0, 65.0, math.inf)  # tokens: whole numbers


@dataclass(frozen=True, eq=False)
class Measurements:
    """Every prompt, pair and answer of a data set once, from all ranks; all float64."""

    losses: np.ndarray  # [P]
    margins: np.ndarray  # [M] score of the better answer - of the worse one
    length_gaps: np.ndarray  # [M] tokens of the better answer - of the worse one
    scores: np.ndarray  # [N]
    lengths: np.ndarray  # [N] tokens of the answer, its prompt left out
    scale: float  # score_scale of the model: margins * scale are the log-odds that it was trained to give

    @property
    def is_right(self) -> np.ndarray:
        """[M] bool, True where the better answer scores higher; a tie is wrong."""
        return self.margins > 0

    @property
    def longer_wins(self) -> np.ndarray:
        """[M] 1 where the better answer is the longer one, 1/2 where the lengths are equal."""
        return (self.length_gaps > 0) + 0.5 * (self.length_gaps == 0)

    def metrics(self) -> dict[str, float]:
        """The numbers of a held-out line of metrics.jsonl."""
        low, high = wilson_interval(self.is_right.sum(), len(self.margins))
        return {
            "reward_model/pairs": float(len(self.margins)),
            "reward_model/loss": mean(self.losses),
            "reward_model/accuracy": mean(self.is_right),
            "reward_model/accuracy_low": low,
            "reward_model/accuracy_high": high,
            "reward_model/margin": mean(self.margins),
            "reward_model/length_baseline": mean(self.longer_wins),
            "reward_model/score": mean(self.scores),
            "reward_model/calibration_error": calibration_error(self.margins * self.scale),
            "reward_model/length_correlation": float(
                correlation(torch.from_numpy(self.scores), torch.from_numpy(self.lengths))
            ),
        }


def mean(values: np.ndarray) -> float:
    """Of numbers or truths; 0 of none."""
    return float(values.mean()) if len(values) else 0.0


def calibration_error(margins: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015) of the chance sigmoid(|margin|) that the model's choice is right.

    The chances, from 0.5 to 1, go to `num_bins` bins of the same width; the result is the mean over pairs of their
    bin's |share that is right - mean chance|. A margin of 0 is half right.
    """
    if np.isnan(margins).any():
        return math.nan
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    is_right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum((2 * num_bins * (confidence - 0.5)).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins)  # of each bin, times its pairs
    return float(np.abs(gaps).sum()) / max(len(margins), 1)


@dataclass(frozen=True)
class Bucket:
    """The pairs with low <= value < high, and the share of them that is right."""

    low: float
    high: float
    pairs: int
    accuracy: float
    interval: tuple[float, float]


def accuracy_by(values: np.ndarray, is_right: np.ndarray, edges: tuple[float, ...]) -> list[Bucket]:
    """`values` [M] and `is_right` [M] bool, into the buckets between neighbouring `edges`."""
    buckets = []
    for low, high in zip(edges, edges[1:], strict=False):
        own = is_right[(values >= low) & (values < high)]
        buckets.append(Bucket(low, high, len(own), mean(own), wilson_interval(own.sum(), len(own))))
    return buckets


def length_warning(measured: Measurements) -> str | None:
    """A sentence when a rule of length alone (the longer wins, or the shorter) would do about as well, else None."""
    pairs = len(measured.margins)
    baseline = max(mean(measured.longer_wins), 1 - mean(measured.longer_wins))
    rule = "longer" if mean(measured.longer_wins) >= 0.5 else "shorter"
    low, _ = wilson_interval(measured.is_right.sum(), pairs)
    _, high = wilson_interval(baseline * pairs, pairs)
    if low > high:
        return None
    return (
        f"warning: accuracy {mean(measured.is_right):.3f} is not clearly above the {baseline:.3f} that always choosing "
        f"the {rule} answer reaches on these {pairs} pairs (95 % intervals overlap); it may have learned length"
    )
