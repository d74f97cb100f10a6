"""One run per output folder: OUT/lock.json names the process that writes there.

The file is created with O_EXCL, which also works on shared disks. A holder on this machine is checked by its pid and
the tick at which it started, which does not move with the clock. One on another machine is checked by its heartbeat:
its watchdog thread writes the file about once a second. Clocks need not agree, the file only has to change.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tristage.errors import UserError
from tristage.machine.processes import ProcessId, has_ended, machine, own_id

NAME = "lock.json"
SIZE = 4096  # bytes: always the same, so that each heartbeat fits on a full disk
HEARTBEAT_SECONDS = 30.0  # a holder on another machine that writes nothing for this long is gone

_held: tuple[Path, dict[str, Any]] | None = None


def take(output: Path) -> None:
    """Make this process the one that writes to `output`, which exists. The lock of a killed run is replaced.

    Raises:
        UserError: another process holds it; it names the host, the pid and the start time.
        OSError: the lock cannot be written.
    """
    global _held
    path = output / NAME
    own = own_id()._asdict()
    sign = own | {"host": platform.node()[:100], "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "beat": 0}
    with _one_at_a_time(output):
        while not _create(path, sign):
            content = _read(path)
            other = _parse(content)
            if own.items() <= other.items():  # this process, by an earlier call
                break
            if _is_alive(path, content, other):
                raise UserError(
                    f"{output} is in use by pid {other.get('pid')} on {other.get('host')}, which started at "
                    f"{other.get('since')}; wait until that run has ended, stop it, or set another `output`"
                )
            _remove(path, content)
    _held = path, sign


def beat() -> bool:
    """Update the heartbeat in the lock; False if another run has taken the lock. True without a lock."""
    held = _held
    if held is None:
        return True
    path, sign = held
    sign["beat"] += 1
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        if not _is_ours(_parse(file.read()), sign):
            return held is not _held  # released meanwhile
        file.seek(0)
        file.write(_content(sign))
    return True


def release() -> None:
    """Give the folder back, if this process holds it."""
    global _held
    if _held is not None:
        (path, sign), _held = _held, None
        with contextlib.suppress(OSError):
            if _is_ours(_parse(_read(path)), sign):
                path.unlink()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of one machine take turns: of two that find a stale lock, one could remove the other's new one.

    Between machines, on a disk without such locks, `beat` finds that out.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: Path, sign: dict[str, Any]) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(_content(sign))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _content(sign: dict[str, Any]) -> bytes:
    return json.dumps(sign).encode().ljust(SIZE)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _parse(content: bytes) -> dict[str, Any]:
    """The sign; empty while its holder is writing it, or was killed while it did."""
    with contextlib.suppress(ValueError):
        sign = json.loads(content)
        if isinstance(sign, dict):
            return sign
    return {}


def _is_ours(other: dict[str, Any], sign: dict[str, Any]) -> bool:
    """Whether `other` was written by the process of `sign`; what cannot be read is not another's."""
    return not other or all(other.get(name) == sign[name] for name in ("pid", "machine", "started"))


def _is_alive(path: Path, content: bytes, other: dict[str, Any]) -> bool:
    """Whether the holder runs: here by its pid, elsewhere if the file changes."""
    if other.get("machine") == machine():
        return not has_ended(ProcessId(other["machine"], other["pid"], other["started"]))
    if other:
        print(f"{path} is of {other.get('host')}: waiting {HEARTBEAT_SECONDS:.0f} s for its heartbeat", flush=True)
    until = time.monotonic() + HEARTBEAT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(0.5, HEARTBEAT_SECONDS / 10))
        if (now := _read(path)) != content:
            return bool(now)  # it is gone when its holder has ended meanwhile
    return False


def _remove(path: Path, content: bytes) -> None:
    """Remove a lock with this content. Of two that try, one gets it: a new lock of the other's is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != content:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
