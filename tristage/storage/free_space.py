"""What is free on this machine: memory of the host and of a rank's device, and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Controllers of a line in it -> the files with the limit and the use, and the key of cached files in memory.stat.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_on_host() -> int:
    """Free bytes of memory of this node, within the limits of this process's container or batch job."""
    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups()]))


def _left_in_cgroups() -> Iterator[int]:
    """For each limit on this process or a group around it: the bytes left, counting cached files as free."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in CGROUP_FILES:
            continue
        home, limit, used, cached = CGROUPS / controllers, *CGROUP_FILES[controllers]
        inner = home / path.strip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(home))):
            try:
                most, now = (folder / limit).read_text(), int((folder / used).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most.strip() != "max":
                yield int(most) - now + int(stat.get(cached, 0))


def free_for_rank(device: torch.device, ranks: int | None = None) -> int:
    """Free bytes for this rank: its GPU's, or its share of host memory (`ranks` per node, default: as launched)."""
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused_by_torch)
    return free_on_host() // (ranks or ranks_here())


def ranks_here() -> int:
    """How many ranks this node has: deepspeed's launcher and torchrun name it differently."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def next_existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_on_disk(folder: Path) -> int:
    """Bytes free on the disk that holds, or will hold, `folder`."""
    return shutil.disk_usage(next_existing(folder)).free
