"""Memory of a rank on a large and on a small training set, and the speed of preparing each.

    python -m benchmarks.data_memory [--rows 1000 1000000] [--steps 500] [--out FILE]

Rows are short demonstrations of the quickstart. Each size is tokenised (timed), then a fresh process loads the set and
collates steps as step 1 does. `anonymous` is the process's own memory; `mapped` is file pages that it has touched,
which all ranks of a node share and the kernel reclaims when it needs memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks import tiny
from tristage.config import BatchPlan
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import Loader
from tristage.data.sets import load_sets
from tristage.models.tokenizer import load_tokenizer
from tristage.quickstart import task

GLOBAL_BATCH = 64


def write_rows(path: Path, num_rows: int) -> None:
    rng = random.Random(0)
    prompts = task.draw_prompts(1000, rng)
    with path.open("w") as file:
        for i in range(num_rows):  # the number makes each prompt its own
            prompt = rng.choice(prompts)
            file.write(json.dumps({"prompt": f"{prompt} {i}", "response": task.draw_answer(prompt, rng)}) + "\n")


def memory() -> dict[str, float]:
    """MiB that this process holds, by kind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "anonymous": int(lines["RssAnon"].split()[0]) / 1024,
        "mapped": int(lines["RssFile"].split()[0]) / 1024,
    }


def measure(folder: Path, num_rows: int, steps: int) -> dict[str, object]:
    """In a fresh process: memory before the set is opened, and after `steps` steps of batches."""
    settings = tiny.sft_config(folder / "run", str(folder / "model"), str(folder / f"{num_rows}.jsonl"))
    tokenizer = load_tokenizer(settings.model)
    before, started = memory(), time.perf_counter()
    rows, _ = load_sets(settings, tokenizer)
    opened = time.perf_counter() - started
    loader = Loader(rows.lengths, BatchPlan.make(GLOBAL_BATCH, GLOBAL_BATCH, 1), 0, 0, epochs=1000)
    started = time.perf_counter()
    for step in range(steps):
        for micro in loader.step_rows(step):
            collate_sft(pick(rows, micro), tokenizer.pad_token_id)
    seconds = (time.perf_counter() - started) / steps
    after = memory()
    return {"before": before, "after": after, "seconds_to_open": opened, "seconds_a_step_of_64": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.measure, arguments.steps)))
        return
    results: dict[str, object] = {
        "command": " ".join(["python -m benchmarks.data_memory", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRISTAGE_CACHE"] = str(folder / "cache")
        tiny.write_model(folder / "model")
        for num_rows in arguments.rows:
            write_rows(folder / f"{num_rows}.jsonl", num_rows)
            settings = tiny.sft_config(folder / "run", str(folder / "model"), str(folder / f"{num_rows}.jsonl"))
            started = time.perf_counter()
            load_sets(settings, load_tokenizer(settings.model))
            prepared = time.perf_counter() - started
            command = [sys.executable, "-m", "benchmarks.data_memory", "--measure", str(num_rows), "--folder", name]
            command += ["--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = {"seconds_to_prepare": prepared} | json.loads(done.stdout.splitlines()[-1])
            results[f"{num_rows} rows"] = found
            print(num_rows, json.dumps(found), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
