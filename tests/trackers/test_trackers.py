"""Real trackers, offline: what a run writes can be read back from each, and a resumed run goes on in the same run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import REPO

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
ENV = Path(os.environ.get("TRISTAGE_TRACKERS_ENV", CACHE / "tristage/trackers"))
pytestmark = pytest.mark.skipif(
    not (ENV / "complete").is_file(), reason=f"no environment with trackers in {ENV}: bash tests/trackers/install.sh"
)


def record(*words: str) -> str:
    command = [str(ENV / "bin/python"), "-m", "tests.trackers.record", *words]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "warning: tracker" not in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ("wandb", "mlflow", "trackio"))
def test_what_is_written_can_be_read_back_and_a_resumed_run_goes_on(name: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    record(name, str(output), "write", "1", "2")
    record(name, str(output), "write", "3", "3")
    found: list[list[Any]] = json.loads(record(name, str(output), "read").splitlines()[-1])
    train = sorted([step, value] for step, metric, value in found if metric == "objective/score")
    assert train == [[1, 0.5], [2, 1.0], [3, 1.5]]
    assert sorted([step, value] for step, metric, value in found if metric == "heldout/objective/score") == [
        [2, 0.25],
        [3, 0.25],
    ]
    assert not any(metric == "policy/loss" for _, metric, _ in found)  # it was not finite
