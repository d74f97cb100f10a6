"""`tristage doctor [CONFIG]`: check this machine, and optionally a config, for what would stop a run."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from tristage import dist
from tristage.config import RunSettings, SourceSettings, named_paths
from tristage.data.sources import require_exists, resolve_preset
from tristage.data.store import cache_folder
from tristage.dist import gpu
from tristage.errors import UserError
from tristage.launch.check_config import check_path
from tristage.models.loading import check_model
from tristage.planning.formulas import GIB
from tristage.storage.free_space import free_for_rank, free_on_disk, free_on_host, next_existing
from tristage.training.preflight import installed, memory_problem

ROOT = Path(__file__).parents[2]
MAIN_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "pydantic", "safetensors")
SHARED_MEMORY = Path("/dev/shm")


class Finding(NamedTuple):
    """One line: level ("stop": a run would not start or would fail), observation, fix."""

    level: Literal["ok", "note", "stop"]
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what}" + (f": {self.fix}" if self.fix else "")


def examine(settings: RunSettings | None, ranks: int) -> Iterator[Finding]:
    """All findings, in the order in which a run would meet them; `ranks`: the number on this machine."""
    yield from packages()
    yield from devices()
    yield from compiled_op(extensions_folder())
    yield from locks(extensions_folder())
    yield from shared_memory(SHARED_MEMORY, ranks)
    yield from several_nodes()
    yield room("memory", free_on_host(), 2 * GIB, "end what uses it")
    yield disk("tokenised data", cache_folder(settings.data.cache if settings else None))
    if settings is not None:
        yield from config(settings, ranks)


def packages(constraints: Path = ROOT / "constraints.txt") -> Iterator[Finding]:
    """Python and the main packages, compared with the versions that the tests passed with."""
    yield Finding("ok", f"python {platform.python_version()} ({sys.executable})")
    tested = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", constraints.read_text(), re.M)) if constraints.is_file() else {}
    for package in MAIN_PACKAGES:
        own, wanted = installed(package), tested.get(package)
        if own == "not installed":
            yield Finding("stop", f"{package} is not installed", "pip install -c constraints.txt -e .")
        elif wanted and own.partition("+")[0] != wanted:
            yield Finding("note", f"{package} {own}", f"the tests passed with {wanted}")
        else:
            yield Finding("ok", f"{package} {own}")


def devices() -> Iterator[Finding]:
    """The devices, communication backend and attention kernels of ranks."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        yield Finding("ok", f"{psutil.cpu_count(logical=False)} CPU cores, no GPU; ranks use gloo")
        if os.environ.get("DS_ACCELERATOR") != "cpu" and (problem := gpu.problem()):
            yield Finding("note", problem)
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if len(set(names)) > 1:
        yield Finding("note", f"GPUs of several kinds: {', '.join(names)}", "the slowest sets the pace; see --include")
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, NCCL {version}")
    flash = torch.backends.cuda.is_flash_attention_available()
    yield Finding("ok" if flash else "note", "attention: torch's " + ("flash kernel" if flash else "slow kernels"))


def default_ranks() -> int:
    """One per GPU, or two on the CPU, like the launchers."""
    return torch.cuda.device_count() if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else 2


def extensions_folder() -> Path:
    """The folder of DeepSpeed's compiled ops, as in launch/common.sh."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))


def compiled_op(folder: Path) -> Iterator[Finding]:
    """Whether the ops that DeepSpeed compiles on first use exist, or can be compiled."""
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool, path=_path())]
    if torch.cuda.is_available():
        if missing or not shutil.which("nvcc"):
            yield Finding("note", f"no {', '.join([*missing, 'nvcc'])}", "only needed for optimizer offload")
        return
    if missing:
        fix = "apt-get install g++" if "g++" in missing else "pip install ninja"
        yield Finding("stop", f"DeepSpeed's CPU op cannot be compiled or loaded without {', '.join(missing)}", fix)
    elif not list(folder.rglob("deepspeed_shm_comm.so")):
        yield Finding("note", f"DeepSpeed's CPU op is not in {folder}", "the first launch compiles it in a minute")
    else:
        probe = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)"
        variables = os.environ | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder), "PATH": _path()}
        try:
            done = subprocess.run([sys.executable, "-c", probe], env=variables, capture_output=True, timeout=120)
            loads = done.returncode == 0
        except subprocess.TimeoutExpired:
            loads = False
        fix = "" if loads else f"remove {folder}; the next launch compiles it again"
        yield Finding("ok" if loads else "stop", f"DeepSpeed's CPU op {'loads' if loads else 'does not load'}", fix)


def _path() -> str:
    return os.path.dirname(sys.executable) + ":" + os.environ.get("PATH", "")


def locks(folder: Path, minutes: float = 5) -> Iterator[Finding]:
    """Stale build locks, on which every later run would hang."""
    for lock in sorted(folder.rglob("lock")) if folder.is_dir() else []:
        if time.time() - lock.stat().st_mtime > 60 * minutes:
            yield Finding("stop", f"{lock} was left by a killed build", f"rm {lock}, or start any launcher")


def shared_memory(folder: Path, ranks: int) -> Iterator[Finding]:
    """Room for the buffers of this node's ranks, and those that killed runs left."""
    if not folder.is_dir():
        return
    in_use = {path for process in psutil.process_iter() for path in _mapped(process, folder)}
    left = [path for path in sorted(folder.glob("deepspeed_allreduce_buffer_*")) if str(path) not in in_use]
    if left:
        size = sum(path.stat().st_size for path in left) / 2**20
        fix = f"rm {folder}/deepspeed_allreduce_buffer_* when nothing runs"
        yield Finding("note", f"{len(left)} buffers of killed runs in {folder}, {size:.0f} MiB", fix)
    need = (66 * ranks + 64) * 2**20  # DeepSpeed's buffer of a rank on CPUs; NCCL takes less
    yield room(f"shared memory ({folder})", shutil.disk_usage(folder).free, need, "docker: --shm-size=16g")


