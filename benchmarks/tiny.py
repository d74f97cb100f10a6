"""What benchmarks train: the quickstart's task and recipes with a tiny network and small batches; ranks to train on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tristage import dist
from tristage.config import load_config
from tristage.machine.arrival import free_port
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer
from tristage.quickstart import task
from tristage.quickstart.network import make_network, make_tokenizer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/quickstart"


def write_model(folder: Path) -> str:
    """An untrained network of 0.1 million parameters, with a tokenizer that knows every word of the task."""
    rng = random.Random(0)
    prompts = task.draw_prompts(1500, rng)
    tokenizer = make_tokenizer([*prompts, *(task.draw_answer(prompt, rng) for prompt in prompts for _ in range(2))])
    tokenizer.save_pretrained(folder)
    make_network(tokenizer, "llama", "tiny").save_pretrained(folder)
    return str(folder)


def write_reward_model(folder: Path, model: str) -> str:
    """The network in the folder `model` with a new scalar head."""
    tokenizer = load_tokenizer(model)
    load_reward_model(model, tokenizer, dtype=torch.float32, new_head_seed=7).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(folder: Path, num_rows: int = 64) -> dict[str, str]:
    """{"sft": JSONL file of demonstrations, "prompts": of prompts}."""
    rng = random.Random(1)
    prompts = task.draw_prompts(num_rows, rng)
    demonstrations = task.make_demonstrations(prompts, num_rows, rng)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in {"sft": demonstrations, "prompts": [{"prompt": prompt} for prompt in prompts]}.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def sft_config(folder: Path, model: str, rows: str, stage: int = 0, *overrides: str) -> SFTConfig:
    """The settings in folder/sft.yaml, which this writes; the run's output is folder/sft."""
    values = {
        "model": model,
        "epochs": 2,
        "global_batch": 8,
        "micro_batch": 2,
        "deepspeed": f"zero{stage}",
    }
    file = _write(folder / "sft.yaml", "step1_sft", rows, values)
    return load_config(SFTConfig, ["--config", file, *overrides])


def ppo_config(folder: Path, actor: str, reward: str, prompts: str, stage: int = 0, *overrides: str) -> PPOConfig:
    """The settings in folder/ppo.yaml, which this writes; the run's output is folder/ppo."""
    frozen = {"deepspeed": f"zero{3 if stage == 3 else 0}"}
    values = {
        "actor": {"model": actor, "deepspeed": f"zero{stage}"},
        "critic": {"deepspeed": f"zero{stage}"},
        "reference": frozen,
        "reward": {"model": reward} | frozen,
        "max_prompt_tokens": 32,
        "iterations": 3,
        "rollout": {"prompts": 16, "rows_at_once": 8, "max_response_tokens": 12},
        "ppo": {"epochs": 2, "minibatch": 8, "micro_batch": 2},
    }
    file = _write(folder / "ppo.yaml", "step3_ppo", prompts, values)
    return load_config(PPOConfig, ["--config", file, *overrides])


def _write(file: Path, step: str, rows: str, values: dict[str, Any]) -> str:
    """The quickstart's recipe of `step` on a CPU with `values`, and no evaluation or checkpoint on the way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"train": rows, "heldout": None, "heldout_fraction": 0.2}
    common = {"extends": str(RECIPE / f"{step}.yaml"), "output": str(file.with_suffix("")), "device": "cpu"}
    file.write_text(yaml.safe_dump(common | {"data": data, "evaluate_every": 0, "save_every": 0} | values))
    return str(file)


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(rank, *arguments) returns on each rank, in fresh processes; one that fails ends all."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(num_ranks)}
    meeting["LOCAL_WORLD_SIZE"] = str(num_ranks)
    torch.multiprocessing.spawn(_rank, (meeting, results, function, arguments), nprocs=num_ranks)
    return [result for _, result in sorted((results.get() for _ in range(num_ranks)), key=lambda pair: pair[0])]


def _rank(rank: int, meeting: dict[str, str], results: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    results.put((rank, function(rank, *arguments)))
    dist.shutdown()  # not after an error: the others may sit in a collective
