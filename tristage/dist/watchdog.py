"""A thread in every rank that hears the signals and watches the other ranks, whatever the main thread is in.

    with watchdog.listening():            # run.entry_point: from here a signal asks for an end after the step
        watchdog.watch(OUT / "logs", 600)  # run.start: from here a rank that died or stands still ends the run

Each rank writes a sign of life about once a second: OUT/logs/rank_00000.json, read by rank 0; the others read rank 0's.
What changes in it tells: `beat`, that the process runs; `moves`, that its main thread gets on; `place`, how many phases
it has begun. Phases are begun in the same order by every rank, so of ranks that all stand still the one with the
lowest `place` is the one the others wait for. Files and not the process group's store: that is a thread of rank 0 and
stops with it. Ages are by this rank's clock: nothing depends on clocks that agree. A rank whose file is never seen
(nodes without a shared OUT) is not watched.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from tristage.storage import lock
from tristage.machine.processes import ProcessId, has_ended, own_id
from tristage.dist import progress



EXIT_STALLED = 70  # EX_SOFTWARE: a rank stood still or was lost
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: ended on a signal with its checkpoint; start it again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL = 1.0  # seconds: a launcher and a scheduler that pass one request on send it twice
LONG = 3.0  # the timeout before the first step and while saving, as a multiple
FOR_THE_LAUNCHER = 8.0  # seconds to notice a lost rank and report its exit code instead of ours
SIGN_OF_LIFE = 4096  # bytes: always as many, so that a full disk has room for it


def stop_asked() -> bool:
    """Whether this process was asked to end after the step."""
    return _thread is not None and _thread.asked_at is not None


def may_save() -> None:
    """From here a signal waits for the end of the step; before, there is nothing to save and it ends the process."""
    if _thread is not None:
        _thread.may_save = True


def leave(state: str) -> None:
    """Tell the others that this rank ends now ("done" or "failed"): they miss it, or don't."""
    if _thread is not None:
        _thread.state = state
        _thread.beat()


def died_of_another() -> bool:
    """In an exception of a collective: whether it is because another rank is gone, which is then said."""
    return _thread is not None and _thread.died_of_another()


def tell_launcher() -> None:
    """launch/common.sh looks for this file: a signal that also ended DeepSpeed's launcher hides our exit code."""
    mark = os.environ.get("PYTHON_TRISTAGE_RUN")
    if mark and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):
            (Path(mark) / "preempted").touch()


