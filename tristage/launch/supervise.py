"""One start of the ranks through the `deepspeed` launcher, supervised until the last of them has ended.

DeepSpeed's launcher answers a signal by ending its ranks (SIGTERM, then SIGKILL after 30 seconds), and pdsh waits
forever for nodes that wait for a failed one. So signals are handled here: the first makes the ranks finish their step
and write a checkpoint, the second ends everything; after the first node has failed, the others get some seconds. Every
process of a run inherits a variable that names the run, by which it is found, on this node and on others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from tristage.launch import leftovers
from tristage.launch.leftovers import MARK, buffers_of, run_processes
from tristage.launch.prepare import Start, prepare
from tristage.runs.screen import Follower, Screen

EXIT_PREEMPTED = 75  # equal to dist.watchdog's, which must not be imported here
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_TO_SAVE = 60.0  # if the signal also ended DeepSpeed's launcher: for ranks to write their checkpoint
SECONDS_AFTER_FAILURE = 30.0  # for the ranks of other nodes to save or report the error
# DeepSpeed's launcher reports any exit code but 0 as an error; the ranks have explained 2 and 75.
EXPLAINED_END = re.compile(rb"\[.*\[ERROR\].*:sigkill_handler\].* exits with return code = (2|75)\n?")
PDSH_EXIT = re.compile(rb"pdsh@.*: ssh exited with exit code (\d+)\n")
PROGRESS = re.compile(rb"[\w ]+ \d+/\d+ (held out: .*|.* left [\d:?]+)\n")  # a line of training.metrics.RunLog
# Exit codes of ranks that a signal ended before they handled signals: 128 + 15, and DeepSpeed's -15.
BEFORE_HANDLERS = (128 + signal.SIGTERM, 256 - signal.SIGTERM)


class Supervisor:
    """`Supervisor().run(words, options)` starts the ranks once and gives their exit code."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self.first_failure: tuple[int, float] | None = None  # of a node: exit code, time
        self.nodes: tuple[str, ...] = ()
        self.port_taken = False  # by another process, after it was picked here and before the ranks met

    def run(self, words: list[str], options: list[str]) -> int:
        """Start MODULE --config CONFIG [key=value ...] with launcher options; the exit code, once all ranks have ended.

        Raises:
            UserError: like `prepare`; nothing was started.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="tristage."))
        try:
            leftovers.sign(self.folder, launcher=os.getpid())
            leftovers.remove(self.folder.parent)
            environment = os.environ | {MARK: str(self.folder)}
            start = prepare(words, options, environment)
            self.nodes = start.nodes
            if start.port is not None:
                (self.folder / "port").write_text(start.port)
            if start.picked:
                (self.folder / "port_picked").touch()  # rank 0 renames it to port_taken
            with self._handling_signals(), _open_log(start) as log, display(start) as follower:
                return self._watch(start, environment, log, follower)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(
        self, start: Start, environment: dict[str, str], log: IO[bytes] | None, follower: Follower | None
    ) -> int:
        child = self._start(start, environment)
        out, err = (_Terminal(stream, follower) for stream in (sys.stdout, sys.stderr))
        threads = [
            threading.Thread(target=_copy, args=(child.stdout, out, log, is_for_the_user), daemon=True),
            threading.Thread(target=_copy, args=(child.stderr, err, log, self._note), daemon=True),
        ]
        for thread in threads:
            thread.start()
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
            if self.first_failure and time.monotonic() - self.first_failure[1] > SECONDS_AFTER_FAILURE:
                self._kill(signal.SIGKILL)
        until = time.monotonic() + SECONDS_TO_SAVE
        while self.stopped_by and self._pids() and time.monotonic() < until:
            time.sleep(0.2)
        self._kill(signal.SIGKILL)
        for thread in threads:
            thread.join()
        self.port_taken = (self.folder / "port_taken").exists()
        remove_buffers(start.port)
        return self._exit_code(child.returncode)

    def _start(self, start: Start, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        if start.environment is not None:
            file = self.folder / "env"
            file.touch(mode=0o600)
            file.write_text(start.environment)
            environment |= {"DS_ENV_FILE": str(file)}
            # Without keep-alives pdsh would wait forever for a lost node.
            alive = " -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
            environment["PDSH_SSH_ARGS_APPEND"] = environment.get("PDSH_SSH_ARGS_APPEND", "") + alive
            # DeepSpeed would send these on unquoted.
            environment = {name: value for name, value in environment.items() if not name.startswith("MLFLOW")}
        return subprocess.Popen(
            ["deepspeed", "--log_level", "error", "--no_local_rank", *start.arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # out of reach of a terminal's Ctrl-C and of signals to this process group
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),  # DeepSpeed's launcher has no handler
        )

    def _exit_code(self, code: int) -> int:
        if self.first_failure:
            code = self.first_failure[0]
        code = 128 - code if code < 0 else code
        if self.stopped_by and code and ((self.folder / "preempted").exists() or code in BEFORE_HANDLERS):
            return EXIT_PREEMPTED
        return code

    # -- signals ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped_by:
            self._kill(signal.SIGKILL)
            return
        self.stopped_by = signal.Signals(number)
        print(
            f"{self.stopped_by.name}: ending after this step, with a checkpoint (a second signal ends at once)",
            file=sys.stderr,
            flush=True,
        )
        ranks = self._pids(ranks_only=True)
        if not ranks:
            self._kill(signal.SIGTERM)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _kill(self, number: signal.Signals) -> None:
        """Send a signal to every process of the run, on all nodes."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        find = f"grep -lszxF '{MARK}={self.folder}' /proc/[0-9]*/environ | cut -d/ -f3"
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        remote = [subprocess.Popen([*command, n, f"kill -{number.name[3:]} $({find})"], **quiet) for n in self.nodes]
        for each in remote:
            try:
                each.wait(15)
            except subprocess.TimeoutExpired:
                each.kill()

    def _pids(self, ranks_only: bool = False) -> list[int]:
        """Processes of this run on this machine; with `ranks_only`, without DeepSpeed's launcher."""
        mine = ((pid, words) for pid, folder, words in run_processes() if folder == str(self.folder))
        return [pid for pid, words in mine if not ranks_only or is_rank(words)]

    def _note(self, line: bytes) -> bool:
        """Remember the first node that fails; returns whether to show the line."""
        if (match := PDSH_EXIT.fullmatch(line)) and self.first_failure is None:
            self.first_failure = int(match[1]), time.monotonic()
        return True


