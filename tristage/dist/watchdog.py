"""A thread in every rank that handles signals and watches the other ranks, even while the main thread is blocked.

    with watchdog.listening():            # run.entry_point: from here a signal ends the run after the step
        watchdog.watch(OUT / "logs", 600)  # run.start: from here a dead or stuck rank ends the run

Each rank writes a heartbeat about once a second: OUT/logs/rank_00000.json, read by rank 0; the others read rank 0's.
It holds three counters: `beat` (the process runs), `moves` (the main thread makes progress) and `place` (how many
phases it has entered). Every rank enters phases in the same order, so when no rank makes progress, the others wait for
the one with the lowest `place`. Files are used rather than the process group's store, which is a thread of rank 0 and
stops with it. Ages are measured by this rank's clock: clocks need not agree. A rank whose file is never seen (nodes
without a shared OUT) is not watched.
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

from tristage.dist import progress
from tristage.machine.processes import ProcessId, has_ended, own_id
from tristage.storage import lock

EXIT_STALLED = 70  # EX_SOFTWARE: a rank made no progress or was lost
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: ended by a signal after a checkpoint; start it again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DUPLICATE_SIGNAL_SECONDS = 1.0  # launcher and scheduler may both forward one request
SLOW_PHASE_FACTOR = 3.0  # multiplies the timeout before the first step and while saving
LAUNCHER_GRACE_SECONDS = 8.0  # for the launcher to see a lost rank and report its exit code, not ours
HEARTBEAT_BYTES = 4096  # always the same, so that a heartbeat fits on a full disk


def stop_requested() -> bool:
    """Whether a signal has asked this process to end after the step."""
    return _thread is not None and _thread.signalled_at is not None


def may_save() -> None:
    """From here a signal waits for the end of the step; before, there is nothing to save and it ends the process."""
    if _thread is not None:
        _thread.may_save = True


def leave(state: str) -> None:
    """Announce that this rank is ending ("done" or "failed"), so that the others do not report it lost."""
    if _thread is not None:
        _thread.state = state
        _thread.beat()


def lost_a_peer() -> bool:
    """In an exception from a collective: whether another rank is gone, which is then reported."""
    return _thread is not None and _thread.lost_a_peer()


def tell_launcher() -> None:
    """The launcher looks for this file: a signal that also ended DeepSpeed's launcher hides our exit code."""
    mark = os.environ.get("PYTHON_TRISTAGE_RUN")
    if mark and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):
            (Path(mark) / "preempted").touch()


