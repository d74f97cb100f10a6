"""Ranks that differ, or don't share the output folder, are told so before models load."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import one_rank, sft_config
from tristage import dist, preflight
from tristage.errors import UserError


def _check(rank: int, folder: str, differs: dict[str, str], elsewhere: bool) -> str:
    """What rank says when rank 1's facts hold `differs`, or its output folder is another."""
    device = dist.init("cpu")
    facts = preflight._facts(device) | {"node": f"node-{rank}"}
    preflight._facts = lambda _: facts | (differs if rank == 1 else {})
    preflight.SECONDS_TO_SEE = 0.5
    settings = sft_config(Path(folder) / (f"rank_{rank}" if elsewhere else "both"), "m", "r")
    began = time.monotonic()
    try:
        preflight.check(settings, device)
    except UserError as error:
        return str(error)
    finally:
        dist.shutdown()
    assert time.monotonic() - began < 60
    return "fine"


def test_ranks_that_agree_go_on_and_leave_nothing(tmp_path):
    assert run_ranks(2, _check, str(tmp_path), {}, False) == ["fine", "fine"]
    assert list((tmp_path / "both/sft").rglob("*")) == [tmp_path / "both/sft/logs"]


@pytest.mark.parametrize("name", ["python", "torch", "deepspeed", "transformers", "code of tristage", "device"])
def test_a_node_that_differs_is_named_on_every_rank(tmp_path, name):
    told = run_ranks(2, _check, str(tmp_path), {name: "0.1"}, False)
    assert told[0] == told[1]
    assert told[0].startswith(f"rank 1 on node-1 has {name} 0.1, rank 0 on node-0 has ")


def test_an_output_folder_that_is_not_shared_is_named(tmp_path):
    told = run_ranks(2, _check, str(tmp_path), {}, True)
    assert told[0].split("key")[1] != "" and all("on node-1 is not the folder that rank 0 on node-0" in x for x in told)
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
