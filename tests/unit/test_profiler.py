"""Steps named by `profile` run under torch's profiler, and leave a trace and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tristage.config import load_config
from tristage.errors import UserError
from tristage.training.metrics import Stopwatch
from tristage.training.profiler import profiled


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("profile")
    settings = tiny.sft_config(folder, str(folder / "model"), str(folder / "rows.jsonl"))
    return lambda *words: load_config(type(settings), ["--config", str(folder / "sft.yaml"), *words])


def work(step: int, watch: Stopwatch) -> None:
    with watch("step"):
        torch.ones(8, 8).matmul(torch.ones(8, 8))


def test_the_steps_asked_for_are_profiled_and_no_others(config: Any, tmp_path: Path) -> None:
    settings, watch = config(f"output={tmp_path}", "profile=2..3"), Stopwatch(torch.device("cpu"))
    done = []
    for step in profiled(range(1, 6), settings):
        work(step, watch)
        done.append(step)
    assert done == [1, 2, 3, 4, 5]
    table = {row["name"]: row for row in json.loads((tmp_path / "profile/table.json").read_text())}
    assert table["aten::mm"]["calls"] == 2 and table["step"]["calls"] == 2
    assert table["aten::mm"]["self_seconds"] > 0 and table["aten::mm"]["device_seconds"] == 0
    trace = json.loads((tmp_path / "profile/trace_rank0.json").read_text())
    assert [event.get("name") for event in trace["traceEvents"]].count("aten::mm") == 2


def test_a_run_that_ends_first_writes_what_it_has(config: Any, tmp_path: Path) -> None:
    for step in profiled(range(1, 3), config(f"output={tmp_path}", "profile=2..9")):
        work(step, Stopwatch(torch.device("cpu")))
    assert (tmp_path / "profile/table.json").is_file()


def test_without_the_setting_nothing_is_written(config: Any, tmp_path: Path) -> None:
    assert list(profiled(range(3), config(f"output={tmp_path}"))) == [0, 1, 2]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("value", ("10", "0..3", "3-5", "a..b"))
def test_a_range_that_is_none_is_refused(config: Any, value: str) -> None:
    with pytest.raises(UserError, match="profile"):
        config(f"profile={value}")


def test_a_range_that_ends_before_it_begins_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match="`profile`: 5..3 ends before it begins"):
        config("profile=5..3")
