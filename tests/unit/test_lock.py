"""One run writes to an output folder: a living holder is named, a dead one gives way, whatever host it was on."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import REPO
from tristage import dist
from tristage.dist import watchdog
from tristage.errors import UserError
from tristage.machine.processes import machine, process_id
from tristage.storage import lock
from tristage.training import run

HOLD = "import sys, time; from pathlib import Path; from tristage.storage import lock; lock.take(Path(sys.argv[1])); "


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.6)
    yield
    lock.release()


@contextlib.contextmanager
def holder(folder: Path, then: str = "time.sleep(100)") -> Iterator[subprocess.Popen]:
    """Another process that holds the lock and does `then`."""
    command = [sys.executable, "-c", HOLD + then, str(folder)]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
    until = time.monotonic() + 30
    while not (folder / lock.NAME).exists() or (folder / lock.NAME).stat().st_size < lock.SIZE:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def sign_of(folder: Path) -> dict:
    return json.loads((folder / lock.NAME).read_text())


def of_another_host(folder: Path, **changes) -> None:
    """The lock, as a process on another machine would have written it."""
    values = {"pid": 1, "machine": "elsewhere", "started": 1, "host": "node-b", "since": "noon", "beat": 0} | changes
    (folder / lock.NAME).write_bytes(json.dumps(values).encode().ljust(lock.SIZE))


def test_a_second_run_is_told_who_writes_there(tmp_path):
    with holder(tmp_path) as process:
        since = sign_of(tmp_path)["since"]
        with pytest.raises(UserError) as told:
            lock.take(tmp_path)
        where = f"in use by pid {process.pid} on {platform.node()}, which started at {since}; wait until"
        assert where in str(told.value)
        process.send_signal(signal.SIGSTOP)  # a stopped one is not gone
        with pytest.raises(UserError, match="in use by"):
            lock.take(tmp_path)
        assert sign_of(tmp_path)["pid"] == process.pid


def test_a_killed_run_gives_way_at_once(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        start = time.monotonic()
        while process_id(process.pid) is not None:  # a zombie is gone, too
            assert time.monotonic() < start + 10
        lock.take(tmp_path)
    assert sign_of(tmp_path)["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_pid_that_another_process_has_now_is_not_the_holder(tmp_path):
    lock.take(tmp_path)
    sign = sign_of(tmp_path)
    of_another_host(tmp_path, **(sign | {"pid": os.getppid(), "started": process_id(os.getppid()).started}))
    with pytest.raises(UserError, match="in use by"):
        lock.take(tmp_path)
    of_another_host(tmp_path, **(sign | {"pid": os.getppid(), "started": process_id(os.getppid()).started + 1}))
    lock.take(tmp_path)


def test_the_same_process_may_start_again_and_a_released_lock_is_gone(tmp_path):
    lock.take(tmp_path)
    lock.take(tmp_path)
    assert lock.beat()
    lock.release()
    assert list(tmp_path.iterdir()) == [] and lock.beat()


def test_on_another_host_a_heartbeat_tells(tmp_path, capsys):
    of_another_host(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.1):
            of_another_host(tmp_path, beat=(count := count + 1))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by pid 1 on node-b, which started at noon"):
            lock.take(tmp_path)
    finally:
        stop.set()
        thread.join()
    lock.take(tmp_path)  # no heartbeat any more
    assert sign_of(tmp_path)["pid"] == os.getpid()
    assert "is of node-b: waiting" in capsys.readouterr().out


def test_a_holder_elsewhere_that_ends_meanwhile_gives_way(tmp_path):
    of_another_host(tmp_path)
    timer = threading.Timer(0.2, (tmp_path / lock.NAME).unlink)
    timer.start()
    lock.take(tmp_path)
    timer.join()
    assert sign_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_what_a_killed_creation_left_gives_way(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    lock.take(tmp_path)
    assert sign_of(tmp_path)["pid"] == os.getpid()


def race(folder: str, start, results) -> None:
    start.wait()
    try:
        lock.take(Path(folder))
        results.put("taken")
        time.sleep(2)
    except UserError:
        results.put("refused")


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        of_another_host(folder, machine=machine(), pid=2**30)
        start, results = context.Event(), context.Queue()
        processes = [context.Process(target=race, args=(str(folder), start, results)) for _ in range(6)]
        for process in processes:
            process.start()
        start.set()
        found = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.kill()
            process.join()
        assert sorted(found) == ["refused"] * 5 + ["taken"]


def test_the_heartbeat_is_the_watchdogs_and_does_not_depend_on_its_setting(tmp_path):
    with watchdog.listening():
        lock.take(tmp_path)
        until = time.monotonic() + 20
        while sign_of(tmp_path)["beat"] < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
    assert (tmp_path / lock.NAME).stat().st_size == lock.SIZE


def test_a_run_whose_lock_another_has_taken_ends(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "end", lambda self, why, code: ended.append((why, code)))
    with watchdog.listening():
        lock.take(tmp_path)
        of_another_host(tmp_path)
        until = time.monotonic() + 20
        while not ended:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert ended[0] == ("another run has taken over the output folder", watchdog.EXIT_STALLED)
    lock.release()
    assert sign_of(tmp_path)["host"] == "node-b"  # it is the other's


@pytest.mark.parametrize("error", [RuntimeError("broken"), UserError("wrong"), run.Preempted(3), None])
def test_the_lock_is_released_however_a_run_ends(tmp_path, monkeypatch, error):
    def main(argv: list[str]) -> None:
        lock.take(tmp_path)
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["step"])
    monkeypatch.setattr(dist, "shutdown", lambda: None)  # this process is a group of one for other tests
    with contextlib.suppress(SystemExit, RuntimeError):
        run.entry_point(main)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    from tests.helpers.tiny import sft_config

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = sft_config(tmp_path, "m", "r", 0, f"output={tmp_path}")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"lock.json: the disk is full; make room and start again"):
        run._take_lock(settings)
    assert not (tmp_path / lock.NAME).exists()
