"""Runs of steps for the experiments: each once, with its wall and CPU time, resumed if it was interrupted.

A job is one command. It is done when its folder has job.json, which keeps the command, exit code and seconds; a second
start of an experiment runs only what is missing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"
LAUNCHER = ("deepspeed", "--num_gpus")


@dataclass(frozen=True)
class Job:
    """One command that fills `output`."""

    output: Path
    command: tuple[str, ...]

    @property
    def record(self) -> Path:
        return self.output / "job.json"


def step_job(module: str, config: Path, output: Path, words: Iterable[str], ranks: int = 1) -> Job:
    """A step of the pipeline on `ranks` CPU ranks; `module` may be one of `results` that changes a step.

    Numbers do not depend on the number of ranks; one rank per core and several runs at once take the least time.
    """
    settings = [f"output={output}", *words]
    if module.partition(".")[0] == "results":
        return Job(output, (*LAUNCHER, str(ranks), "--module", module, "--config", str(config), *settings))
    launcher = [sys.executable, "-m", "tristage.launch", module, str(config)]
    return Job(output, (*launcher, *settings, "--cpu", str(ranks)))


def data_words(folder: Path, name: str) -> list[str]:
    """The settings that name both files of `name` in folder/data."""
    return [f"data.{side}={folder}/data/{name}.{side}.jsonl" for side in ("train", "heldout")]


def evaluate_job(config: Path, output: Path, policies: Mapping[str, Sequence[str]], words: Iterable[str]) -> Job:
    """results.evaluate of `policies`: name -> the settings that are its own."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "policies.json").write_text(json.dumps(policies, indent=1) + "\n", encoding="utf-8")
    return step_job("results.evaluate", config, output, words)


def run_jobs(jobs: Sequence[Job], at_once: int = 1) -> None:
    """Run what is not done, in order, `at_once` at a time. Raises SystemExit with the log of the first that fails."""
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(run_job, jobs):
            pass


def run_job(job: Job) -> None:
    if job.record.is_file():
        return
    job.output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"PYTHONPATH": str(REPO), "MASTER_PORT": str(free_port())}
    log, started, command = job.output / "job.log", time.time(), job.command
    if command[0] == LAUNCHER[0]:  # jobs at once need a port each, and it reads no MASTER_PORT
        command = (command[0], "--master_port", str(free_port()), *command[1:])
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=REPO, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    code, seconds = os.waitstatus_to_exitcode(status), time.time() - started
    if code:
        raise SystemExit(f"exit code {code} of {' '.join(job.command)}\n{log}:\n{log.read_text()[-3000:]}")
    record = {"command": job.command, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    job.record.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"{seconds:6.0f} s  {job.output}", flush=True)


def cost(jobs: Iterable[Path]) -> dict[str, float]:
    """Wall and CPU seconds of all jobs, by their job.json."""
    records: list[dict[str, Any]] = [json.loads(path.read_text()) for path in jobs]
    return {name: sum(record[name] for record in records) for name in ("seconds", "cpu_seconds")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
