"""Contestants of one benchmark, each in ranks of its own, that take turns step by step.

`Contestant` starts the ranks of a module and lets them run one step at a time, so that a machine that slows down slows
all contestants alike and none waits for the start of another. In the module, `Turns` is the other end: it waits for
its turn and measures the step, in CPU seconds, by phase. This file needs the standard library only, so that a
contestant may live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]  # of one step of one rank: see Turns.end


# -- in a contestant's rank --------------------------------------------------------------------------------------------


class Turns:
    """The job that this rank was started for, and the steps of it that are measured."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.argv[1])
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._results = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to the log
        self.phases: dict[str, float] = {}
        self._phase, self._since, self._wall = "", 0.0, 0.0

    def begin(self, phase: str = "step") -> None:
        """Report that this rank is ready, wait for its turn and start the clock in `phase`."""
        self._send({"ready": time.process_time()})
        sys.stdin.readline()
        self.phases, self._phase = {}, phase
        self._since, self._wall = time.process_time(), time.perf_counter()

    def switch(self, phase: str) -> None:
        """What follows counts for `phase`."""
        now = time.process_time()
        self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def end(self, tokens: int) -> None:
        """Stop the clock and report the step: `tokens` real tokens of this rank."""
        self.switch("")
        wall = time.perf_counter() - self._wall
        self._send({"phases": self.phases, "tokens": tokens, "wall": wall, "peak_mib": peak_mib()})

    def _send(self, record: Record) -> None:
        self._results.write(json.dumps(record) + "\n")


def peak_mib() -> float:
    """Largest resident size of this process so far. (getrusage's also holds that of the parent that started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# -- in the benchmark --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Contestant:
    """The ranks of `python -m module JOB`, started, which wait for their turn before each step."""

    def __init__(self, module: str, job: dict[str, Any], ranks: int = 2, python: str = sys.executable) -> None:
        self.name = module
        self._log = tempfile.TemporaryFile("w+")
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        common |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        common |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._ranks = [
            subprocess.Popen(
                [python, "-m", module, json.dumps(job)],
                cwd=ROOT,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for rank in range(ranks)
        ]
        self.started = [float(record["ready"]) for record in self._read()]  # CPU seconds of each rank up to now
        self._is_ready = True

    def step(self) -> list[Record]:
        """One step, measured on each rank."""
        if not self._is_ready:
            self._read()
        self._is_ready = False
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
        return self._read()

    def _read(self) -> list[Record]:
        lines = []
        for rank in self._ranks:
            assert rank.stdout is not None
            lines.append(rank.stdout.readline())
        if not all(lines):
            self.close()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} has ended too early:\n{self._log.read()[-6000:]}")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
