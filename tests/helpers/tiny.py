"""Tiny models, data and settings of the quickstart's task, for tests that train."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from step1_sft.config import SFTConfig
from step1_sft.train import sft_step
from step2_dpo.config import DPOConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tristage import dist
from tristage.config import BatchPlan, load_config
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import deal
from tristage.data.sets import load_sets
from tristage.data.tokenize import Example
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer
from tristage.quickstart import task
from tristage.quickstart.network import make_network, make_tokenizer

REPO = Path(__file__).parents[2]
ADAM: dict[str, Any] = {"learning_rate": 1e-3, "eps": 1e-5, "schedule": "linear", "warmup_steps": 2}


# Families that the quickstart does not use; what they add is said beside them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_untied": ("llama", {"intermediate_size": 96, "tie_word_embeddings": False}),  # an output layer of its own
    "qwen2": ("qwen2", {"intermediate_size": 96, "num_key_value_heads": 1}),  # biases, grouped keys
    "gpt_neox": ("gpt_neox", {"intermediate_size": 96}),  # embed_in, embed_out, partial rotary positions
    "gemma2": (  # softcapped logits, sliding windows in every other layer
        "gemma2",
        {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 8,
         "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24},
    ),
    "granite": (  # scaled embeddings and logits; transformers has no scalar head for it
        "granite",
        {"intermediate_size": 96, "num_key_value_heads": 1, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "bloom": ("bloom", {"n_head": 2, "n_layer": 2}),  # ALiBi: no position_ids
}  # fmt: skip


@contextlib.contextmanager
def one_rank() -> Iterator[torch.device]:
    """This process as a group of one rank, on one thread as in run_ranks: others on the machine cost it little then.

    Afterwards the environment is what it was; the group stays for the next.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield dist.init("cpu")
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def write_model(
    folder: Path, architecture: str = "llama", pad_is_eos: bool = False, seed: int = 0, gain: float = 1.0
) -> str:
    """An untrained tiny model with its tokenizer, as an ordinary Hugging Face folder.

    A `gain` above 1 makes its matrices larger: attention and logits far from uniform, as in a trained model.
    """
    tokenizer = make_tokenizer(_all_words(), pad_is_eos=pad_is_eos)
    tokenizer.save_pretrained(folder)
    network = _make_any(tokenizer, architecture, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    network.save_pretrained(folder)
    return str(folder)


def _make_any(tokenizer: Any, architecture: str, seed: int) -> Any:
    if architecture not in FAMILIES:
        return make_network(tokenizer, architecture, "tiny", seed)
    model_type, values = FAMILIES[architecture]
    common = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **common, **special, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def copy_model(source: str, folder: Path) -> str:
    return str(shutil.copytree(source, folder))


def copy_with_pad_as_eos(source: str, folder: Path) -> str:
    """The same weights with EOS as pad, and no unknown token, which load_tokenizer would take for padding."""
    copy_model(source, folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["unk_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": tokenizer["eos_token"]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    return str(folder)


def write_reward_model(folder: Path, model: str, seed: int = 7) -> str:
    """The language model in the folder `model` with a fresh scalar head, as step 2 exports it."""
    tokenizer = load_tokenizer(model)
    load_reward_model(model, tokenizer, dtype=torch.float32, new_head_seed=seed).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teach(model: str, rows: str, steps: int = 60) -> str:
    """Train the folder `model` in place on SFT rows, without DeepSpeed: its responses then end at different lengths."""
    tokenizer = load_tokenizer(model)
    policy = load_causal_lm(model, tokenizer, dtype=torch.float32)
    settings = sft_config(Path(model) / "settings", model, rows)
    examples, _ = load_sets(settings, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(steps):
        batch = collate_sft([examples[(16 * step + i) % len(examples)] for i in range(16)], tokenizer.pad_token_id)
        logprobs, _ = policy(batch.input_ids, batch.attention_mask, batch.loss_mask)
        (-logprobs.sum() / batch.loss_mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.model.save_pretrained(model)
    return model


def random_examples(lengths: Sequence[tuple[int, int]], tokenizer: Any, seed: int = 0) -> list[Example]:
    """Random ids, (prompt length, answer length) each, the answer's last token its EOS and no special one elsewhere."""
    rng = random.Random(seed)
    return [
        Example([rng.randrange(4, len(tokenizer)) for _ in range(p + a - 1)] + [tokenizer.eos_token_id], p)
        for p, a in lengths
    ]


def sft_train_step(engine: Any, plan: BatchPlan, tokenizer: Any, number: int) -> float:
    """One optimizer step on eight rows of random words, which `number` seeds: its loss."""
    lengths = [(3, 5), (2, 9), (7, 2), (4, 4), (1, 3), (6, 6), (2, 2), (5, 8)]
    rows = random_examples(lengths, tokenizer, seed=number)
    dealt = deal(range(len(rows)), [len(row.ids) for row in rows], plan, dist.rank())
    batches = [collate_sft(pick(rows, micro), tokenizer.pad_token_id) for micro in dealt]
    return sft_step(engine, batches, torch.device("cpu"))[0]["sft/loss"]


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
    """Renamed into place: each rank of a test may write the same file while another reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(yaml.safe_dump(values))
    partial.replace(path)
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


def dpo_config(folder: Path, model: str, rows: str, stage: int = 0, *overrides: str) -> DPOConfig:
    """With a reference unless `overrides` say `loss=simpo`."""
    values = _train_values(folder / "dpo", model, rows, stage)
    if "loss=simpo" not in overrides:
        values["reference"] = {"deepspeed": deepspeed_json(3 if stage == 3 else 0)}
    return load_config(DPOConfig, ["--config", write_yaml(folder / "dpo.yaml", values), *overrides])


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
