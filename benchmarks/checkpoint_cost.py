"""What a checkpoint costs: seconds of a save, its share of training time, and of a start that resumes.

    python -m benchmarks.checkpoint_cost [--steps 6] [--stages 0 2 3] [--out FILE]

Step 1 on two CPU ranks, a network of 13 million parameters (float32: 50 MB, and Adam's moments twice that), at ZeRO 0,
2 and 3. Each stage runs in fresh processes, then again to resume from its checkpoint: seconds from reading the
settings to the end of the first step, of which `resume` is verifying and reading the checkpoint. Python's own start and
imports come on top of both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

import step1_sft.train as sft
from benchmarks import tiny
from benchmarks.tiny import run_ranks
from tristage.models.tokenizer import load_tokenizer
from tristage.training import run


def write_network(folder: Path) -> int:
    """Write a random network to FOLDER/model and its tokenizer to FOLDER/tiny; returns its number of parameters."""
    tokenizer = load_tokenizer(tiny.write_model(folder / "tiny"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return network.num_parameters()


def train(rank: int, argv: list[str]) -> dict[str, list[float]]:
    """Seconds of every step, save and load of this rank, and from the start to the first step's end."""
    seconds: dict[str, list[float]] = {"step": [], "save": [], "resume": [], "to_first_step": []}
    began = time.perf_counter()

    def timed(name: str, function: Any) -> Any:
        def timing(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name].append(time.perf_counter() - start)
            if name == "step" and not seconds["to_first_step"]:
                seconds["to_first_step"].append(time.perf_counter() - began)
            return result

        return timing

    sft.sft_step = timed("step", sft.sft_step)
    run.save_checkpoint = timed("save", run.save_checkpoint)
    run.find_checkpoint = timed("resume", run.find_checkpoint)  # verifies its checksums
    sft.load_checkpoint = timed("resume", sft.load_checkpoint)
    sft.save_model = lambda *_: []
    sft.main(argv)
    return seconds


def measure(base: Path, stage: int, steps: int) -> dict[str, float]:
    folder = base / f"zero{stage}"
    tiny.sft_config(folder, str(base / "model"), str(base / "rows/sft.jsonl"), stage)
    common = ["--config", str(folder / "sft.yaml"), "save_every=1", "micro_batch=4", "epochs=1000"]
    (first, _) = run_ranks(2, train, [*common, f"max_steps={steps}"])
    (second, _) = run_ranks(2, train, [*common, f"max_steps={steps + 1}", "resume_changed=true"])
    save, step = statistics.median(first["save"]), statistics.median(first["step"][1:])
    newest = folder / "sft/checkpoints" / (folder / "sft/checkpoints/latest").read_text().strip()
    return {
        "checkpoint_mb": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6,
        "seconds_a_step": step,
        "seconds_a_save": save,
        "saves_in_steps": save / step,
        "share_of_time_if_saved_every_100_steps": save / (save + 100 * step),
        "seconds_to_first_step": first["to_first_step"][0],
        "seconds_to_first_step_resumed": second["to_first_step"][0],
        "of_which_resume": sum(second["resume"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        os.environ["TRISTAGE_CACHE"] = str(base / "cache")
        tiny.write_rows(base / "rows")
        results: dict[str, object] = {
            "command": " ".join(["python -m benchmarks.checkpoint_cost", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, python {platform.python_version()}",
            "load_average_at_start": os.getloadavg()[0],
            "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")},
            "parameters": write_network(base),
        }
        for stage in arguments.stages:
            results[f"zero{stage}"] = found = measure(base, stage, arguments.steps)
            print(f"ZeRO {stage}", json.dumps(found), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