def watch(folder: Path, seconds: float, rank: int, ranks: int) -> None:
    """Watch the other ranks through `folder`, which exists and holds no old heartbeats. Does nothing outside of
    `listening`, or for 0 seconds."""
    if _thread is not None and seconds:
        _thread.watch(folder, seconds, rank, ranks)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 end the run after the step; a second signal ends the process at once."""
    global _thread
    receive, send = os.pipe()
    os.set_blocking(send, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    # The handlers above run once the main thread is back in Python; this pipe is written even if it never is.
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
        self.signalled_at: float | None = None
        self.may_save = False
        self.state = "running"
        self.verdict: str | None = None
        self.lost = False
        self.seconds = 0.0
        self.interval = 1.0
        self.beats = 0
        # Ranks end with their launcher, even if it was killed; a single process may outlive the shell that started it.
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
        self.file.write_bytes(b" " * HEARTBEAT_BYTES)
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
            if self.state == "failed":  # waiting for rank 0 to report why
                os._exit(EXIT_STALLED)
        elif self.signalled_at is None:
            self.signalled_at = now
            if not self.may_save:
                self.end(f"{name} before the first step, nothing to save", EXIT_PREEMPTED)
        elif now - self.signalled_at > DUPLICATE_SIGNAL_SECONDS:
            self.end(f"a second signal, {name}", 128 + number)

    def end(self, why: str, code: int) -> NoReturn:
        """End this process now. The main thread may be stuck in a collective, so it takes no part."""
        rank = os.environ.get("RANK", "0")
        if rank == "0" or code != EXIT_PREEMPTED:
            print(f"rank {rank} on {platform.node()} ends: {why}", file=sys.stderr, flush=True)
        if code == EXIT_PREEMPTED:
            tell_launcher()
        lock.release()
        os._exit(code)

    # -- the other ranks -------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Write this rank's heartbeat, in place: on a full disk a new file could not be written."""
        if not self.seconds:
            return
        self.beats += 1
        heartbeat = self.own_heartbeat() | {"beat": self.beats, "state": self.state, "verdict": self.verdict}
        with contextlib.suppress(OSError), open(self.file, "r+b") as file:
            file.write(json.dumps(heartbeat).encode().ljust(HEARTBEAT_BYTES))

    def own_heartbeat(self) -> dict[str, Any]:
        """Where this rank is, and who it is. Names are cut: a heartbeat has a fixed size."""
        return vars(progress.current) | {"phase": progress.current.phase[:100], "host": platform.node()[:100]} | self.process._asdict()

    def check(self) -> None:
        """End the run if a rank is lost or no rank makes progress."""
        now = time.monotonic()
        away = now - self.checked_at  # discounts the time for which this process was itself suspended
        self.checked_at = now
        if away > 3 * self.interval:
            self.moved_at += away
            self.alive_at = {peer: then + away for peer, then in self.alive_at.items()}
        self.read_heartbeats()
        running = {peer: heartbeat for peer, heartbeat in self.seen.items() if heartbeat["state"] == "running"}
        if self.state != "running":
            return
        for peer, heartbeat in self.seen.items():
            if heartbeat["verdict"]:
                self.dump(heartbeat["verdict"])
                os._exit(EXIT_STALLED)
            if heartbeat["state"] == "failed" or (peer in running and is_gone(heartbeat)):
                self.peer_ended(peer, heartbeat)
        everyone = running | {self.rank: self.own_heartbeat()}
        allowed = self.seconds - 2 * self.interval  # so that a stall is reported within the setting, not after it
        if any(heartbeat["step"] is None or heartbeat["phase"] == "save" for heartbeat in everyone.values()):
            allowed *= SLOW_PHASE_FACTOR
        for peer in running:
            if now - self.alive_at[peer] > allowed:
                self.stalled(peer, everyone, f"sent no heartbeat for {now - self.alive_at[peer]:.0f} s")
        moves = sum(heartbeat["moves"] for heartbeat in everyone.values())
        if moves != self.moves:
            self.moves, self.moved_at = moves, now
        elif self.rank == 0 and now - self.moved_at > allowed:
            behind = [peer for peer, heartbeat in everyone.items() if heartbeat["place"] == min_place(everyone)]
            what = f"made no progress for {now - self.moved_at:.0f} s and the others wait for it"
            if len(behind) == len(everyone) > 1:
                what = f"made no progress for {now - self.moved_at:.0f} s, nor did any other rank"
            self.stalled(behind[0], everyone, what)

    def read_heartbeats(self) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError, ValueError):
                heartbeat = json.loads((self.folder / f"rank_{peer:05d}.json").read_bytes())
                if heartbeat != self.seen.get(peer):
                    self.seen[peer], self.alive_at[peer] = heartbeat, time.monotonic()

    def peer_ended(self, peer: int, heartbeat: dict[str, Any]) -> None:
        """A peer has ended, so this rank ends too, but after the launcher had time to see the peer's exit code.

        The launcher then sends SIGTERM. If this rank has already had a signal, that may have been it: end at once.
        """
        if not self.lost:
            self.lost, self.lost_at = True, time.monotonic()
            self.dump(f"rank {peer} is gone")
        if self.signalled_at is not None or time.monotonic() - self.lost_at > LAUNCHER_GRACE_SECONDS:
            self.end(f"{describe(peer, heartbeat)} is gone", EXIT_STALLED)

    def lost_a_peer(self) -> bool:
        """See `lost_a_peer`. Waits a second: the connection may break a moment before the process is gone."""
        until = time.monotonic() + 1
        while self.seconds and time.monotonic() < until:
            self.read_heartbeats()
            for peer, heartbeat in self.seen.items():
                if heartbeat["state"] == "failed":  # it reports why itself
                    return True
                if heartbeat["state"] == "running" and is_gone(heartbeat):
                    traceback.print_exc(file=self.stacks)
                    print(f"error: {describe(peer, heartbeat)} is gone", file=sys.stderr, flush=True)
                    return True
            time.sleep(0.1)
        return False

    def stalled(self, peer: int, everyone: dict[int, dict[str, Any]], what: str) -> NoReturn:
        """Report the rank, have every rank write its stacks, and end."""
        self.verdict = f"{describe(peer, everyone[peer])} {what}"
        self.beat()
        if peer != self.rank and everyone[peer]["machine"] == self.process.machine:
            with contextlib.suppress(OSError):  # wake a stopped process, so that it writes its stacks and takes signals
                os.kill(everyone[peer]["pid"], signal.SIGCONT)
        self.dump(self.verdict)
        where = ", ".join(f"rank {rank}: {heartbeat['phase']}" for rank, heartbeat in sorted(everyone.items()))
        print(f"error: {self.verdict} ({where}); stacks are in {self.folder}", file=sys.stderr, flush=True)
        time.sleep(2 * self.interval)  # the others read the verdict
        os._exit(EXIT_STALLED)

    def dump(self, why: str) -> None:
        """Write the stacks of all threads of this rank to its file."""
        with contextlib.suppress(OSError):
            self.stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
            self.stacks.flush()
            faulthandler.dump_traceback(self.stacks, all_threads=True)


def is_gone(heartbeat: dict[str, Any]) -> bool:
    """Whether the process that wrote `heartbeat` has ended; False if it is on another machine."""
    return has_ended(ProcessId(heartbeat["machine"], heartbeat["pid"], heartbeat["started"]))


def min_place(everyone: dict[int, dict[str, Any]]) -> int:
    return min(heartbeat["place"] for heartbeat in everyone.values())


def describe(rank: int, heartbeat: dict[str, Any]) -> str:
    """"rank 1 on HOST (pid 7, in rollout after step 3)"."""
    place = f"in {heartbeat['phase']}" + (f" after step {heartbeat['step']}" if heartbeat["step"] else "")
    return f"rank {rank} on {heartbeat['host']} (pid {heartbeat['pid']}, {place})"


_thread: Watchdog | None = None