def is_for_the_user(line: bytes) -> bool:
    """False for a line that reports as an error an end that the ranks have explained in a sentence."""
    return EXPLAINED_END.fullmatch(line) is None


def is_rank(words: frozenset[bytes]) -> bool:
    """Whether an environment is a rank's: DeepSpeed's launcher gives it a LOCAL_RANK."""
    return any(word.startswith(b"LOCAL_RANK=") for word in words)


def remove_buffers(port: str | None) -> None:
    """Remove the DeepSpeed buffers that killed ranks leave in shared memory; otherwise `dist.shutdown` does."""
    for buffer in buffers_of(port) if port else ():
        buffer.unlink(missing_ok=True)


@contextlib.contextmanager
def display(start: Start) -> Iterator[Follower | None]:
    """The run's display, where the launcher has a terminal and the run a folder on this machine."""
    if start.log is None or not sys.stdout.isatty():
        yield None
        return
    with Follower(start.log.parent.parent, Screen(Console())) as follower:
        yield follower


class _Terminal:
    """Where ranks' lines go: as they are, or above the display, which has the progress lines' numbers itself (if rank 0
    writes to a folder that can be read here).
    """

    def __init__(self, stream: Any, follower: Follower | None) -> None:
        self.stream, self.follower = stream, follower

    def write(self, line: bytes) -> None:
        if self.follower is None:
            self.stream.buffer.write(line)
            self.stream.flush()
        elif not (PROGRESS.fullmatch(line) and self.follower.sees()):
            self.follower.screen.say(line.decode("utf-8", "replace").rstrip("\n"))


def _copy(source: IO[bytes], terminal: _Terminal, log: IO[bytes] | None, shown: Callable[[bytes], bool]) -> None:
    """Copy rank output to the terminal and to the log, line by line, for lines that `shown` accepts."""
    for line in source:
        if shown(line):
            for target in (terminal, log):
                if target is not None:
                    with contextlib.suppress(OSError):  # a closed terminal, a full disk: the run continues
                        target.write(line)


@contextlib.contextmanager
def _open_log(start: Start) -> Iterator[IO[bytes] | None]:
    """The log, with the command as its next line; None if it cannot be written, which the step will report."""
    try:
        if start.log is None:
            raise FileNotFoundError
        start.log.parent.mkdir(parents=True, exist_ok=True)
        file = open(start.log, "ab", buffering=0)  # noqa: SIM115
    except OSError:
        yield None
        return
    with file:
        file.write(f"{time.strftime('%F %T')} deepspeed {shlex.join(start.arguments)}\n".encode())
        yield file
