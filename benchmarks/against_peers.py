"""Seconds of steps 1 to 3 next to DeepSpeed-Chat's loop and TRL's trainers, on the same models and rows, in one run.

    python -m benchmarks.against_peers [OUT.json] [--trl-ppo-python PYTHON] [--experiments NAME ...] [--repetitions N]

Random weights: actor of 30 million parameters, reward model of 5.5 million (benchmarks.models), float32, two CPU ranks
with one thread each. Contestants take turns, step by step, and a repetition is one turn of each, after a
warm-up that does not count. What is compared are CPU seconds per rank, which hold where others use the machine too; a
ratio is taken within a repetition, per real token (PPO: of responses), and its median and range are reported.

    sft             4 rows per rank of natural lengths, up to 256 tokens, at equal settings and each at its best
    reward_model    4 pairs per rank, likewise
    zero2           PPO: 4 prompts per rank of 128 tokens, responses of 128, ZeRO-2
    zero2-mixed     the same with responses of mixed length, 40 % of the limit on average
    zero3           as zero2, all engines at ZeRO-3
    wide            as zero2, 64 prompts over the two ranks, sampled and trained in one iteration as each can
    wide-mixed      the same with responses of mixed length

TRL's PPOTrainer needs an environment of its own, see trl_ppo.py; without `--trl-ppo-python` it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.turns import Contestant, Record

OURS, CHAT, TRL, TRL_PPO = (f"benchmarks.{name}" for name in ("ours", "chat_style", "trl_steps", "trl_ppo"))
WIDE = 32  # rows per rank: 64 per iteration


@dataclass(frozen=True)
class Entry:
    """A contestant: the module that it is, and what its job says in addition to the experiment's."""

    module: str
    job: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Entries by name, the first of them ours, and the job of all."""

    job: dict[str, Any]
    entries: dict[str, Entry]
    share: float = 1.0  # of --repetitions
    warm_up: int = 1


def ppo(share: float, trl: bool = True, warm_up: int = 1, **job: Any) -> Experiment:
    entries = {"tristage": Entry(OURS), "DeepSpeed-Chat style": Entry(CHAT)}
    entries |= {"TRL 1.12": Entry(TRL_PPO)} if trl else {}
    job = {"what": "ppo", "rows": 4, "micro_batch": 4, "stage": 2, "actor": "actor", "sampled": False} | job
    return Experiment(job, entries, share, warm_up)


MIXED = {"actor": "actor-mixed", "sampled": True}
GROUPED = Entry(TRL, {"options": {"train_sampling_strategy": "group_by_length"}})
PACKED = Entry(TRL, {"options": {"packing": True}})
EXPERIMENTS = {
    "sft": Experiment(
        {"what": "sft", "rows": 4, "micro_batch": 4},
        {
            "tristage": Entry(OURS),
            "tristage, packed": Entry(OURS, {"rows": 2, "settings": {"packing": True}}),
            "TRL": Entry(TRL),
            "TRL, grouped by length": GROUPED,
            "TRL, packed": Entry(TRL, {"rows": 2} | PACKED.job),
            "DeepSpeed-Chat style": Entry(CHAT),
        },
        2,
    ),
    "reward_model": Experiment(
        {"what": "reward_model", "rows": 4, "micro_batch": 4},
        {
            "tristage": Entry(OURS),
            "TRL": Entry(TRL),
            "DeepSpeed-Chat style": Entry(CHAT),
        },
        4,
    ),
    "zero2": ppo(1),
    "zero2-mixed": ppo(4 / 3, **MIXED),
    "zero3": ppo(2 / 3, trl=False, stage=3),
    "wide": ppo(2 / 3, warm_up=0, rows=WIDE),
    "wide-mixed": ppo(2 / 3, warm_up=0, rows=WIDE, **MIXED),
}


# -- running -----------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, folder: str, repetitions: int, pythons: dict[str, str]) -> dict[str, Any]:
    """The records of all turns but the warm-up: contestant -> its start, and for each repetition those of its ranks."""
    entries = {name: entry for name, entry in experiment.entries.items() if entry.module in pythons}
    with ExitStack() as stack:
        contestants = {}
        for name, entry in entries.items():
            job = experiment.job | entry.job | {"folder": folder}
            contestants[name] = stack.enter_context(Contestant(entry.module, job, 2, pythons[entry.module]))
        steps: dict[str, list[list[Record]]] = {name: [] for name in contestants}
        for repetition in range(-experiment.warm_up, max(1, round(repetitions * experiment.share))):
            for name, contestant in contestants.items():
                found = contestant.step()
                if repetition >= 0:
                    steps[name].append(found)
        return {name: {"started": contestants[name].started, "steps": steps[name]} for name in contestants}


def seconds(ranks: list[Record]) -> float:
    """CPU seconds of one step, per rank."""
    return statistics.fmean(sum(record["phases"].values()) for record in ranks)


def per_token(ranks: list[Record]) -> float:
    """CPU milliseconds of one step per real token."""
    return 1000 * sum(sum(record["phases"].values()) for record in ranks) / sum(record["tokens"] for record in ranks)


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What tables show of an experiment, by contestant; `ratio` is the contestant's cost to that of the first."""
    first = [per_token(ranks) for ranks in next(iter(found.values()))["steps"]]
    rows = {}
    for name, contestant in found.items():
        steps = contestant["steps"]
        phases = dict.fromkeys(phase for ranks in steps for record in ranks for phase in record["phases"])
        rows[name] = {
            "cpu_seconds": spread(seconds(ranks) for ranks in steps),
            "phases": {
                phase: statistics.median(statistics.fmean(record["phases"].get(phase, 0.0) for record in ranks)
                                         for ranks in steps)
                for phase in phases
            },
            "ms_per_token": spread(per_token(ranks) for ranks in steps),
            "tokens": statistics.fmean(sum(record["tokens"] for record in ranks) for ranks in steps),
            "ratio": spread(per_token(ranks) / ours for ranks, ours in zip(steps, first, strict=True)),
            "peak_mib": max(record["peak_mib"] for ranks in steps for record in ranks),
            "start_cpu_seconds": statistics.fmean(contestant["started"]),
        }  # fmt: skip
    return rows


