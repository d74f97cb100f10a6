"""Peaks of memory that `tristage plan` predicts, and measured ones.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m benchmarks.memory_plan [--out FILE] [--only sft-zero2 ...]

A random Llama of 39 million parameters in float32 trains for two optimizer steps of step 1, and of one iteration of
step 3 (four engines of it), on two CPU ranks at ZeRO 0, 2 and 3. Measured is how far the kernel's high-water mark of a
rank's resident memory (VmHWM of /proc/self/status, reset before the run) rises above the memory of the process after
its imports and a run of a network of 136 thousand parameters, which starts everything that starts once. The peak is
that of the entire run: loading, training, the final checkpoint and export. MALLOC_* makes the C library return freed
blocks at once: otherwise its heap, which has nothing to do with the plan, would also be measured. GPU memory is not
measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import tiny
from benchmarks.tiny import run_ranks
from tristage.models.tokenizer import load_tokenizer
from tristage.planning.formulas import GIB, Machine, total
from tristage.planning.plan import Plan, engines_of, make_plan

RANKS = 2
CASES = [f"{step}-zero{stage}" for step in ("sft", "ppo") for stage in (0, 2, 3)]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
SHORT = {
    "sft": ["max_steps=2", "micro_batch=4"],
    "ppo": ["iterations=1", "ppo.epochs=1", "rollout.max_response_tokens=4", "data.heldout_limit=2"],  # two steps
}
SIZE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 6, "num_attention_heads": 10}


def write_model(folder: Path, tokenizer_of: str) -> None:
    """A random network, large compared with everything else in a process."""
    tokenizer = load_tokenizer(tokenizer_of)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_of(case: str, folder: Path, model: str, name: str) -> Any:
    """The settings of a case on `model`; its files are in folder/name."""
    step, stage = case.split("-zero")
    here, rows = folder / name / case, tiny.write_rows(folder / "rows")
    if step == "sft":
        return tiny.sft_config(here, model, rows["sft"], int(stage), *SHORT[step])
    reward = f"{model}-reward"
    if not Path(reward).is_dir():
        tiny.write_reward_model(Path(reward), model)
    return tiny.ppo_config(here, model, reward, rows["prompts"], int(stage), *SHORT[step])


def measure(rank: int, case: str, files: list[str]) -> float:
    """On each rank: a small run, then the run; bytes that the latter's peak is above what the former left."""
    from step1_sft.train import main as sft
    from step3_ppo.train import main as ppo

    step = case.split("-")[0]
    main = sft if step == "sft" else ppo
    for number, file in enumerate(files):
        if number:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current memory
            before = memory("VmRSS")
        main(["--config", file, *SHORT[step]])
    return memory("VmHWM") - before


def memory(kind: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[kind].split()[0]) * 1024


def predicted(settings: Any) -> Plan:
    machine = Machine(RANKS, RANKS, gpu_memory=16 * GIB, host_memory=None, cpu=True)
    return make_plan(settings, engines_of(settings, machine), machine)


def compare(case: str, folder: Path) -> dict[str, Any]:
    models = {name: str(folder / "models" / name) for name in ("tiny", "large")}
    settings = {name: settings_of(case, folder, path, name) for name, path in models.items()}
    plan = predicted(settings["large"])
    files = [settings[name].file for name in models]
    measured = run_ranks(RANKS, measure, case, files)
    return {
        "predicted_MiB": round(plan.gpu_bytes / 2**20),
        "measured_MiB": [round(peak / 2**20) for peak in measured],
        "predicted_to_measured": round(plan.gpu_bytes / max(measured), 3),
        "peak_phase": plan.peak.name,
        "always_there_MiB": round(sum(map(total, plan.resident.values())) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.update(GIVE_BACK, TOKENIZERS_PARALLELISM="false")  # the ranks are processes of their own
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.memory_plan", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, python {platform.python_version()}, {RANKS} ranks",
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "model": SIZE,
        "environment": GIVE_BACK,
        "not_measured": "GPUs: there was none",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRISTAGE_CACHE"] = str(folder / "cache")
        tiny.write_model(folder / "models" / "tiny")
        write_model(folder / "models" / "large", str(folder / "models" / "tiny"))
        for case in arguments.only:
            results[case] = compare(case, folder)
            print(case, json.dumps(results[case]), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
