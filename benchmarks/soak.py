"""Soak test: repeatedly kill PPO; compare result and memory with an uninterrupted run.

    python -m benchmarks.soak [--iterations 1000] [--kill_every 50] [--minutes 60] [--out FILE]

Two runs with one seed through launch/step3_ppo.sh, two CPU ranks each, a tiny network. One is not disturbed. In the
other a random rank gets SIGKILL at a random moment about every `kill_every` iterations; the launcher ends, and is
started again; after `minutes` the run ends with its next kill, and is compared up to that step. Of each rank: anonymous
memory, open descriptors and mapped shared memory, read between iterations.

Memory is compared within the undisturbed run, between iteration 100 (a tenth of shorter runs) and the end, and
over the starts of the other: as many iterations after its first start as after its last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks import tiny
from tristage.training.metrics import read_metrics

MARK = "TRISTAGE_SOAK"  # in the environment of all that a run starts: what has it and outlives the launcher was leaked
AFTER_START = 10  # iterations after a start at which starts are compared
WINDOW = 10  # samples whose median is one figure
FINALS = ("final", "final_critic")
# The cheapest iterations that have every part of PPO: four prompts, four tokens.
CHEAPEST = [
    *("rollout.prompts=4", "rollout.rows_at_once=2", "rollout.max_response_tokens=4", "data.heldout_limit=2"),
    *("ppo.epochs=1", "ppo.minibatch=4", "save_every=10", "logged_samples=1"),
]


def write_config(folder: Path) -> str:
    """The YAML of a run of step 3, with its rows and models."""
    rows = tiny.write_rows(folder / "rows", 16)
    actor = tiny.write_model(folder / "actor")
    scorer = tiny.write_reward_model(folder / "scorer", actor)
    return tiny.ppo_config(folder, actor, scorer, rows["prompts"], 2, *CHEAPEST).file


class Run:
    """One run, which `start` resumes after a kill."""

    def __init__(self, folder: Path, words: list[str], name: str):
        self.words, self.output, self.log = words, folder / name, folder / f"{name}.log"
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | {MARK: self.mark, "TRISTAGE_CACHE": str(folder / "cache")}
        self.samples: list[dict[str, int]] = []  # start, iteration, rank, anonymous KiB, open descriptors
        self.shared: set[str] = set()  # files of /dev/shm that its ranks had mapped
        self.starts = 0

    def start(self) -> None:
        command = ["bash", str(tiny.ROOT / "launch/step3_ppo.sh"), *self.words, f"output={self.output}"]
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.starts += 1
        self.own_ranks: dict[int, psutil.Process] = {}

    def iteration(self) -> int:
        """The step of the last complete line of metrics.jsonl; 0 before there is one."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            return int(json.loads(self._tail().split(b"\n")[-2])["step"])
        return 0

    def _tail(self) -> bytes:
        with (self.output / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            return file.read()

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank."""
        if len(self.own_ranks) < 2 or not all(process.is_running() for process in self.own_ranks.values()):
            self.own_ranks = {}
            for process in psutil.Process(self.launcher.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, ValueError):
                    words = process.cmdline()
                    if "step3_ppo.train" in words and "RANK" in (environment := process.environ()):
                        self.own_ranks[int(environment["RANK"])] = process
        return self.own_ranks

    def sample(self, iteration: int) -> None:
        for rank, process in self.ranks().items():
            with contextlib.suppress(psutil.Error, FileNotFoundError, ProcessLookupError, KeyError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                anonymous = int(fields["RssAnon"].split()[0])
                self.samples.append(
                    {"start": self.starts, "iteration": iteration, "rank": rank, "anonymous_kib": anonymous,
                     "descriptors": process.num_fds()}
                )  # fmt: skip
                maps = Path(f"/proc/{process.pid}/maps").read_text() if iteration % 10 == 0 else ""
                self.shared |= {word for word in maps.split() if word.startswith("/dev/shm/")}

    def watch(self, kill_at: int | None, rng: random.Random) -> bool:
        """Sample once an iteration until the launcher ends (True: by itself) or a rank was killed."""
        seen, told = -1, time.monotonic()
        while self.launcher.poll() is None:
            iteration = self.iteration()
            if iteration != seen and len(self.ranks()) == 2:
                seen = iteration
                self.sample(iteration)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{self.output.name}: start {self.starts}, iteration {iteration}", flush=True)
            if kill_at is not None and iteration >= kill_at and len(self.ranks()) == 2:
                time.sleep(rng.random() / 2)  # at any moment of an iteration, a save included
                rng.choice(sorted(self.ranks().items()))[1].send_signal(signal.SIGKILL)
                self.launcher.wait(timeout=120)
                return False
            time.sleep(0.02)
        if self.launcher.returncode:
            raise SystemExit(f"{self.log.read_text()[-3000:]}\nthe launcher ended with {self.launcher.returncode}")
        return True

    def left_behind(self) -> list[str]:
        """Command lines of processes of this run that are still there, a moment after the launcher's end."""
        for _ in range(50):
            found = list(self._marked())
            if not found:
                return []
            time.sleep(0.2)
        return found

    def _marked(self) -> Iterator[str]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    yield " ".join(process.cmdline())


def soak(
    run: Run, iterations: int, rng: random.Random, kill_every: int | None = None, minutes: float = math.inf
) -> dict[str, Any]:
    """Run to the end, killed about every `kill_every` iterations; what was left behind after each launcher's end."""
    processes: list[str] = []
    kills: list[int] = []
    began = time.monotonic()
    kill_at = None if kill_every is None else 0
    while True:
        if kill_every is not None and kill_at is not None:
            step = rng.randint(kill_every * 3 // 4, kill_every * 5 // 4)
            kill_at = kill_at + step if kill_at + step < iterations - 1 else None
        run.start()
        finished = run.watch(kill_at, rng)
        processes += run.left_behind()
        if finished:
            break
        kills.append(run.iteration())
        print(f"{run.output.name}: killed at iteration {kills[-1]}", flush=True)
        if time.monotonic() - began > 60 * minutes:
            break
    return {
        "finished": finished,
        "iterations": run.iteration(),
        "kills": len(kills),
        "killed_at": kills,
        "minutes": (time.monotonic() - began) / 60,
        "processes_left_behind": processes,
        "shared_memory_files": len(run.shared),
        "shared_memory_left_behind": sorted(name for name in run.shared if Path(name).exists()),
    }


def figure(samples: list[dict[str, int]], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def growth_within(run: Run, first: int, last: int) -> list[dict[str, float]]:
    """Each rank's memory and descriptors around iteration `first` and up to `last`, of a run with one start."""
    found = []
    for rank in (0, 1):
        own = [sample for sample in run.samples if sample["rank"] == rank]
        early = [sample for sample in own if sample["iteration"] >= first][:WINDOW]
        late = [sample for sample in own if sample["iteration"] < last][-WINDOW:]
        found.append(compared(early, late))
    return found


def growth_over_starts(run: Run) -> list[dict[str, float]]:
    """Each rank's memory and descriptors soon after the first start, and as soon after the last that came so far."""
    found = []
    for rank in (0, 1):
        of_starts = []
        for start in range(1, run.starts + 1):
            own = [sample for sample in run.samples if sample["rank"] == rank and sample["start"] == start]
            of_starts.append(own[AFTER_START : AFTER_START + WINDOW])
        long_enough = [samples for samples in of_starts if len(samples) == WINDOW]
        found.append(compared(long_enough[0], long_enough[-1]))
    return found


def compared(early: list[dict[str, int]], late: list[dict[str, int]]) -> dict[str, float]:
    memory = [figure(samples, "anonymous_kib") / 1024 for samples in (early, late)]
    return {
        "from_iteration": early[0]["iteration"],
        "to_iteration": late[-1]["iteration"],
        "mib_before": memory[0],
        "mib_after": memory[1],
        "growth_percent": 100 * (memory[1] / memory[0] - 1),
        "descriptors_before": figure(early, "descriptors"),
        "descriptors_after": figure(late, "descriptors"),
    }


def curve(run: Run) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what is timed."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in read_metrics(run.output / "metrics.jsonl")
    ]


def same_files(one: Run, other: Run) -> bool:
    files = [path.relative_to(one.output) for final in FINALS for path in sorted((one.output / final).iterdir())]
    return all((one.output / path).read_bytes() == (other.output / path).read_bytes() for path in files)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--kill_every", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of the killed run")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        words = [write_config(Path(name)), f"iterations={arguments.iterations}", *CHEAPEST]
        alone, killed = (Run(Path(name), words, which) for which in ("alone", "killed"))
        runs = {
            "left_alone": soak(alone, arguments.iterations, rng),
            "killed": soak(killed, arguments.iterations, rng, arguments.kill_every, arguments.minutes),
        }
        ours, theirs = curve(killed), curve(alone)
        results = {
            "command": " ".join(["python -m benchmarks.soak", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, python {platform.python_version()}",
            "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")},
            "runs": runs,
            "equal_metrics_lines": sum(mine == its for mine, its in zip(ours, theirs, strict=False)),
            "metrics_lines": [len(ours), len(theirs)],
            "equal_exports": same_files(killed, alone) if runs["killed"]["finished"] else None,
            "growth_by_rank": {
                "left_alone": growth_within(alone, min(100, arguments.iterations // 10), arguments.iterations),
                "killed_over_starts": growth_over_starts(killed),
            },
        }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
