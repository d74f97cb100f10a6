"""How far this rank's main thread is, as it says itself; the watchdog shows it to the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator



class Progress:
    """Where this rank's main thread is, as it says itself."""

    def __init__(self) -> None:
        self.step: int | None = None  # the last finished one of this process
        self.phase = "start"
        self.place = self.moves = 0

    def enter(self, phase: str) -> str:
        """Begin a phase, which every rank does at this point; the phase before."""
        before, self.phase = self.phase, phase
        self.place += 1
        self.moves += 1
        return before


current = Progress()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """All ranks are in here together, if not at the same time."""
    before = current.enter(name)
    yield
    current.enter(before)


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """As `phase`, of what not every rank does."""
    before, current.phase = current.phase, name
    yield
    current.phase = before
    moved()


def moved() -> None:
    """Something got done, if not on every rank: each forward of an engine's model calls this."""
    current.moves += 1


def finished(step: int) -> None:
    current.step = step
    moved()
