"""What a launcher costs before it calls `deepspeed`: checks, device, the command; CPU seconds and processes.

    python -m benchmarks.launch_cost [OTHER_CHECKOUT] [--runs 5] [--out FILE]

`deepspeed` is a stand-in that ends at once. With another checkout the two launchers take turns, and the ratio of their
CPU seconds is printed. DeepSpeed's own two launchers (an import of torch each) and the ranks come on top of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks import tiny

HERE = Path(__file__).parents[1]


def launch(checkout: Path, folder: Path, config: str) -> dict[str, float]:
    """CPU and wall seconds of one launch of step 1 on two CPU ranks."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    variables = {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    command = ["bash", str(checkout / "launch/step1_sft.sh"), config]
    subprocess.run(command, env=os.environ | variables, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "wall_seconds": time.monotonic() - started}


def write_config(folder: Path) -> str:
    """A config of step 1 that earlier commits read as well: no bases, only what is not a default."""
    settings = tiny.sft_config(folder, tiny.write_model(folder / "model"), str(folder / "rows.jsonl"))
    values = settings.model_dump(mode="json", exclude_defaults=True)
    values["deepspeed"] = str(HERE / "configs/deepspeed/zero0.json")
    (folder / "step1_sft.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "step1_sft.yaml")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.launch_cost")
    parser.add_argument("other", nargs="?", type=Path, help="another checkout, such as one of an earlier commit")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    checkouts = {"this": HERE} | ({"other": given.other.resolve()} if given.other else {})
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        (folder / "bin/deepspeed").write_text("#!/bin/sh\n")
        (folder / "bin/deepspeed").chmod(0o755)
        (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        config = write_config(folder)
        for run in range(given.runs + 1):
            for each, checkout in checkouts.items():
                measured = launch(checkout, folder, config)
                if run:  # the first fills caches
                    seen[each].append(measured)
    medians = {
        each: {what: statistics.median(one[what] for one in runs) for what in runs[0]} for each, runs in seen.items()
    }
    result = {"python": platform.python_version(), "runs": given.runs, "median": medians}
    if given.other:
        ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(seen["this"], seen["other"], strict=True)]
        result["cpu_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
