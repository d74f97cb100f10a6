"""Run in the trackers' own environment: writes a run's lines to one tracker offline, or reads them back.

    python -m tests.trackers.record TRACKER OUT write FIRST LAST       python -m tests.trackers.record TRACKER OUT read
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tristage.training.trackers import Trackers

WHERE = "tracked"


def offline(folder: Path) -> None:
    """No network: what each library's own variables say."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_PROJECT=WHERE)
    os.environ.update(MLFLOW_TRACKING_URI=(folder / "mlruns").as_uri(), MLFLOW_EXPERIMENT_NAME=WHERE)
    os.environ.update(MLFLOW_ALLOW_FILE_STORE="true", TRACKIO_DIR=str(folder / "trackio"), TRACKIO_PROJECT=WHERE)


def write(name: str, output: Path, first: int, last: int) -> None:
    with Trackers([name], output, {"seed": 7}) as trackers:
        for step in range(first, last + 1):
            trackers.write(step, "train", {"objective/score": 0.5 * step, "policy/loss": float("nan")})
        trackers.write(last, "heldout", {"objective/score": 0.25})


def read(name: str, output: Path) -> list[list[Any]]:
    """[step, metric, value] of everything that the tracker holds."""
    return {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}[name](output)


def read_wandb(output: Path) -> list[list[Any]]:
    from wandb.proto import wandb_internal_pb2

    found: list[list[Any]] = []
    for file in sorted(output.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            kept = {key: json.loads(value) for key, value in items.items() if "objective" in key or "policy" in key}
            found += [[json.loads(items["step"]), key, value] for key, value in kept.items()]
    return found


def records_of(data: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of chunks, each with a checksum, a length and a kind."""
    place, parts = header, b""  # the file has a header of its own
    while place + header <= len(data):
        if block - place % block < header:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_mlflow(output: Path) -> list[list[Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name(WHERE).experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED", runs
    names = runs[0].data.metrics
    return [[m.step, m.key, m.value] for name in names for m in client.get_metric_history(runs[0].info.run_id, name)]


def read_trackio(output: Path) -> list[list[Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs(WHERE)
    return [
        [line["step"], name, value]
        for line in SQLiteStorage.get_logs(WHERE, run)
        for name, value in line.items()
        if name.partition("/")[0] in ("objective", "heldout", "policy")
    ]


if __name__ == "__main__":
    tracker, out, what, *steps = sys.argv[1:]
    folder = Path(out)
    offline(folder.parent)
    if what == "write":
        write(tracker, folder, *map(int, steps))
    else:
        print(json.dumps(read(tracker, folder)))
