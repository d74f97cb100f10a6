"""Trackers never end or stall a run, whatever they do; tests/trackers/ has the real ones."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tristage.errors import UserError
from tristage.training import trackers as module
from tristage.training.metrics import RunLog
from tristage.training.trackers import Trackers, check_trackers


class Recorder:
    """A tracker that remembers."""

    seen: list[Any] = []

    def __init__(self, name: str, id: str, config: dict[str, Any], output: Path) -> None:
        self.seen.append((name, id, config))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.seen.append((step, numbers))

    def close(self) -> None:
        self.seen.append("closed")


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kinds: dict[str, Any] = {"good": type("Good", (Recorder,), {"seen": []})}
    monkeypatch.setattr(module, "KINDS", kinds)
    return kinds


def run(output: Path, *names: str) -> None:
    output.mkdir(exist_ok=True)
    with RunLog(output, "sft", 9, 0, trackers=Trackers(names, output, {"seed": 1})) as log:
        log.write(0, "heldout", {"sft/loss": 3.0})
        log.write(1, "train", {"sft/loss": 2.0, "sft/bad": float("inf")})


def test_every_line_arrives_in_order_and_the_same_run_goes_on(tmp_path: Path, kinds: dict[str, Any]) -> None:
    run(tmp_path / "out", "good")
    run(tmp_path / "out", "good")
    seen = kinds["good"].seen
    opened = (f"{tmp_path.name}/out", json.loads((tmp_path / "out/trackers.json").read_text())["id"], {"seed": 1})
    once = [opened, (0, {"heldout/sft/loss": 3.0}), (1, {"sft/loss": 2.0}), "closed"]
    assert seen == [*once, *once]


@pytest.mark.parametrize("method", ("__init__", "write", "close"))
def test_one_that_fails_is_a_warning_and_the_others_go_on(
    tmp_path: Path, kinds: dict[str, Any], method: str, capsys: Any
) -> None:
    def fails(*arguments: Any) -> None:
        raise SystemExit("no\nnetwork")

    kinds["broken"] = type("Broken", (Recorder,), {method: fails, "seen": []})
    run(tmp_path / "out", "broken", "good")
    assert kinds["good"].seen[-1] == "closed"
    printed = capsys.readouterr().out
    assert printed.count("warning: tracker broken failed (SystemExit: no network); nothing more goes to it") == 1


@pytest.mark.parametrize("method", ("__init__", "write", "close"))
def test_one_that_hangs_does_not_stall_the_run(
    tmp_path: Path, kinds: dict[str, Any], method: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.3)
    ends = threading.Event()
    kinds["slow"] = type("Slow", (Recorder,), {method: lambda *arguments: ends.wait(), "seen": []})
    begun = time.monotonic()
    run(tmp_path / "out", "slow", "good")
    assert time.monotonic() - begun < 5 and kinds["good"].seen[-1] == "closed"
    assert "warning: tracker slow did not end within 0.3 s" in capsys.readouterr().out
    ends.set()


def test_one_that_is_too_far_behind_is_given_up(
    tmp_path: Path, kinds: dict[str, Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING", 5)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.2)
    ends = threading.Event()
    kinds["slow"] = type("Slow", (Recorder,), {"write": lambda *arguments: ends.wait(), "seen": []})
    with Trackers(["slow"], tmp_path, {}) as trackers:
        for step in range(50):
            trackers.write(step, "train", {"a": 1.0})
    assert capsys.readouterr().out.count("warning: tracker slow is 5 lines behind") == 1
    ends.set()


def test_a_library_that_is_not_there_is_one_sentence_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"my.yaml: key `trackers`: wandb is not installed: pip install 'trist"):
        check_trackers(["wandb"], "my.yaml")
    check_trackers([], "my.yaml")


def test_names_that_mlflow_refuses_are_changed() -> None:
    assert module._mlflow_name("eval/acc,none@5") == "eval/acc_none_5"
