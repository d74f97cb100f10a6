"""Remove what killed runs of this user left on this machine: folders in TMPDIR and buffers in shared memory.

A launcher makes a folder for each start (supervise.py) and removes it at the end, with DeepSpeed's buffers, 66 MiB per
rank. Neither happens after `kill -9`. The folder names the launcher's process and the port of its run, which is part of
the buffers' names; every other process of the run has the folder in its environment. So a run is gone if its launcher
is gone and no process names its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tristage.machine.processes import ProcessId, has_ended, process_id

SHARED_MEMORY = Path("/dev/shm")
MARK = "PYTHON_TRISTAGE_RUN"  # DeepSpeed sends variables that start with PYTHON to other nodes
OWNER = "launcher"  # the file in a run's folder that names the process of its launcher


def sign(folder: Path, launcher: int) -> None:
    """Write into a run's `folder` that the process `launcher` owns it."""
    (folder / OWNER).write_text(json.dumps(process_id(launcher)))


def remove(temporary: Path, shared_memory: Path = SHARED_MEMORY) -> None:
    """Remove the folders in `temporary` and the buffers of runs that are gone, and nothing of any other run."""
    folders = [folder for folder in temporary.glob("tristage.*") if _is_own(folder)]
    left = [folder for folder in folders if _launcher_has_ended(folder)]
    if left:
        named = {folder for _, folder, _ in run_processes()}
        left = [folder for folder in left if str(folder) not in named]
    ports = {_port(folder) for folder in left} - {_port(folder) for folder in folders if folder not in left} - {""}
    for port in ports:  # first: a folder that stays keeps its port known
        _remove_buffers(buffers_of(port, shared_memory))
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)


def _is_own(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    return False


def _launcher_has_ended(folder: Path) -> bool:
    """False if it is not known, as on another machine that shares the folder."""
    try:
        return has_ended(ProcessId(*json.loads((folder / OWNER).read_text())))
    except (OSError, ValueError, TypeError):
        return False


def run_processes() -> Iterator[tuple[int, str, frozenset[bytes]]]:
    """(pid, folder of its run, environment) of each process of this user that belongs to a run on this machine."""
    prefix = f"{MARK}=".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = frozenset(file.read_bytes().split(b"\0"))
            for word in words:
                if word.startswith(prefix):
                    yield int(file.parent.name), os.fsdecode(word.removeprefix(prefix)), words


def buffers_of(port: str, shared_memory: Path = SHARED_MEMORY) -> Iterator[Path]:
    """DeepSpeed's buffers of this user's ranks that met at `port`."""
    return shared_memory.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*")


def _port(folder: Path) -> str:
    """The port of a run whose ranks are all on this machine; empty for others, whose port another run may use."""
    with contextlib.suppress(OSError):
        return (folder / "port").read_text()
    return ""


def _remove_buffers(buffers: Iterable[Path]) -> None:
    """Remove those that no process maps: a later run without a launcher may use the same port."""
    if buffers := list(buffers):
        mapped = set(_mapped())
        for buffer in buffers:
            if str(buffer) not in mapped:
                with contextlib.suppress(OSError):
                    buffer.unlink()


def _mapped() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            yield from (line.split(maxsplit=5)[5] for line in file.read_text().splitlines() if "deepspeed_" in line)
