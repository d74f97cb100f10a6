"""`tristage doctor` finds what would stop a run, says what to do, and says so in its exit code."""

from __future__ import annotations

import mmap
import os
import time

import pytest

from tests.helpers.tiny import sft_config, write_model, write_rows
from tristage.cli import doctor
from tristage.cli import main as cli
from tristage.planning.formulas import GIB, Machine
from tristage.planning.plan import engines_of, make_plan
from tristage.storage import free_space

CPU = Machine(2, 2, GIB, GIB, cpu=True)


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_a_machine_and_a_config_that_are_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "compiled_op", lambda folder: iter(()))  # its own test; here it may be being built
    monkeypatch.setattr(doctor, "locks", lambda folder: iter(()))
    sft_config(tmp_path, write_model(tmp_path / "model"), write_rows(tmp_path / "rows")["sft"])
    assert cli.main(["doctor", str(tmp_path / "sft.yaml"), "--step", "step1_sft", "--ranks", "4"]) == 0
    told = capsys.readouterr().out
    assert "nothing would stop a run" in told and "8 rows per step = micro-batch 2 x accumulation 1 x ranks 4" in told
    assert f"model: {tmp_path}/model" in told and "torch 2" in told


def test_what_a_config_names_and_is_not_there_stops_a_run(tmp_path, capsys):
    sft_config(tmp_path, "./none", "none.jsonl")
    words = ["doctor", str(tmp_path / "sft.yaml"), "deepspeed=none.json", "--step", "step1_sft", "--ranks", "3"]
    assert cli.main(words) == 1
    stops = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stop")]
    for words in ("no folder ./none", "none.jsonl: there is no such file", "no file none.json", "8 rows don't divide"):
        assert any(words in line for line in stops), stops


def test_a_wrong_config_is_one_sentence(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "step1_sft.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err


def test_packages_are_held_against_the_constraints(tmp_path):
    (tmp_path / "constraints.txt").write_text('torch==0.1; python_version >= "3.11"\n')
    found = {finding.what.split()[0]: finding for finding in doctor.packages(tmp_path / "constraints.txt")}
    assert found["torch"].level == "note" and "0.1" in found["torch"].fix
    assert found["deepspeed"].level == "ok"


def test_a_missing_package_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "not installed")
    assert levels(doctor.packages(tmp_path / "none")) == ["ok"] + ["stop"] * len(doctor.MAIN_PACKAGES)


def test_only_old_locks_are_left_over(tmp_path):
    (tmp_path / "op").mkdir()
    (tmp_path / "op/lock").touch()
    assert list(doctor.locks(tmp_path)) == []
    os.utime(tmp_path / "op/lock", (time.time() - 600, time.time() - 600))
    (finding,) = doctor.locks(tmp_path)
    assert finding.level == "stop" and f"rm {tmp_path}/op/lock" in finding.fix


def test_buffers_of_killed_runs_are_told_from_those_in_use(tmp_path):
    (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_1_0").write_bytes(b"x" * 2**20)
    used = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_2_0"
    used.write_bytes(b"x" * 4096)
    with used.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        found = list(doctor.shared_memory(tmp_path, 2))
    assert [finding.what for finding in found if finding.level == "note"] == [
        f"1 buffers of killed runs in {tmp_path}, 1 MiB"
    ]


@pytest.mark.parametrize("free, level", [(1, "stop"), (3, "ok")])
def test_too_little_room_stops(free, level):
    finding = doctor.room("memory", free, 2, "buy some")
    assert (finding.level, bool(finding.fix)) == (level, level == "stop")


def test_a_folder_that_cannot_be_made_stops(tmp_path):
    (tmp_path / "file").touch()
    assert doctor.disk("the run", tmp_path / "file/out").level == "stop"
    assert doctor.disk("the run", tmp_path / "new/out").level == "ok"


def test_an_op_that_cannot_be_compiled_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert levels(doctor.compiled_op(tmp_path)) == ["note"]  # not there yet, can be
    monkeypatch.setattr(doctor, "_path", lambda: str(tmp_path))
    assert levels(doctor.compiled_op(tmp_path)) == ["stop"]


def test_a_run_that_does_not_fit_this_machine_stops_or_is_noted(tmp_path, monkeypatch):
    settings = sft_config(tmp_path, write_model(tmp_path / "model"), "r")
    needed = make_plan(settings, engines_of(settings, CPU), CPU)
    for free, level in ((8 * GIB, "ok"), (2 * needed.gpu_bytes - 2, "note"), (2 * needed.kept_bytes - 2, "stop")):
        for module in (doctor, free_space):
            monkeypatch.setattr(module, "free_on_host", lambda free=free: int(free))
        (finding,) = doctor.memory(settings, 2)
        assert finding.level == level and "memory" in finding.what
    (tmp_path / "model/config.json").unlink()
    assert list(doctor.memory(settings, 2)) == []
