"""Draws the figures of docs/results.md from results/data: python -m results.figures"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot

from results.jobs import REPO
from results.page import JUDGES, over_seeds_and_prompts
from results.record import read, seed_interval

PICTURES = REPO / "docs/pictures"
BLUE, ORANGE, GREEN, GREY, RED, VIOLET = "#2563eb", "#d97706", "#059669", "#6b7280", "#dc2626", "#7c3aed"
matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "tristage", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "figure.constrained_layout.use": True,
}  # fmt: skip


def intervals(axis: Any, names: Sequence[str], values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """One line per name from the top: mean over seeds, its interval, and each seed as a dot."""
    for place, (seeds, colour) in enumerate(zip(values, colours, strict=True)):
        mean, low, high = seed_interval(seeds)
        axis.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.35, markersize=5)
        axis.plot([low, high], [place, place], "-", color=colour, linewidth=2)
        axis.plot(mean, place, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def band(axis: Any, steps: Sequence[float], seeds: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """The mean over seeds [S][T] and its interval."""
    found = np.array([seed_interval(column) for column in zip(*seeds, strict=True)])
    axis.plot(steps, found[:, 0], color=colour, label=label)
    axis.fill_between(steps, found[:, 1], found[:, 2], color=colour, alpha=0.15, linewidth=0)


def ablations() -> Any:
    policies = read("ablations")["policies"]
    figure, (gold, kl) = pyplot.subplots(1, 2, figsize=(9, 6.2), sharey=True)
    special = {"untrained": GREY, "baseline": BLUE}
    colours = [special.get(name, ORANGE if "DeepSpeed" in name else GREEN) for name in policies]
    for axis, measure in ((gold, "gold"), (kl, "KL")):
        intervals(axis, list(policies), [each[measure] for each in policies.values()], colours)
        axis.axvline(float(np.mean(policies["baseline"][measure])), color=BLUE, linewidth=0.8, linestyle=":")
    gold.set_xlabel("gold on held-out prompts, 0 to 1")
    kl.set_xlabel("KL to the reference, nats per answer")
    figure.suptitle("One choice of PPO changed at a time: 5 seeds, mean and 95 % interval", fontsize=11)
    return figure


def peers() -> Any:
    ours, trl = read("ablations")["policies"], read("peers")
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.4))
    titles = {"gold": "gold", "score": "reward model's score, since the start", "KL": "KL, nats per answer"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for name, label, colour in (
            ("baseline", "tristage", BLUE),
            ("DeepSpeed-Chat's formulas", "DeepSpeed-Chat's formulas, sampled", ORANGE),
            ("DeepSpeed-Chat as it is", "DeepSpeed-Chat as it is, greedy", RED),
        ):
            curves = ours[name]["curves"][measure]
            responses = np.linspace(0, 40 * 128, len(curves[0]))
            if name == "DeepSpeed-Chat as it is":  # its own curve is of greedy answers: sampled ones, before and after
                curves = list(zip(ours["untrained"][measure], ours[name][measure], strict=True))
                responses = responses[[0, -1]]
            band(axis, responses, _since_start(curves, measure), label, colour)
        steps = [128 * step for step in trl["steps"]]
        for name, found in trl["policies"].items():
            band(axis, steps, _since_start(found["curves"][measure], measure), name, VIOLET)
        axis.set_xlabel("responses sampled")
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def sentiment() -> Any:
    policies = read("sentiment")["policies"]
    figure, (grades, frontier) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    for offset, judge, colour in zip((-0.2, 0.0, 0.2), JUDGES, (BLUE, ORANGE, GREEN), strict=True):
        for place, found in enumerate(policies.values()):
            mean, low, high = over_seeds_and_prompts(found[judge])
            grades.plot([low, high], [place + offset] * 2, "-", color=colour, linewidth=2)
            grades.plot(mean, place + offset, "o", color=colour, markersize=4, label=judge if place == 0 else None)
    grades.set_yticks(range(len(policies)), policies)
    grades.set_ylim(len(policies) - 0.5, -0.5)
    grades.grid(axis="y", visible=False)
    grades.set_xlabel("judge's grade, 0 unfavourable to 1 favourable")
    figure.legend(loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    for name, found in policies.items():
        kl = seed_interval([np.mean(seed) for seed in found["KL"]])[0]
        grade = np.mean([found[judge] for judge in JUDGES])
        colour = next((each for word, each in FAMILIES.items() if name.startswith(word)), GREY)
        frontier.plot(kl, grade, "o", color=colour)
        frontier.annotate(name, (kl, grade), xytext=(5, 3), textcoords="offset points", fontsize=8, color=colour)
    frontier.set_xlabel("KL to the reference, nats per answer")
    frontier.set_ylabel("mean of the three judges")
    frontier.margins(x=0.15)
    return figure


SAMPLED = 24 * 64  # iterations and responses of configs/arithmetic


def arithmetic() -> Any:
    policies = read("arithmetic")["policies"]
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4))
    for name, colour in FAMILIES.items():
        if name in policies:
            curves = policies[name]["curves"]["right"]
            band(axis, np.linspace(0, SAMPLED, len(curves[0])), curves, name, colour)
    axis.set_xlabel("responses sampled")
    axis.set_ylabel("right, of held-out problems")
    axis.legend(frameon=False, fontsize=9)
    return figure


def over_optimisation() -> Any:
    policies = read("over_optimisation")["policies"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for (name, found), colour in zip(policies.items(), (RED, ORANGE, BLUE), strict=True):
        for axis, measure in zip(axes, ("gold", "score"), strict=True):
            curves = zip(found["curves"]["KL"], _since_start(found["curves"][measure], measure), strict=True)
            for seed, (kl, values) in enumerate(curves):
                label = f"reward model of {name}" if seed == 0 else None
                axis.plot(kl, values, color=colour, alpha=0.75, linewidth=1.4, label=label)
    axes[0].set_ylabel("gold")
    axes[1].set_ylabel("reward model's score, since the start")
    for axis in axes:
        axis.set_xlabel("KL to the reference, nats per answer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


FAMILIES = {"PPO": BLUE, "RLOO": VIOLET, "GRPO": RED, "DPO": ORANGE, "best": GREEN}


def _since_start(curves: Sequence[Sequence[float]], measure: str) -> Sequence[Sequence[float]]:
    """Scores of reward models of several seeds have no common zero."""
    return [[value - curve[0] for value in curve] for curve in curves] if measure == "score" else curves


FIGURES: dict[str, Callable[[], Any]] = {
    "results_ablations": ablations,
    "results_peers": peers,
    "results_sentiment": sentiment,
    "results_arithmetic": arithmetic,
    "results_over_optimisation": over_optimisation,
}


def draw(folder: Path = PICTURES) -> list[Path]:
    """Every figure as SVG with a white background; the same numbers give the same file."""
    paths = []
    for name, make in FIGURES.items():
        figure, path = make(), folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Title": name}, facecolor="white")
        pyplot.close(figure)
        paths.append(path)
    return paths


if __name__ == "__main__":
    print(*draw(), sep="\n")