# -- what was measured on ----------------------------------------------------------------------------------------------


def versions(python: str, names: tuple[str, ...] = ("torch", "transformers", "trl", "accelerate")) -> dict[str, str]:
    """Of the libraries in that Python's environment."""
    code = "import platform; from importlib import metadata; print(platform.python_version(), "
    code += f"*(metadata.version(name) for name in {names}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("python", *names), found, strict=True))


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def _lines(path: str) -> Iterator[str]:
    yield from Path(path).read_text().splitlines() if Path(path).exists() else []


def environment(module: str, argv: list[str] | None, pythons: dict[str, str]) -> dict[str, Any]:
    """The command, machine and versions; paths by their last part, for results are read on other machines."""
    arguments = [Path(argument).name for argument in (sys.argv[1:] if argv is None else argv)]
    found: dict[str, Any] = {"command": shlex.join(["python", "-m", f"benchmarks.{module}", *arguments])}
    found |= {"machine": machine(), "versions": versions(sys.executable) | {"deepspeed": metadata.version("deepspeed")}}
    if TRL_PPO in pythons:
        found["versions_of_trl_ppo"] = versions(pythons[TRL_PPO])
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def show(name: str, rows: dict[str, Any]) -> None:
    print(f"\n{name:24} {'CPU s/step':>10} {'ms/token':>9} {'ratio (range)':>20} {'MiB':>6}  phases")
    for contestant, row in rows.items():
        ratio = row["ratio"]
        shown = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
        phases = "  ".join(f"{phase} {value:.2f}" for phase, value in row["phases"].items())
        cost = f"{row['cpu_seconds']['median']:10.2f} {row['ms_per_token']['median']:9.2f}"
        print(f"{contestant:24} {cost} {shown:>20} {row['peak_mib']:6.0f}  {phases}", flush=True)


def with_folder(sizes: models.Sizes, function: Callable[[str], Any]) -> Any:
    """`function` of a temporary folder that holds the models and rows."""
    with tempfile.TemporaryDirectory() as folder:
        models.write(Path(folder), sizes)
        return function(folder)


def command_line(description: str | None, repetitions: int) -> argparse.ArgumentParser:
    """The arguments that against_peers, floor and scaling share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="of one PPO iteration at ZeRO-2")
    parser.add_argument("--smallest", action="store_true", help="networks of a few thousand parameters, to try it out")
    return parser


def write_result(
    out: Path | None, module: str, argv: list[str] | None, pythons: dict[str, str], **found: dict[str, Any]
) -> None:
    """What was found and on what, where a file was asked for."""
    if out is not None:
        out.write_text(json.dumps(environment(module, argv, pythons) | found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, repetitions=3)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--trl-ppo-python", help="python of an environment with trl 1.12.0, see trl_ppo.py")
    options = parser.parse_args(argv)
    pythons = dict.fromkeys([OURS, CHAT, TRL], sys.executable)
    if options.trl_ppo_python:
        pythons[TRL_PPO] = options.trl_ppo_python

    def run_all(folder: str) -> dict[str, Any]:
        found = {}
        for name in options.experiments:
            found[name] = run(EXPERIMENTS[name], folder, options.repetitions, pythons)
            show(name, summary(found[name]))
        return found

    found = with_folder(models.SMALLEST if options.smallest else models.Sizes(), run_all)
    write_result(options.out, "against_peers", argv, pythons, experiments=found)


if __name__ == "__main__":
    main()
