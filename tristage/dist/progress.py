"""How far this rank's main thread has come; the watchdog publishes it to the other ranks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

PATIENCE_SECONDS = 5.0  # after which a piece of work says what it is


class Progress:
    """Where this rank's main thread is, as it reports itself."""

    def __init__(self) -> None:
        self.step: int | None = None  # the last one that this process finished
        self.title, self.total = "", 0  # of the step that runs, and its number of steps
        self.phase = "start"
        self.place = self.moves = 0

    def enter(self, phase: str) -> str:
        """Enter a phase, which every rank does at this point; returns the phase before."""
        before, self.phase = self.phase, phase
        self.place += 1
        self.moves += 1
        return before


current = Progress()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Every rank enters this phase, though not simultaneously."""
    before = current.enter(name)
    yield
    current.enter(before)


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """Like `phase`, for work that only some ranks do."""
    before, current.phase = current.phase, name
    yield
    current.phase = before
    made_progress()


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say on rank 0 what is being done if it takes more than a few seconds, and how long it took."""
    begun, told = time.monotonic(), threading.Event()

    def tell() -> None:
        told.set()
        print(f"{what} ...", flush=True)

    timer = threading.Timer(PATIENCE_SECONDS, tell)
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if told.is_set():
            print(f"{what}: {time.monotonic() - begun:.0f} s", flush=True)


def made_progress() -> None:
    """Count a piece of work, on this rank at least: each forward of an engine's model calls this."""
    current.moves += 1


def finished(step: int) -> None:
    current.step = step
    made_progress()
