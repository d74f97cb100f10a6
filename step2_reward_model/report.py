"""The tables of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from step2_reward_model.measures import (
    LENGTH_EDGES,
    MARGIN_EDGES,
    Bucket,
    Measurements,
    accuracy_by,
    mean,
)
from tristage.intervals import wilson_interval


def tables(measured: Measurements) -> list[Table]:
    """Summary; accuracy by margin; accuracy by difference of length."""
    by_margin = accuracy_by(np.abs(measured.margins) * measured.scale, measured.is_right, MARGIN_EDGES)
    by_length = accuracy_by(measured.length_gaps, measured.is_right, LENGTH_EDGES)
    return [
        _summary(measured),
        _buckets("Accuracy by margin", "|margin|, log-odds", [_margins(bucket) for bucket in by_margin], by_margin),
        _buckets("Accuracy by length", "better - worse, tokens", [_tokens(bucket) for bucket in by_length], by_length),
    ]


def _summary(measured: Measurements) -> Table:
    pairs, metrics = len(measured.margins), measured.metrics()
    baseline = mean(measured.longer_wins)
    rows = (
        ("prompts, answers, pairs", f"{len(measured.losses)}, {len(measured.scores)}, {pairs}", None),
        ("accuracy", f"{metrics['reward_model/accuracy']:.3f}", wilson_interval(measured.is_right.sum(), pairs)),
        ("  if the longer answer won", f"{baseline:.3f}", wilson_interval(baseline * pairs, pairs)),
        ("loss", f"{metrics['reward_model/loss']:.3f}", None),
        ("margin, mean", f"{metrics['reward_model/margin']:.3f}", None),
        ("score, mean", f"{metrics['reward_model/score']:.3f}", None),
        ("score, deviation", f"{measured.scores.std():.3f}", None),
        ("expected calibration error", f"{metrics['reward_model/calibration_error']:.3f}", None),
        ("correlation of score and length", f"{metrics['reward_model/length_correlation']:.3f}", None),
    )
    table = _table("Reward model on held-out answers", "measure", "value", "95 % interval")
    for name, value, interval in rows:
        table.add_row(name, value, _interval(interval))
    return table


def _buckets(title: str, column: str, names: Sequence[str], buckets: Sequence[Bucket]) -> Table:
    table = _table(title, column, "pairs", "accuracy", "95 % interval")
    for name, bucket in zip(names, buckets, strict=True):
        if bucket.pairs:
            table.add_row(name, str(bucket.pairs), f"{bucket.accuracy:.3f}", _interval(bucket.interval))
        else:
            table.add_row(name, "0", "-", "")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _margins(bucket: Bucket) -> str:
    return f"{bucket.low:g} and more" if bucket.high == math.inf else f"{bucket.low:g} to {bucket.high:g}"


def _tokens(bucket: Bucket) -> str:
    """Token counts are whole: [1, 17) is 1 to 16."""
    if bucket.low == -math.inf:
        return f"{bucket.high - 1:g} and less"
    if bucket.high == math.inf:
        return f"{bucket.low:g} and more"
    return f"{bucket.low:g}" if bucket.high == bucket.low + 1 else f"{bucket.low:g} to {bucket.high - 1:g}"
