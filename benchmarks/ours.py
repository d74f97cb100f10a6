"""tristage as a contestant of against_peers, floor and scaling: the functions that the steps themselves call.

Every call into a step is in this file. A job says `what` (sft, reward_model, ppo), `folder` (benchmarks.models),
`micro_batch`, `rows` per rank and step, and `settings` that override those below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.models import Sizes, read_sizes
from benchmarks.turns import Turns
from step1_sft.config import SFTConfig
from step1_sft.train import sft_step
from step2_reward_model.config import RewardModelConfig
from step2_reward_model.loss import pair_options
from step2_reward_model.train import reward_model_step
from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import make_experience, sample_responses, score_responses
from step3_ppo.update import ppo_update
from tristage import dist
from tristage.data.collate import collate_packed, collate_ranking, collate_sft, pick
from tristage.data.packing import PackedRows
from tristage.data.sets import load_sets
from tristage.engine import train_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.quiet import quiet_libraries
from tristage.models.reward_model import load_reward_model
from tristage.training import setup

Job = dict[str, Any]
MANY = 100_000  # steps: the benchmark ends the run


def settings_for(job: Job, ranks: int) -> SFTConfig | RewardModelConfig | PPOConfig:
    folder, rows, micro_batch = job["folder"], job["rows"] * ranks, min(job["rows"], job["micro_batch"])
    sizes = read_sizes(folder)
    common = {"output": f"{folder}/out", "precision": "float32", "device": "cpu", "data.heldout_fraction": 0.05}
    common |= {"save_every": 0, "evaluate_every": 0, "seed": 1}
    if job["what"] == "ppo":
        own = _ppo_settings(job, sizes, rows, micro_batch)
    else:
        own = {"epochs": MANY, "global_batch": rows, "micro_batch": micro_batch, "max_tokens": sizes.row}
        own |= {"optimizer.learning_rate": 1e-6, "deepspeed": "zero2"}
        model, data = {"sft": ("actor", "sft"), "reward_model": ("reward", "pairs")}[job["what"]]
        own |= {"model": f"{folder}/{model}", "data.train": f"{folder}/{data}.jsonl"}
    kind = {"sft": SFTConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig}[job["what"]]
    return kind.model_validate(nested(common | own | job.get("settings", {})))


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return found


def _ppo_settings(job: Job, sizes: Sizes, rows: int, micro_batch: int) -> dict[str, Any]:
    folder, frozen = job["folder"], f"zero{3 if job['stage'] == 3 else 0}"
    models = {"actor.model": f"{folder}/{job['actor']}", "reward.model": f"{folder}/reward"}
    for name in ("actor", "critic"):
        models |= {f"{name}.deepspeed": f"zero{job['stage']}", f"{name}.optimizer.learning_rate": 1e-6}
    models |= {"reference.deepspeed": frozen, "reward.deepspeed": frozen}
    return models | {
        "data.train": f"{folder}/prompts.jsonl", "max_prompt_tokens": sizes.prompt, "iterations": MANY,
        "rollout.prompts": rows, "rollout.rows_at_once": job["rows"],
        "rollout.max_response_tokens": job.get("response", sizes.response),
        "ppo.minibatch": rows, "ppo.micro_batch": micro_batch,
    }  # fmt: skip


# -- steps 1 and 2 -----------------------------------------------------------------------------------------------------


def sft(settings: SFTConfig, device: torch.device) -> Iterator[Callable[[], int]]:
    """Steps to run one after the other; each returns its real tokens on this rank."""
    plan, config, tokenizer = setup.check_training(settings)
    rows: Any = load_sets(settings, tokenizer)[0]
    rows = PackedRows(rows, settings.max_tokens, settings.seed) if settings.packing else rows
    loader = setup.train_loader(settings, rows.lengths, plan)
    model = setup.load_trained(load_causal_lm, settings, config, tokenizer)
    engine = train_engine(model, config, settings.optimizer, loader.total_steps)
    collate: Any = collate_packed if settings.packing else collate_sft

    def step(number: int) -> int:
        micro_batches = [collate(pick(rows, micro), tokenizer.pad_token_id) for micro in loader.step_rows(number)]
        sft_step(engine, micro_batches, device)
        return sum(int(batch.attention_mask.sum()) for batch in micro_batches)

    for number in range(loader.total_steps):
        yield lambda number=number: step(number)


def reward_model(settings: RewardModelConfig, device: torch.device) -> Iterator[Callable[[], int]]:
    plan, config, tokenizer = setup.check_training(settings)
    rows = load_sets(settings, tokenizer)[0]
    loader = setup.train_loader(settings, rows.lengths, plan)
    model = setup.load_trained(load_reward_model, settings, config, tokenizer, new_head_seed=settings.seed)
    engine = train_engine(model, config, settings.optimizer, loader.total_steps)

    def step(number: int) -> int:
        dealt = loader.step_rows(number)
        micro_batches = [collate_ranking(pick(rows, micro), tokenizer.pad_token_id) for micro in dealt]
        reward_model_step(engine, micro_batches, settings.loss, device, **pair_options(settings))
        return sum(int(batch.attention_mask.sum()) for batch in micro_batches)

    for number in range(loader.total_steps):
        yield lambda number=number: step(number)


# -- step 3 ------------------------------------------------------------------------------------------------------------


def ppo(settings: PPOConfig, device: torch.device, turns: Turns) -> Iterator[Callable[[], int]]:
    run = PPORun.build(read_inputs(settings), device)

    def iteration(number: int) -> int:
        prompts = run.prompts(number)
        run.rollouts.sync_weights(number - 1)
        sampled = sample_responses(run.rollouts, prompts, settings.rollout, settings.seed, number)
        turns.switch("score")
        own = score_responses(run.engines, run.inputs.tokenizer, sampled, prompts, settings, run.inputs.functions)
        experience, _ = make_experience(run.engines, own, prompts, settings, run.control)
        turns.switch("update")
        ppo_update(run.engines, experience, number, settings, run.inputs.plan, run.extras)
        return int(sampled.sequences.response_mask.sum())

    for number in range(1, settings.iterations + 1):
        yield lambda number=number: iteration(number)


def main() -> None:
    turns = Turns()
    quiet_libraries()
    device, settings, first = dist.init("cpu"), settings_for(turns.job, turns.ranks), "step"
    if isinstance(settings, PPOConfig):
        steps, first = ppo(settings, device, turns), "rollout"
    elif isinstance(settings, SFTConfig):
        steps = sft(settings, device)
    else:
        steps = reward_model(settings, device)
    for step in steps:
        turns.begin(first)
        turns.end(step())


if __name__ == "__main__":
    main()
