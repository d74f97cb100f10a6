"""A command of the user's, run on the exported model every N steps; the numbers that it prints become metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from tristage import dist
from tristage.config import RunSettings
from tristage.dist import progress, watchdog
from tristage.errors import UserError
from tristage.models.saving import save_model
from tristage.storage.durable import remove_tree
from tristage.training.metrics import RunLog, is_due

POLL_SECONDS = 5.0  # between two looks at the command, after which the other ranks hear that it still runs
# What launchers give to ranks: a program that finds these would try to join the run's process group.
OF_RANKS = (
    *("RANK", "LOCAL_RANK", "CROSS_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


class CommandError(Exception):
    """Why a command gave no numbers."""


def check_eval_command(settings: RunSettings) -> None:
    """Before anything loads. Raises UserError: the command's program does not exist."""
    if settings.eval_command is None:
        return
    program = shlex.split(settings.eval_command.command)[0]
    if shutil.which(program) is None:
        raise UserError(
            f"{settings.file}: key `eval_command.command`: there is no program {program}; install it or give its path"
        )


class EvalCommand:
    """Exports an engine's model to OUT/eval_model, runs the command on rank 0, and logs its numbers as "eval/<name>".

    A command that fails costs its numbers and a warning, never the run.
    """

    def __init__(self, settings: RunSettings, engine: Any, tokenizer: Any, device: torch.device, log: RunLog) -> None:
        self.given, self.output = settings.eval_command, Path(settings.output)
        self.engine, self.tokenizer, self.device, self.log = engine, tokenizer, device, log

    def after(self, step: int) -> None:
        """Run it if it is due after `step`. A collective."""
        if self.given is None or not (self.log.is_last(step) or is_due(self.given.every, step)):
            return
        exported = save_model(self.engine, self.tokenizer, self.output / "eval_model")
        with progress.phase("eval_command"):
            metrics = self._run(step)
        for folder in exported:
            remove_tree(folder)
        if metrics:
            self.log.write(step, "heldout", metrics)

    def _run(self, step: int) -> dict[str, float]:
        """The command's numbers, on rank 0. A collective, and a long one: ranks meet every few seconds meanwhile."""
        assert self.given is not None
        begun, log = time.monotonic(), self.output / "logs" / "eval_command.log"
        with contextlib.ExitStack() as stack:
            process, printed = None, None
            if dist.is_main():
                printed = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
                process = stack.enter_context(_started(self._words(), printed, log, step))
            while True:
                runs = process is not None and _still_runs(process)
                ends = watchdog.stop_requested() or time.monotonic() - begun > self.given.timeout_seconds
                found = dist.max_over_ranks({"runs": float(runs), "ends": float(ends)}, self.device)
                progress.made_progress()
                if found["ends"] or not found["runs"]:
                    break
            if process is None or printed is None:
                return {}
            try:
                return numbers_of(process.poll(), printed)
            except CommandError as why:
                dist.print0(f"warning: step {step}: eval_command {why}; its numbers are missing; see {log}")
                return {}

    def _words(self) -> list[str]:
        assert self.given is not None
        folder = str(self.output / "eval_model")
        return [word.replace("{model}", folder) for word in shlex.split(self.given.command)]


@contextlib.contextmanager
def _started(words: list[str], printed: IO[str], log: Path, step: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command's process, in a group of its own, which is killed at the end of the block if it still runs."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    with open(log, "a", encoding="utf-8") as errors:
        print(f"# step {step}: {shlex.join(words)}", file=errors, flush=True)
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=printed, stderr=errors, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            printed.seek(0)
            errors.write(printed.read())


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def numbers_of(code: int | None, printed: IO[str]) -> dict[str, float]:
    """{"eval/<name>": number} of the JSON object in the last line of what a command printed; names inside objects are
    joined by "/"; anything else is left out.

    Raises:
        CommandError: it ended with another code than 0 (None: it had not ended), or printed no such line.
    """
    if code is None:
        raise CommandError("was stopped before its end")
    if code:
        raise CommandError(f"ended with exit code {code}")
    printed.seek(0)
    lines = printed.read().strip().splitlines()
    try:
        values = json.loads(lines[-1]) if lines else None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise CommandError("printed no JSON object in its last line")
    return dict(_numbers(values, "eval"))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _numbers(inside, f"{name}/{key}")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
