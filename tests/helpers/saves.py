"""For tests of checkpoints: an engine of a few numbers, saves that are stopped at any operation, a small disk."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tristage.storage import durable

KILLED = 9
NEED_ROOM = ("fsync", "rename", "replace", "mkdir")
OPERATIONS = (*NEED_ROOM, "unlink", "rmdir")


class StandInEngine:
    """What a checkpoint needs of an engine (ZeRO 0, float32): every weight is `value`, stepped `steps` times."""

    def __init__(self, value: float = 0.0, steps: int = 0, size: int = 4):
        self.module = nn.Linear(size, size)
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        for _ in range(steps):
            self.step()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(value)

    def step(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.global_steps += 1

    @property
    def value(self) -> float:
        (value,) = {float(x) for parameter in self.module.parameters() for x in parameter.detach().flatten()}
        return value

    def zero_optimization_stage(self) -> int:
        return 0


@contextlib.contextmanager
def before_each_operation(act: Callable[[int], None], operations: Sequence[str] = OPERATIONS) -> Iterator[None]:
    """Call `act` with 0, 1, ... before each operation on the file system: writes, fsyncs, renames, deletions.

    A write is done by half when `act` raises or ends the process.
    """
    count = iter(range(10**6))

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            act(next(count))
            return operation(*arguments, **options)

        return counting

    def write(hashed: durable.HashingFile, data: Any) -> None:
        half = len(memoryview(data)) // 2
        hashed.file.write(memoryview(data)[:half])
        hashed.file.flush()
        act(next(count))
        hashed.file.write(memoryview(data)[half:])
        hashed.hash.update(data)
        hashed.size += len(memoryview(data))

    with contextlib.ExitStack() as stack:
        for name in operations:
            stack.enter_context(mock.patch.object(os, name, counted(getattr(os, name))))
        stack.enter_context(mock.patch.object(durable.HashingFile, "write", write))
        yield


@contextlib.contextmanager
def synced_before_rename() -> Iterator[dict[Path, list[str]]]:
    """For each folder that is renamed from NAME.partial: what in it was changed after its last fsync, or never synced.

    A file counts as synced when fsync was called after its last change, the folder itself when it was synced, too.
    """
    fsync, rename = os.fsync, os.rename
    synced: dict[str, int] = {}
    unsynced: dict[Path, list[str]] = {}

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_mtime_ns

    def note_rename(old: Any, new: Any) -> None:
        if Path(old).suffix == ".partial" and Path(new).suffix != ".partial":
            inside = [Path(old), *Path(old).rglob("*")]
            late = [path for path in inside if synced.get(str(path)) != path.stat().st_mtime_ns]
            unsynced[Path(new)] = [str(path) for path in late]
        rename(old, new)

    with mock.patch.object(os, "fsync", note_fsync), mock.patch.object(os, "rename", note_rename):
        yield unsynced


def killed_at(operation: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child process that ends, as by kill -9, before an operation; False when it got through."""
    pid = os.fork()
    if pid == 0:
        try:
            with before_each_operation(lambda now: os._exit(KILLED) if now == operation else None):
                action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def disk_full_at(operation: int) -> Any:
    """The disk is full from an operation on that needs room."""

    def act(now: int) -> None:
        if now >= operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before_each_operation(act, NEED_ROOM)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes at `folder`; skips where mounting is not permitted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