def _mapped(process: psutil.Process, folder: Path) -> list[str]:
    try:
        return [item.path for item in process.memory_maps(grouped=True) if item.path.startswith(str(folder))]
    except (psutil.Error, OSError):
        return []


def several_nodes() -> Iterator[Finding]:
    """The programs that --hostfile needs."""
    missing = [tool for tool in ("ssh", "pdsh") if not shutil.which(tool)]
    if missing:
        fix = "only needed for --hostfile: apt-get install pdsh openssh-client"
        yield Finding("note", f"no {', '.join(missing)}", fix)


def room(what: str, free: int, need: int, fix: str) -> Finding:
    """Whether `free` bytes are at least the `need` bytes."""
    fact = f"{what}: {free / GIB:.1f} GiB free"
    return Finding("ok", fact) if free >= need else Finding("stop", f"{fact}, {need / GIB:.1f} needed", fix)


def disk(what: str, folder: Path) -> Finding:
    """A finding about the disk that will hold `folder`, which need not exist yet."""
    existing = next_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("stop", f"{what}: {folder} cannot be written", "choose another folder")
    return room(f"disk for {what} ({folder})", free_on_disk(existing), GIB, "make room or choose another folder")


def config(settings: RunSettings, ranks: int) -> Iterator[Finding]:
    """Check what a config names: batches, DeepSpeed JSONs, models, data, output."""
    try:
        yield Finding("ok", f"batches: {settings.plan(ranks)}")
    except UserError as error:
        yield Finding("stop", str(error))
    for key, value in named_paths(settings):
        try:
            check_path(settings, key, value)
            if Path(value).is_dir():
                _check_folder(settings, key)
            yield Finding("ok", f"{key}: {value}")
        except UserError as error:
            yield Finding("stop", str(error))
    for source in (*settings.data.train, *settings.data.heldout):
        yield _source(source, settings)
    yield disk("the run", Path(settings.output))
    yield from memory(settings, ranks)


def _check_folder(settings: RunSettings, key: str) -> None:
    """The model folder that `key` names must hold what its engines start from. Raises UserError."""
    for spec in settings.engine_specs():
        if spec.path_key == key:
            check_model(spec.path, spec.positions, spec.holds, spec.trust_remote_code)


def memory(settings: RunSettings, ranks: int) -> Iterator[Finding]:
    """Compare the run's memory plan with the memory that is free here; nothing if its models cannot be read."""
    device = torch.device("cuda" if dist.uses_gpu(settings.device) else "cpu")
    here = min(ranks, torch.cuda.device_count()) if device.type == "cuda" else ranks
    free = free_for_rank(device, here)
    fact = {"node": platform.node(), "ranks here": here, "memory": (free, free_on_host())}
    with contextlib.suppress(UserError, AttributeError):
        problem = memory_problem(settings, device, [fact] * ranks)
        if problem is None:
            yield Finding("ok", f"memory: {free / GIB:.1f} GiB free for each rank, enough by the plan")
        else:
            yield Finding("stop" if problem.stops else "note", problem.sentence)


def _source(source: SourceSettings, settings: RunSettings) -> Finding:
    try:
        source = resolve_preset(source, settings)
        require_exists(source)
    except UserError as error:
        return Finding("stop", f"data: {error}")
    path = str(source.path)
    if os.path.exists(path):
        if os.access(path, os.R_OK):
            return Finding("ok", f"data: {path}")
        return Finding("stop", f"data: {path} cannot be read", "make it readable for this user")
    return Finding("note", f"data: {path}: not a local path; treated as a hub id", "`tristage data check` reads it")
