"""Ranks that differ, or don't share the output folder, are told so before models load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import one_rank, sft_config
from tristage import dist, preflight
from tristage.errors import UserError

NAMES = ("python", "torch", "deepspeed", "transformers", "code of tristage", "device")


def _check(rank: int, folder: str) -> list[str]:
    """What this rank says in turn: all agree, for each name rank 1's fact differs, the output is not shared."""
    device = dist.init("cpu")
    facts = preflight._facts(device) | {"node": f"node-{rank}"}
    preflight.SECONDS_TO_SEE = 0.5
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
    assert {"engine.py", "train.py"} <= {file.name for file in files}
    monkeypatch.setattr(preflight, "source_files", lambda: files[1:])
    assert preflight.source_hash() != before
