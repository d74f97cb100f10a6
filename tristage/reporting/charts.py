"""A run's numbers as figures of plotly, made as plain dicts: lists of traces and a layout that page.js completes.

plotly.js is 4.8 MB of every report and is worth it: hover, zoom, a legend that hides traces, and figures that are plain
JSON. bokeh.min.js is 1.3 MB, but its figures are documents that its Python objects make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tristage.reporting.meanings import MEANINGS
from tristage.runs.record import Run, Series

Figure = dict[str, Any]
POINTS = 2000  # of a curve that is drawn
# In the order in which a page shows them.
GROUPS = (
    *("sft", "reward_model", "dpo", "eval", "objective", "ema", "policy", "value", "advantages", "rollout"),
    *("optimizer", "health", "throughput", "time", "memory"),
)
JUDGES = ("score", "grade")
HISTOGRAMS = {"score": "Score", "grade": "Grade", "length": "Length, tokens"}


def thinned(series: Series, points: int = POINTS) -> Series:
    """At most `points` points: of each stretch of steps the lowest and the highest, so that no spike is lost."""
    if len(series.values) <= points:
        return series
    values, kept = np.asarray(series.values), []
    for stretch in np.array_split(np.arange(len(values)), points // 2):
        ends = {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
        kept += sorted(ends)
    return Series([series.steps[i] for i in kept], [series.values[i] for i in kept])


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """To six digits, which is more than a screen shows."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def curves(runs: Sequence[Run]) -> dict[str, list[Figure]]:
    """Group -> a figure for each of its metrics: training and held out in one figure, a colour per run."""
    known = {name: place for place, name in enumerate(MEANINGS)}
    names = {name for run in runs for split in run.series.values() for name in split}
    found: dict[str, list[Figure]] = {}
    for name in sorted(names, key=lambda name: (known.get(name, len(known)), name)):
        if not name.endswith(("_low", "_high")):
            found.setdefault(name.partition("/")[0], []).append(_curve(name, runs))
    ranks = {group: place for place, group in enumerate(GROUPS)}
    return dict(sorted(found.items(), key=lambda item: (ranks.get(item[0], len(ranks)), item[0])))


def _curve(name: str, runs: Sequence[Run]) -> Figure:
    traces = []
    for place, run in enumerate(runs):
        for split, label in (("train", "training"), ("heldout", "held out")):
            series = run.series[split].get(name)
            if series is not None:
                title = label if len(runs) == 1 else f"{run.name}, {label}"
                traces.append(_line(thinned(series), title, split, place, len(runs)))
                if split == "heldout" and len(runs) == 1:
                    traces[-1]["bounds"] = _bounds(run, name)
    says, meaning = _says(name, traces), MEANINGS.get(name, "")
    return {"title": name, "meaning": meaning, "x": "step", "traces": traces, "says": says}


def _line(series: Series, title: str, split: str, run: int, runs: int) -> Figure:
    colour = run if runs > 1 else int(split == "heldout")
    return {"name": title, "x": series.steps, "y": rounded(series.values), "split": split, "colour": colour}


def constant(figure: Figure) -> str | None:
    """"name value" of a figure in which nothing moves; None of others."""
    values = {value for trace in figure["traces"] for value in trace["y"]}
    return f"{figure['title']} {values.pop():g}" if len(values) == 1 else None


def _bounds(run: Run, name: str) -> list[list[float | None]] | None:
    """The interval of a held-out metric, where the run has written one."""
    low, high = run.heldout(f"{name}_low"), run.heldout(f"{name}_high")
    return None if low is None or high is None else [rounded(low.values), rounded(high.values)]


def _says(name: str, traces: Sequence[Figure]) -> str:
    """The figure in words, for those who don't see it."""
    ends = [f"{trace['name']} from {trace['y'][0]:g} to {trace['y'][-1]:g}" for trace in traces if trace["y"]]
    return f"{name}: {'; '.join(ends)}"


def frontier(runs: Sequence[Run]) -> list[Figure]:
    """Held-out score and grade against held-out KL, one point per evaluation: what each nat of KL has bought.

    The two of one run share a figure.
    """
    figures = []
    for judge in JUDGES:
        found = [_against_kl(run, judge, place, len(runs)) for place, run in enumerate(runs)]
        if traces := [trace for trace in found if trace is not None]:
            figures.append((f"{judge.capitalize()} against KL", traces))
    if len(runs) == 1 and len(figures) == 2:
        traces = [trace | {"colour": place, "axis": place} for place, (_, (trace,)) in enumerate(figures)]
        figures = [("Score and grade against KL", traces)]
    meaning, x = "A point per evaluation: up is better, right is further from the start.", "KL, nats per response"
    return [
        {"title": title, "meaning": meaning, "x": x, "traces": traces, "says": _says(title, traces)}
        for title, traces in figures
    ]


def _against_kl(run: Run, judge: str, place: int, runs: int) -> Figure | None:
    kl, series = run.heldout("objective/kl"), run.heldout(f"objective/{judge}")
    if kl is None or series is None:
        return None
    at = dict(zip(kl.steps, kl.values, strict=True))
    points = [(at[step], value, step) for step, value in zip(series.steps, series.values, strict=True) if step in at]
    x, y, steps = ([point[i] for point in points] for i in range(3))
    trace = {"name": judge if runs == 1 else run.name, "x": rounded(x), "y": rounded(y), "colour": place}
    split = "train" if runs > 1 else "heldout"  # of several runs none is dashed
    return trace | {"text": [f"step {step}" for step in steps], "split": split, "dots": True}


def histograms(run: Run) -> list[Figure]:
    """Score, grade and length of the held-out responses before training and at the last evaluation."""
    steps, found = sorted(run.rows), []
    if len(steps) < 2:
        return []
    for column, title in HISTOGRAMS.items():
        both = [[x for x in run.rows[step].get(column) or [] if x is not None] for step in (steps[0], steps[-1])]
        if not all(both):
            continue
        edges = np.histogram_bin_edges(np.concatenate(both), bins=30)
        traces = []
        for place, (name, values) in enumerate(zip(("before", "after"), both, strict=True)):
            counts, _ = np.histogram(values, edges)
            middles = rounded(((edges[:-1] + edges[1:]) / 2).tolist())
            traces.append({"name": name, "x": middles, "y": counts.tolist(), "bars": True, "colour": place})
        means = f"mean {np.mean(both[0]):.3g} before, {np.mean(both[1]):.3g} after"
        found.append({"title": title, "meaning": means, "x": title, "traces": traces, "says": f"{title}: {means}"})
    return found


def phases(run: Run) -> list[tuple[str, float]]:
    """(phase, its share of the time) of all steps together, the longest first; [] where a step is one phase."""
    seconds = {
        name.removeprefix("time/"): sum(series.values)
        for split in run.series.values()
        for name, series in split.items()
        if name.startswith("time/") and name not in ("time/iteration", "time/rank_spread")
    }
    total = sum(seconds.values()) if len(seconds) > 1 else 0.0
    return sorted(((name, value / total) for name, value in seconds.items() if total), key=lambda item: -item[1])
