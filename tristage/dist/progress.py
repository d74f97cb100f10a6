"""How far this rank's main thread has come; the watchdog publishes it to the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator



class Progress:
    """Where this rank's main thread is, as it reports itself."""

    def __init__(self) -> None:
        self.step: int | None = None  # the last one that this process finished
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


def made_progress() -> None:
    """Count a piece of work, on this rank at least: each forward of an engine's model calls this."""
    current.moves += 1


def finished(step: int) -> None:
    current.step = step
    made_progress()