def watch(folder: Path, seconds: float, rank: int, ranks: int) -> None:
    """Watch the other ranks through `folder`, which is there and empty of old signs of life. Does nothing outside of
    `listening`, nor for 0 seconds."""
    if _thread is not None and seconds:
        _thread.watch(folder, seconds, rank, ranks)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 ask for an end after the step; a second one ends the process at once."""
    global _thread
    receive, send = os.pipe()
    os.set_blocking(send, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    # The handlers above run when the main thread is back in Python; this pipe is written even when it never is.
    descriptor = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    _thread = Watchdog(receive)
    _thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(send, bytes([0]))
        _thread.join()
        _thread = None
        os.close(send)
        os.close(receive)


class Watchdog(threading.Thread):
    """The thread. Its attributes are set by the main thread before it reads them, or are single values."""

    def __init__(self, receive: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.receive = receive
        self.asked_at: float | None = None
        self.may_save = False
        self.state = "running"
        self.verdict: str | None = None
        self.lost = False
        self.seconds = 0.0
        self.interval = 1.0
        self.beats = 0
        # A launcher that was killed takes its ranks with it; a shell that started one process may go.
        self.launcher = os.getppid() if "WORLD_SIZE" in os.environ else None

    def watch(self, folder: Path, seconds: float, rank: int, ranks: int) -> None:
        self.folder, self.rank = folder, rank
        self.interval = min(1.0, seconds / 10)
        self.peers = [peer for peer in range(ranks) if peer != rank and 0 in (peer, rank)]
        self.seen: dict[int, dict[str, Any]] = {}
        self.alive_at: dict[int, float] = {}
        self.moves, self.moved_at, self.checked_at = -1, time.monotonic(), time.monotonic()
        self.stacks = open(folder / f"stacks_rank_{rank:05d}.txt", "a", encoding="utf-8")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)
        self.process = own_id()
        self.file.write_bytes(b" " * SIGN_OF_LIFE)
        self.seconds = seconds
        self.beat()

    @property
    def file(self) -> Path:
        return self.folder / f"rank_{self.rank:05d}.json"

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.receive], [], [], self.interval)
            for number in os.read(self.receive, 64) if ready else b"":
                if number == 0:
                    return
                if number in SIGNALS:
                    self.signalled(number)
            if self.launcher is not None and os.getppid() != self.launcher:
                self.end("the launcher is gone", EXIT_STALLED)
            if not lock.beat():
                self.end("another run has taken over the output folder", EXIT_STALLED)
            if self.seconds:
                self.beat()
                self.check()

    # -- signals ---------------------------------------------------------------------------------------------

    def signalled(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.state != "running":
            if self.state == "failed":  # and waits for rank 0 to say why
                os._exit(EXIT_STALLED)
        elif self.asked_at is None:
            self.asked_at = now
            if not self.may_save:
                self.end(f"{name} before the first step, nothing to save", EXIT_PREEMPTED)
        elif now - self.asked_at > SAME_SIGNAL:
            self.end(f"a second signal, {name}", 128 + number)

    def end(self, why: str, code: int) -> NoReturn:
        """End this process now. The main thread may be in a collective for ever: it is not asked."""
        rank = os.environ.get("RANK", "0")
        if rank == "0" or code != EXIT_PREEMPTED:
            print(f"rank {rank} on {platform.node()} ends: {why}", file=sys.stderr, flush=True)
        if code == EXIT_PREEMPTED:
            tell_launcher()
        lock.release()
        os._exit(code)

    # -- the other ranks -------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Write this rank's sign of life. In place: on a full disk a new file could not be written."""
        if not self.seconds:
            return
        self.beats += 1
        sign = self.own_sign() | {"beat": self.beats, "state": self.state, "verdict": self.verdict}
        with contextlib.suppress(OSError), open(self.file, "r+b") as file:
            file.write(json.dumps(sign).encode().ljust(SIGN_OF_LIFE))

    def own_sign(self) -> dict[str, Any]:
        """Where this rank is, and who it is. Names are cut: a sign of life has its size."""
        return vars(progress.current) | {"phase": progress.current.phase[:100], "host": platform.node()[:100]} | self.process._asdict()

    def check(self) -> None:
        """End the run if a rank is lost or the ranks stand still."""
        now = time.monotonic()
        away = now - self.checked_at  # while this process stood still the others' ages, as it knows them, did too
        self.checked_at = now
        if away > 3 * self.interval:
            self.moved_at += away
            self.alive_at = {peer: then + away for peer, then in self.alive_at.items()}
        self.read_signs()
        running = {peer: sign for peer, sign in self.seen.items() if sign["state"] == "running"}
        if self.state != "running":
            return
        for peer, sign in self.seen.items():
            if sign["verdict"]:
                self.dump(sign["verdict"])
                os._exit(EXIT_STALLED)
            if sign["state"] == "failed" or (peer in running and is_gone(sign)):
                self.lose(peer, sign)
        everyone = running | {self.rank: self.own_sign()}
        allowed = self.seconds - 2 * self.interval  # noticed within the setting, not after it
        if any(sign["step"] is None or sign["phase"] == "save" for sign in everyone.values()):
            allowed *= LONG
        for peer in running:
            if now - self.alive_at[peer] > allowed:
                self.stalled(peer, everyone, f"gave no sign of life for {now - self.alive_at[peer]:.0f} s")
        moves = sum(sign["moves"] for sign in everyone.values())
        if moves != self.moves:
            self.moves, self.moved_at = moves, now
        elif self.rank == 0 and now - self.moved_at > allowed:
            behind = [peer for peer, sign in everyone.items() if sign["place"] == min_place(everyone)]
            what = f"did not move for {now - self.moved_at:.0f} s and the others wait for it"
            if len(behind) == len(everyone) > 1:
                what = f"did not move for {now - self.moved_at:.0f} s, nor did any other rank"
            self.stalled(behind[0], everyone, what)

    def read_signs(self) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError, ValueError):
                sign = json.loads((self.folder / f"rank_{peer:05d}.json").read_bytes())
                if sign != self.seen.get(peer):
                    self.seen[peer], self.alive_at[peer] = sign, time.monotonic()

    def lose(self, peer: int, sign: dict[str, Any]) -> None:
        """A rank has ended: so do we, but let the launcher see that one first, for its exit code tells what happened.

        The launcher then sends SIGTERM; to one that we were sent before, it may be the answer already.
        """
        if not self.lost:
            self.lost, self.lost_at = True, time.monotonic()
            self.dump(f"rank {peer} is gone")
        if self.asked_at is not None or time.monotonic() - self.lost_at > FOR_THE_LAUNCHER:
            self.end(f"{describe(peer, sign)} is gone", EXIT_STALLED)

    def died_of_another(self) -> bool:
        """For the main thread. The connection may break a moment before the process is gone."""
        until = time.monotonic() + 1
        while self.seconds and time.monotonic() < until:
            self.read_signs()
            for peer, sign in self.seen.items():
                if sign["state"] == "failed":  # and says why
                    return True
                if sign["state"] == "running" and is_gone(sign):
                    traceback.print_exc(file=self.stacks)
                    print(f"error: {describe(peer, sign)} is gone", file=sys.stderr, flush=True)
                    return True
            time.sleep(0.1)
        return False

    def stalled(self, peer: int, everyone: dict[int, dict[str, Any]], what: str) -> NoReturn:
        """Say which rank, have every rank write its stacks, end."""
        self.verdict = f"{describe(peer, everyone[peer])} {what}"
        self.beat()
        if peer != self.rank and everyone[peer]["machine"] == self.process.machine:
            with contextlib.suppress(OSError):  # a stopped process writes its stacks, too, and takes signals
                os.kill(everyone[peer]["pid"], signal.SIGCONT)
        self.dump(self.verdict)
        where = ", ".join(f"rank {rank}: {sign['phase']}" for rank, sign in sorted(everyone.items()))
        print(f"error: {self.verdict} ({where}); stacks are in {self.folder}", file=sys.stderr, flush=True)
        time.sleep(2 * self.interval)  # the others read the verdict
        os._exit(EXIT_STALLED)

    def dump(self, why: str) -> None:
        """The stacks of all threads of this rank to its file."""
        with contextlib.suppress(OSError):
            self.stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
            self.stacks.flush()
            faulthandler.dump_traceback(self.stacks, all_threads=True)


def is_gone(sign: dict[str, Any]) -> bool:
    """Whether the process that wrote `sign` has ended; False when it is on another machine."""
    return has_ended(ProcessId(sign["machine"], sign["pid"], sign["started"]))


def min_place(everyone: dict[int, dict[str, Any]]) -> int:
    return min(sign["place"] for sign in everyone.values())


def describe(rank: int, sign: dict[str, Any]) -> str:
    """"rank 1 on HOST (pid 7, in rollout after step 3)"."""
    place = f"in {sign['phase']}" + (f" after step {sign['step']}" if sign["step"] else "")
    return f"rank {rank} on {sign['host']} (pid {sign['pid']}, {place})"


_thread: Watchdog | None = None
