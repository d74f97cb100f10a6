"""Ranks that differ, or don't share the output folder, are told so before models load."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import one_rank, sft_config, write_model
from tristage import dist
from tristage.dist import joining
from tristage.errors import UserError
from tristage.machine.arrival import free_port
from tristage.planning.formulas import GIB, Machine
from tristage.planning.plan import SHIPPED, engines_of, make_plan
from tristage.storage import free_space
from tristage.training import preflight

NAMES = ("python", "torch", "deepspeed", "transformers", "code of tristage", "device")


def _check(rank: int, folder: str) -> list[str]:
    """What this rank says in turn: all agree, for each name rank 1's fact differs, the output is not shared."""
    device = dist.init("cpu")
    facts = preflight._facts(device) | {"node": f"node-{rank}"}
    preflight.FILE_VISIBLE_SECONDS = 0.5
    told = []
    for differs, elsewhere in [({}, False), *(({name: "0.1"}, False) for name in NAMES), ({}, True)]:
        preflight._facts = lambda _, differs=differs: facts | (differs if rank == 1 else {})
        settings = sft_config(Path(folder) / (f"rank_{rank}" if elsewhere else "both"), "m", "r")
        try:
            preflight.check(settings, device)
            told.append("fine")
        except UserError as error:
            told.append(str(error))
    dist.shutdown()
    return told


def test_ranks_that_differ_are_named_on_every_rank(tmp_path):
    first, second = run_ranks(2, _check, str(tmp_path))
    assert first[:-1] == second[:-1]
    fine, *differ, not_shared = first
    assert fine == "fine"
    for name, told in zip(NAMES, differ, strict=True):
        assert told.startswith(f"rank 1 on node-1 has {name} 0.1, rank 0 on node-0 has ")
    assert "on node-1 is not the folder that rank 0 on node-0 writes" in not_shared
    assert not list(tmp_path.rglob(".shared_*"))


def _join(rank: int, ports: list[str]) -> tuple[list[str], float]:
    """In turn rank 0 and rank 1 sees a GPU, then rank 1 never joins: (what this rank is told, in how many seconds)."""
    told, started = [], time.monotonic()
    joining.SECONDS_TO_NAME_MISSING = 0.2
    for odd, port in enumerate(ports):
        os.environ["MASTER_PORT"] = port
        joining.uses_gpu = lambda _, odd=odd: rank == odd
        try:
            if odd < 2 or rank == 0:
                dist.init(timeout_seconds=20 if odd < 2 else 1)
            told.append("joined, or absent")
        except UserError as error:
            told.append(str(error))
    return told, time.monotonic() - started


def test_ranks_that_send_with_different_backends_or_never_join_are_named_at_once(capfd):
    (first, seconds), (second, _) = run_ranks(2, _join, [free_port() for _ in range(3)])
    assert first[:2] == second[:2]
    for told, backends in zip(first, (("gloo", "nccl"), ("nccl", "gloo")), strict=False):
        assert re.match(rf"rank 1 on \S+ would use backend {backends[0]}, rank 0 on \S+ {backends[1]}: ", told)
    assert first[2].startswith("rank 1 did not join; see what")
    assert "waiting for rank 1 to join" in capfd.readouterr().out
    assert seconds < 15  # and not the timeout


def test_a_rank_that_cannot_reach_rank_0_names_the_address(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setattr(joining.torch_dist, "is_initialized", lambda: False)  # of tests before
    with pytest.raises(UserError, match="cannot reach rank 0 at 127.0.0.1:"):
        dist.init("cpu", timeout_seconds=1)


def test_an_output_folder_without_room_or_rights_is_named(tmp_path, monkeypatch):
    (tmp_path / "sft").write_text("a file")
    settings = sft_config(tmp_path, "m", "r")
    with one_rank() as device:
        with pytest.raises(UserError, match="cannot be written"):
            preflight.check(settings, device)
        (tmp_path / "sft").unlink()
        monkeypatch.setattr(preflight, "DISK", 2**60)
        with pytest.raises(UserError, match="MiB of disk left"):
            preflight.check(settings, device)


def test_the_hash_is_of_the_code(tmp_path, monkeypatch):
    before = preflight.source_hash()
    assert before == preflight.source_hash()
    files = [*preflight.source_files()]
    assert {"engines.py", "train.py"} <= {file.name for file in files}
    monkeypatch.setattr(preflight, "source_files", lambda: files[1:])
    assert preflight.source_hash() != before


def _check_memory(rank: int, folder: str, model: str) -> list[str]:
    """What is raised when rank 1 has memory for the run, for weights and optimizer alone, and for nothing."""
    device = dist.init("cpu")
    settings = sft_config(Path(folder), model, "r")
    machine = Machine(2, 2, GIB, GIB, cpu=True)
    plan = make_plan(settings, engines_of(settings, machine), machine)
    facts = preflight._facts(device) | {"node": f"node-{rank}"}
    told = []
    for free in (plan.gpu_bytes, plan.kept_bytes, 1000.0):
        preflight._facts = lambda _, free=free: facts | {"memory": (free if rank == 1 else GIB, GIB)}
        try:
            preflight.check(settings, device)
            told.append("goes on")
        except UserError as error:
            told.append(str(error))
    return told


def test_a_rank_without_memory_for_its_weights_is_named_and_one_with_little_warned_of(tmp_path, capfd):
    model = write_model(tmp_path / "model")
    first, second = run_ranks(2, _check_memory, str(tmp_path), model)
    assert first == second and first[:2] == ["goes on", "goes on"]
    assert "rank 1 on node-1 has 9.31e-07 GiB of memory left for a process, and its weights and optim" in first[2]
    assert capfd.readouterr().out.count("warning: rank 1 on node-1 has") == 1


def test_a_run_that_cannot_be_planned_is_not_kept_from_starting(tmp_path, capsys):
    with one_rank() as device:
        preflight.check(sft_config(tmp_path, "./no_model", "r"), device)
    assert "memory was not compared with the plan: " in capsys.readouterr().out


def test_what_is_offloaded_must_fit_into_the_node(tmp_path):
    offload = f"deepspeed={SHIPPED / 'zero3_offload.json'}"
    settings = sft_config(tmp_path, write_model(tmp_path / "model"), "r", 3, offload)
    fact = {"node": "a", "ranks here": 1, "memory": (80 * GIB, 1000)}
    problem = preflight.memory_problem(settings, torch.device("cuda"), [fact])
    assert problem.stops and "for all processes of its node" in problem.sentence
    assert preflight.memory_problem(settings, torch.device("cuda"), [fact | {"memory": (80 * GIB, 80 * GIB)}]) is None


def test_a_containers_limit_counts_and_cached_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(free_space, "CGROUPS", tmp_path)
    monkeypatch.setattr(free_space, "OWN_CGROUPS", tmp_path / "own")
    machines = psutil.virtual_memory().available
    assert free_space.free_on_host() <= machines  # no such file

    def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {used}\n{names[2]} {cached}\n")

    (tmp_path / "own").write_text("4:memory:/job/step\n0::/job/step\n3:cpuset:/x\n")
    new, old = free_space.CGROUP_FILES[""], free_space.CGROUP_FILES["memory"]
    group(tmp_path / "job" / "step", new, "max\n", 600, 0)
    group(tmp_path / "job", new, "1000\n", 700, 200)
    assert free_space.free_on_host() == 500
    group(tmp_path / "memory" / "job" / "step", old, "900\n", 700, 100)
    assert free_space.free_on_host() == 300
