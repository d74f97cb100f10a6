"""Checks that all ranks agree (versions, device, code, output folder), after joining and before models load.

One gather of a few facts per rank, and one small file in the output folder: milliseconds on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tristage import dist
from tristage.config import RunSettings
from tristage.errors import UserError
from tristage.planning.formulas import GIB, Machine
from tristage.planning.plan import engines_of, make_plan
from tristage.storage.free_space import free_for_rank, free_on_disk, free_on_host, ranks_here

# What must agree, as messages name it -> the fix.
MUST_AGREE = {
    "python": "install the same on both",
    "torch": "install the versions of constraints.txt on both",
    "deepspeed": "install the versions of constraints.txt on both",
    "transformers": "install the versions of constraints.txt on both",
    "code of tristage": "give both the same copy",
    "device": "leave out the node that differs (--exclude)",
}
FILE_VISIBLE_SECONDS = 10.0  # network file systems show a new file late
DISK = 2**30  # bytes below which not even a tiny model can be written


def check(settings: RunSettings, device: torch.device) -> None:
    """A collective. Raises UserError on every rank, naming the node that differs from rank 0's or lacks something."""
    facts = dist.gather_objects(_facts(device))
    for rank, fact in enumerate(facts):
        for name, fix in MUST_AGREE.items():
            if fact[name] != facts[0][name]:
                raise UserError(
                    f"rank {rank} on {fact['node']} has {name} {fact[name]}, rank 0 on {facts[0]['node']} has "
                    f"{facts[0][name]}; {fix}"
                )
    _check_output(settings, [fact["node"] for fact in facts])
    _check_memory(settings, device, facts)
    nodes = list(dict.fromkeys(fact["node"] for fact in facts))
    if len(nodes) > 1:
        dist.print0(f"{len(facts)} ranks on {len(nodes)} nodes: {', '.join(nodes)}")


def _facts(device: torch.device) -> dict[str, Any]:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: installed(name) for name in ("torch", "deepspeed", "transformers")}
    return {"node": platform.node(), "python": platform.python_version(), "device": kind, **versions} | {
        "code of tristage": source_hash(),
        "memory": (free_for_rank(device), free_on_host()),
        "ranks here": ranks_here(),
    }


def installed(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def source_files() -> Iterator[Path]:
    """The Python files of tristage and of the steps next to it."""
    home = Path(__file__).parents[1]
    for folder in (home, *sorted(home.parent.glob("step[0-9]_*"))):
        yield from sorted(folder.rglob("*.py"))


def source_hash() -> str:
    """Short hash of the code of this copy."""
    digest = hashlib.sha256()
    for file in source_files():
        digest.update(str(file.relative_to(Path(__file__).parents[2])).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _check_output(settings: RunSettings, nodes: list[str]) -> None:
    """Rank 0 writes a file with a unique name; every rank must see it in its output folder."""
    folder = Path(settings.output) / "logs"
    name = dist.gather_objects(f".shared_{uuid.uuid4().hex}")[0]
    problem = None
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            if (free := free_on_disk(folder)) < DISK:
                problem = f"has {free / 2**20:.0f} MiB of disk left; make room or choose another `output`"
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); choose another `output`"
    dist.barrier()
    until = time.monotonic() + FILE_VISIBLE_SECONDS
    while problem is None and not (seen := _is_seen(folder, name)) and time.monotonic() < until:
        time.sleep(0.2)
    if problem is None and not seen:
        problem = f"is not the folder that rank 0 on {nodes[0]} writes; put it on a disk that all nodes share"
    problems = dist.gather_objects(problem)
    if dist.is_main():
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for node, each in zip(nodes, problems, strict=True):
        if each:
            raise UserError(f"{settings.file}: key `output`: {settings.output} on {node} {each}")


def _is_seen(folder: Path, name: str) -> bool:
    """Lists the folder: network file systems cache for a while that a name did not exist."""
    return folder.is_dir() and any(path.name == name for path in folder.iterdir())


class MemoryProblem(NamedTuple):
    """Memory that a run lacks, in a sentence."""

    stops: bool  # weights and optimizer alone don't fit
    sentence: str


def _check_memory(settings: RunSettings, device: torch.device, facts: list[dict[str, Any]]) -> None:
    """Refuse what cannot fit by its weights and optimizer alone, and warn if the full plan does not fit."""
    own = None
    if dist.is_main():
        try:
            own = memory_problem(settings, device, facts)
        except Exception as error:  # only an estimate; the run may support a model family that the plan does not
            dist.print0(f"memory was not compared with the plan: {error}")
    problem = dist.gather_objects(own)[0]
    if problem is not None and problem.stops:
        raise UserError(f"{settings.file}: {problem.sentence}")
    if problem is not None:
        dist.print0(f"warning: {problem.sentence}")


def memory_problem(settings: RunSettings, device: torch.device, facts: list[dict[str, Any]]) -> MemoryProblem | None:
    """The first rank or node with less memory than the plan needs; before it, one that cannot even start.

    Args:
        facts: of each rank "node", "ranks here" (of its node) and "memory": bytes free for it, and on its node.

    Raises:
        UserError: as `plan.engines_of`.
    """
    on_cpu = device.type == "cpu"
    rank_memory, host_memory = facts[0]["memory"]
    machine = Machine(len(facts), facts[0]["ranks here"], rank_memory, host_memory, on_cpu)
    plan = make_plan(settings, engines_of(settings, machine), machine)
    needs = [(plan.kept_bytes, plan.gpu_bytes, "a process" if on_cpu else "its GPU")]
    if not on_cpu:
        needs.append((plan.host["offloaded"], plan.host_bytes, "all processes of its node"))
    for stops in (True, False):
        for rank, fact in enumerate(facts):
            for (kept, peak, place), free in zip(needs, fact["memory"], strict=False):
                if (kept if stops else peak) > free:
                    need = f"its weights and optimizer take {_gib(kept)}" if stops else f"the run may take {_gib(peak)}"
                    return MemoryProblem(
                        stops,
                        f"rank {rank} on {fact['node']} has {_gib(free)} GiB of memory left for {place}, and {need}; "
                        f"free memory on that machine, or see what fits: tristage plan {settings.file}",
                    )
    return None


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
