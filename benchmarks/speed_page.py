"""Writes the tables of docs/speed.md and its figures from the results of against_peers, floor and scaling.

    python -m benchmarks.speed_page

Tables are between the lines `<!-- NAME -->` and `<!-- end -->` of the page; the text around them is written by hand
and names no numbers. A test compares page, figures and results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.against_peers import summary
from benchmarks.figures import Bar, draw

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results", ROOT / "docs/speed.md", ROOT / "docs/pictures"
TITLES = {
    "sft": "SFT, 4 rows per rank",
    "reward_model": "Reward model, 4 pairs per rank",
    "zero2": "PPO, ZeRO-2, 4 rows per rank, full length",
    "zero2-mixed": "PPO, ZeRO-2, 4 rows per rank, mixed lengths",
    "zero3": "PPO, ZeRO-3, 4 rows per rank, full length",
    "wide": "PPO, ZeRO-2, 32 rows per rank, full length",
    "wide-mixed": "PPO, ZeRO-2, 32 rows per rank, mixed lengths",
}
AXES = {
    "prompt": "tokens of a prompt", "response": "tokens of a response", "rows": "rows per rank",
    "width": "width of the actor, 8 layers", "ranks": "ranks",
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


# -- tables ------------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranged(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def peers_table(experiments: dict[str, Any], names: list[str]) -> str:
    """One block of rows per experiment."""
    head = ["", "CPU s per step and rank", "of it", "tokens per CPU s", "cost to ours (range)", "peak MiB per rank"]
    rows = []
    for name in (name for name in names if name in experiments):
        rows.append([f"**{TITLES[name]}**", *[""] * 5])
        for contestant, row in summary(experiments[name]).items():
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items() if phase != "step")
            speed = f"{1000 / row['ms_per_token']['median']:.0f}"
            cost = f"{row['cpu_seconds']['median']:.2f}"
            rows.append([contestant, cost, phases, speed, ranged(row["ratio"]), f"{row['peak_mib']:.0f}"])
    return table(head, rows)


def start_table(experiments: dict[str, Any]) -> str:
    """CPU seconds per rank from the start of the process to its first step, at the first PPO experiment and SFT."""
    rows = []
    for name in (name for name in ("sft", "zero2") if name in experiments):
        starts = {contestant: row["start_cpu_seconds"] for contestant, row in summary(experiments[name]).items()}
        rows += [[f"{TITLES[name]}: {contestant}", f"{seconds:.1f}"] for contestant, seconds in starts.items()]
    return table(["", "CPU s per rank"], rows)


def floor_table(cases: dict[str, Any]) -> str:
    rows = []
    for number, case in cases.items():
        rate = case["rates"]
        what = f"{number} rows per rank; {rate['flops'] / 1e9:.0f} GFLOP/s, {rate['bytes'] / 1e9:.1f} GB/s"
        rows.append([f"**{what}**", "", "", ""])
        pairs = {phase: (case["measured"][phase], least) for phase, least in case["floor"].items()}
        pairs["sum"] = (sum(case["measured"].values()), sum(case["floor"].values()))
        rows += [[phase, f"{ours:.3f}", f"{least:.3f}", f"{ours / least:.2f}"]
                 for phase, (ours, least) in pairs.items()]  # fmt: skip
    return table(["", "CPU s per response", "floor", "times the floor"], rows)


def scaling_table(axes: dict[str, Any]) -> str:
    rows = []
    for axis, points in axes.items():
        for value, phases in points.items():
            parts = [f"{phases[phase]:.3f}" for phase in ("rollout", "score", "update")]
            rows.append([f"{AXES[axis]}: {value}", *parts, f"{sum(phases.values()):.3f}"])
    return table(["", "rollout", "score", "update", "CPU s per response"], rows)


def about(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    other = result.get("versions_of_trl_ppo")
    peer = "" if other is None else f"; PPOTrainer: trl {other['trl']}, transformers {other['transformers']}"
    machine = result["machine"]
    return f"`{result['command']}`\n\n{machine['processor']}, {machine['cores']} cores. {versions}{peer}."


def blocks() -> dict[str, str]:
    """The generated parts of the page, by name."""
    peers, floor, scaling = (read(name) for name in ("against_peers", "floor", "scaling"))
    experiments = peers["experiments"]
    return {
        "about peers": about(peers), "about floor": about(floor), "about scaling": about(scaling),
        "steps 1 and 2": peers_table(experiments, ["sft", "reward_model"]),
        "step 3": peers_table(experiments, [name for name in TITLES if name not in ("sft", "reward_model")]),
        "start": start_table(experiments), "floor": floor_table(floor["cases"]),
        "scaling": scaling_table(scaling["axes"]),
    }  # fmt: skip


def filled(page: str, parts: dict[str, str]) -> str:
    """`page` with each of its blocks replaced."""
    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{parts[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


# -- figures -----------------------------------------------------------------------------------------------------------


def peers_figure(experiments: dict[str, Any]) -> str:
    groups = {}
    for name in (name for name in TITLES if name in experiments):
        bars = []
        for contestant, row in summary(experiments[name]).items():
            share = row["ratio"]["median"] / sum(row["phases"].values())
            parts = {phase: seconds * share for phase, seconds in row["phases"].items()}
            bars.append(Bar(contestant, parts, f"{row['ratio']['median']:.2f}"))
        groups[TITLES[name]] = bars
    return draw("What the same work costs", "CPU seconds per token, tristage = 1; shorter is better", groups)


def floor_figure(cases: dict[str, Any]) -> str:
    groups = {
        f"{number} rows per rank": [
            Bar(name, case[key], f"{sum(case[key].values()):.2f}")
            for name, key in (("measured", "measured"), ("floor", "floor"))
        ]
        for number, case in cases.items()
    }
    return draw("A PPO iteration and its floor", "CPU seconds per response; shorter is better", groups)


def scaling_figure(axes: dict[str, Any]) -> str:
    groups = {
        AXES[axis]: [Bar(value, phases, f"{sum(phases.values()):.2f}") for value, phases in points.items()]
        for axis, points in axes.items()
    }
    return draw("What a PPO iteration costs", "CPU seconds per response", groups)


def figures() -> dict[str, str]:
    """File name -> SVG."""
    return {
        "speed_peers.svg": peers_figure(read("against_peers")["experiments"]),
        "speed_floor.svg": floor_figure(read("floor")["cases"]),
        "speed_scaling.svg": scaling_figure(read("scaling")["axes"]),
    }


def main(argv: list[str] | None = None) -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
    for name, picture in figures().items():
        (PICTURES / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
