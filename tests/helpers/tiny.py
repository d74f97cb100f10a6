"""Tiny models, data and settings of the quickstart's task, for tests that train."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from step1_sft.config import SFTConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tristage.config import load_config
from tristage.quickstart import task
from tristage.quickstart.network import make_network, make_tokenizer

REPO = Path(__file__).parents[2]
ADAM: dict[str, Any] = {"learning_rate": 1e-3, "eps": 1e-5, "schedule": "linear", "warmup_steps": 2}


def write_model(folder: Path, architecture: str = "llama", pad_is_eos: bool = False, seed: int = 0) -> str:
    """An untrained tiny model with its tokenizer, as an ordinary Hugging Face folder."""
    tokenizer = make_tokenizer(_all_words(), pad_is_eos=pad_is_eos)
    tokenizer.save_pretrained(folder)
    make_network(tokenizer, architecture, "tiny", seed).save_pretrained(folder)
    return str(folder)


def _all_words() -> list[str]:
    rng = random.Random(0)
    prompts = task.draw_prompts(1500, rng)
    return prompts + [task.draw_answer(prompt, rng) for prompt in prompts for _ in range(2)]


def write_rows(folder: Path, num_rows: int = 64) -> dict[str, str]:
    """JSONL files of each kind: {"sft": path, "preference": path, "ranking": path, "prompts": path}."""
    rng = random.Random(1)
    prompts = task.draw_prompts(num_rows, rng)
    rows = {
        "sft": task.make_demonstrations(prompts, num_rows, rng),
        "preference": task.make_preferences(prompts, num_rows, rng),
        "ranking": task.make_rankings(prompts, num_rows, rng),
        "prompts": [{"prompt": prompt} for prompt in prompts],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, lines in rows.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def deepspeed_json(stage: int) -> str:
    return str(REPO / f"configs/deepspeed/zero{stage}.json")


def write_yaml(path: Path, values: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def _train_values(folder: Path, model: str, rows: str, stage: int) -> dict[str, Any]:
    return {
        "model": model,
        "output": str(folder),
        "device": "cpu",
        "precision": "float32",
        "data": {"train": rows, "heldout_fraction": 0.2},
        "max_tokens": 64,
        "epochs": 2,
        "global_batch": 8,
        "micro_batch": 2,
        "optimizer": ADAM,
        "deepspeed": deepspeed_json(stage),
    }


def sft_config(folder: Path, model: str, rows: str, stage: int = 0, *overrides: str) -> SFTConfig:
    path = write_yaml(folder / "sft.yaml", _train_values(folder / "sft", model, rows, stage))
    return load_config(SFTConfig, ["--config", path, *overrides])


def reward_model_config(folder: Path, model: str, rows: str, stage: int = 0, *overrides: str) -> RewardModelConfig:
    path = write_yaml(folder / "reward.yaml", _train_values(folder / "reward", model, rows, stage))
    return load_config(RewardModelConfig, ["--config", path, *overrides])


def ppo_values(folder: Path, actor: str, reward: str, prompts: str, stage: int = 0) -> dict[str, Any]:
    frozen = deepspeed_json(3 if stage == 3 else 0)
    return {
        "output": str(folder),
        "device": "cpu",
        "precision": "float32",
        "actor": {"model": actor, "deepspeed": deepspeed_json(stage), "optimizer": ADAM},
        "critic": {"deepspeed": deepspeed_json(stage), "optimizer": ADAM},
        "reference": {"deepspeed": frozen},
        "reward": {"model": reward, "deepspeed": frozen},
        "data": {"train": prompts, "heldout_fraction": 0.2},
        "max_prompt_tokens": 32,
        "iterations": 3,
        "rollout": {"prompts": 16, "rows_at_once": 8, "max_response_tokens": 12},
        "ppo": {"epochs": 2, "minibatch": 8, "micro_batch": 2},
        "grader": "tristage.quickstart.task:gold_scores",
    }


def ppo_config(folder: Path, actor: str, reward: str, prompts: str, stage: int = 0, *overrides: str) -> PPOConfig:
    path = write_yaml(folder / "ppo.yaml", ppo_values(folder / "ppo", actor, reward, prompts, stage))
    return load_config(PPOConfig, ["--config", path, *overrides])
