"""Identify processes reliably: process numbers are reused, and the wall clock can be changed."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple


class ProcessId(NamedTuple):
    """The identity of one process: no other process ever has the same three values."""

    machine: str  # where a process number means the same process: a boot and a process number namespace
    pid: int
    started: int  # clock ticks from boot to its start, which no step of the clock changes


def process_id(pid: int) -> ProcessId | None:
    """The process that has the number `pid` now; None if there is none, or it is a zombie. Raises OSError."""
    if not os.path.isdir("/proc/self"):
        return ProcessId(machine(), pid, 0)  # not Linux: the end of a process cannot be detected
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # a name before it may hold spaces and parentheses
    return None if state in "ZX" else ProcessId(machine(), pid, int(fields[18]))


def own_id() -> ProcessId:
    """This process."""
    this = process_id(os.getpid())
    assert this is not None
    return this


@functools.cache
def machine() -> str:
    """Where a process number means the same process: containers may share a host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node()


def has_ended(process: ProcessId) -> bool:
    """Whether `process` is certainly gone; False when it is on another machine, or cannot be seen."""
    if process.machine != machine():
        return False
    try:
        return process_id(process.pid) != process
    except OSError:
        return False
