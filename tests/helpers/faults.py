"""Fault injection: a step's ranks as separate processes (`Ranks`), or an entire launch (`Launched`).

`Ranks` forks from a process that has imported the libraries once, which is much faster than the launcher; a test that
is not about the launcher uses it. Where one rank ends badly it ends the others, as DeepSpeed's launcher does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import torch
from safetensors.torch import load_file

from tests.helpers.interrupted import untimed
from tests.helpers.ranks import process_context
from tests.helpers.tiny import REPO
from tristage.dist import watchdog
from tristage.machine.arrival import free_port
from tristage.training import run
from tristage.training.metrics import RunLog

PATIENCE = 240.0  # seconds until a test gives up: machines are slow
GRACE = 1.0  # seconds that `Ranks` leave their launcher, which looks every 0.05 s (`codes`); DeepSpeed's needs more


class Kill(NamedTuple):
    """SIGKILL of `rank`, `delay` seconds after it has written the line of `step`, at the latest with the next."""

    rank: int
    step: int
    delay: float


def wait_until(what: Callable[[], Any], patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def steps_done(output: Path) -> int:
    """The last training step in metrics.jsonl."""
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return max([0, *(line["step"] for line in map(json.loads, lines) if line["split"] == "train")])


def rank_pids(output: Path) -> list[int]:
    return [sign["pid"] for sign in _signs(output)]


def trained_pids(output: Path) -> list[int]:
    """rank_pids once every rank has shown its first step: before, the watchdog waits three times as long."""
    wait_until(lambda: all(sign["step"] is not None for sign in _signs(output)))
    return rank_pids(output)


def _signs(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((output / "logs").glob("rank_*.json"))]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Same metrics but times, same final weights, to the last bit."""
    assert untimed(ours / "metrics.jsonl") == untimed(theirs / "metrics.jsonl")
    finals = sorted(theirs.glob("final*"))
    assert finals
    for final in finals:
        mine, its = (load_file(folder / final.name / "model.safetensors") for folder in (ours, theirs))
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


class Ranks:
    """`Ranks(2, main, argv, log)` starts run.entry_point(main) on ranks of their own."""

    def __init__(
        self,
        num: int,
        main: Callable[..., None],
        argv: list[str],
        log: Path,
        kill: Kill | None = None,
        port: int | str | None = None,
        **variables: str,
    ) -> None:
        context = process_context()
        self.log = log
        self.port = str(port or free_port())
        self.processes: list[Any] = [
            context.Process(target=_one_rank, args=(rank, num, self.port, main, argv, str(log), kill, variables))
            for rank in range(num)
        ]
        for process in self.processes:
            process.start()

    def codes(self, patience: float = PATIENCE) -> list[int]:
        """Exit codes once all have ended; a bad end of one ends the others."""
        until, told = time.monotonic() + patience, False
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes) and not told:
                told = True
                for process in self.processes:
                    if process.is_alive():
                        process.terminate()
            if time.monotonic() > until:
                for process in self.processes:
                    process.kill()
                raise AssertionError(f"still running after {patience} s:\n{self.log.read_text()}")
            time.sleep(0.05)
        codes = [process.exitcode for process in self.processes]
        if any(codes):  # as the launcher does
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
                buffer.unlink()
        return codes


def _one_rank(
    rank: int, num: int, port: str, main: Any, argv: list[str], log: str, kill: Kill | None, variables: dict[str, str]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num), MASTER_ADDR="127.0.0.1")
    os.environ.update(LOCAL_WORLD_SIZE=str(num), LOCAL_SIZE=str(num), MASTER_PORT=port)
    torch.set_num_threads(1)
    sys.argv = ["train", *argv]
    grace = mock.patch.object(watchdog, "LAUNCHER_GRACE_SECONDS", GRACE)
    with grace, kill_at(kill if kill is not None and kill.rank == rank else None):
        run.entry_point(main)


def kill_at(kill: Kill | None) -> Any:
    """This process dies by `kill`, whatever it is doing then."""
    write = RunLog.write

    def dying(log: RunLog, step: int, split: str, metrics: dict[str, float]) -> None:
        write(log, step, split, metrics)
        if kill is not None and split == "train" and step > kill.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill is not None and split == "train" and step == kill.step:
            threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return mock.patch.object(RunLog, "write", dying)


class Launched:
    """`bash launch/NAME.sh ...` in a session of its own; `output` is where its run writes."""

    def __init__(self, script: str, words: list[str], output: Path, log: Path, **variables: str) -> None:
        self.mark, self.output, self.log = uuid.uuid4().hex, output, log
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                ["bash", str(REPO / script), *words],
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TEST_MARK": self.mark} | variables,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def reach(self, step: int) -> None:
        """Wait until that many training steps are done."""
        wait_until(lambda: steps_done(self.output) >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def code(self, patience: float = PATIENCE) -> int:
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGTERM)
            raise AssertionError(f"still running after {patience} s:\n{self.log.read_text()}") from None

    def left(self) -> list[str]:
        """Processes that it started and that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                pass
        return found
