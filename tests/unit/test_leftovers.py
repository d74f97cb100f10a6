"""A start removes what runs that are gone left, and nothing of runs that live, of others, or of other machines."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from tristage.launch import leftovers
from tristage.machine.processes import ProcessId, own_id

GONE = own_id()._replace(started=own_id().started - 1)  # its number has been given to another process: this one


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("temporary", "shared"):
        (tmp_path / name).mkdir()


def left_by(folder: Path, name: str, port: str, launcher: ProcessId | None = GONE) -> tuple[Path, Path]:
    """The folder of a run and the buffer of its rank 1."""
    mark = folder / f"temporary/tristage.{name}"
    mark.mkdir()
    (mark / "port").write_text(port)
    if launcher is not None:
        (mark / "launcher").write_text(json.dumps(launcher))
    buffer = folder / f"shared/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_1"
    buffer.write_bytes(b"x" * 4096)
    return mark, buffer


def remove(folder: Path) -> None:
    leftovers.remove(folder / "temporary", folder / "shared")


def test_the_folder_and_the_buffers_of_a_run_that_is_gone_are_removed(tmp_path: Path) -> None:
    mark, buffer = left_by(tmp_path, "gone", "40001")
    others = [tmp_path / "shared" / buffer.name.replace(f"_{os.getuid()}_", f"_{os.getuid() + 1}_")]
    others += [buffer.with_name(buffer.name.replace("_40001_", "_40002_")), tmp_path / "temporary/other"]
    for other in others:
        other.touch()
    remove(tmp_path)
    assert not mark.exists() and not buffer.exists() and all(other.exists() for other in others)


@pytest.mark.parametrize("launcher", [own_id(), GONE._replace(machine="elsewhere"), None])
def test_a_run_whose_launcher_lives_or_cannot_be_seen_is_left_alone(tmp_path: Path, launcher: ProcessId | None) -> None:
    """None: a launcher that has not come so far."""
    kept = left_by(tmp_path, "live", "40001", launcher)
    remove(tmp_path)
    assert all(path.exists() for path in kept)


def test_a_run_whose_launcher_is_gone_and_whose_rank_lives_is_left_alone(tmp_path: Path) -> None:
    kept = left_by(tmp_path, "orphan", "40001")
    with subprocess.Popen(["sleep", "600"], env=os.environ | {"PYTHON_TRISTAGE_RUN": str(kept[0])}) as rank:
        remove(tmp_path)
        assert all(path.exists() for path in kept)
        rank.kill()
    remove(tmp_path)
    assert not any(path.exists() for path in kept)


def test_buffers_of_a_port_that_a_live_run_has_now_stay(tmp_path: Path) -> None:
    gone, _ = left_by(tmp_path, "gone", "40001")
    kept = left_by(tmp_path, "live", "40001", own_id())
    remove(tmp_path)
    assert not gone.exists() and all(path.exists() for path in kept)


def test_a_buffer_that_a_process_maps_stays(tmp_path: Path) -> None:
    """One of a run without our launcher, which has the port of one that is gone."""
    mark, buffer = left_by(tmp_path, "gone", "40001")
    with buffer.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        remove(tmp_path)
        assert buffer.exists() and not mark.exists()


def test_the_folder_of_another_user_stays(tmp_path: Path) -> None:
    mark, buffer = left_by(tmp_path, "gone", "40001")
    with mock.patch.object(os, "getuid", return_value=os.getuid() + 1):
        remove(tmp_path)
    assert mark.exists() and buffer.exists()


def test_a_launcher_signs_its_folder(tmp_path: Path) -> None:
    leftovers.sign(tmp_path, os.getpid())
    assert ProcessId(*json.loads((tmp_path / "launcher").read_text())) == own_id()
