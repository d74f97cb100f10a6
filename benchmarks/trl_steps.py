"""TRL's SFTTrainer and RewardTrainer as contestants of against_peers, on data-parallel ranks over gloo.

A job says `what` (sft, reward_model), `folder`, `rows` per rank and step, and `options` of TRL's config. Not DeepSpeed:
accelerate cannot drive it on a CPU. The optimizer is transformers' default, PyTorch's fused AdamW.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.models import PAD, open_actor, open_reward, open_tokenizer, read_ids, read_sizes
from benchmarks.turns import Turns

MANY = 100_000  # steps: the benchmark ends the run


class Turn(TrainerCallback):
    """A turn is a step with the fetching of its batch."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.fetched = turns, deque[int]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns.end(self.fetched.popleft())
        self.turns.begin()


def counting(collator: Any, turn: Turn) -> Any:
    """`collator`, whose batches have their real tokens noted for the turns: accelerate fetches one batch ahead."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        turn.fetched.append(int((batch["input_ids"] != PAD).sum()))
        return batch

    return collate


def make_trainer(turns: Turns) -> Any:
    job, turn = turns.job, Turn(turns)
    folder, sizes = job["folder"], read_sizes(job["folder"])
    common = {
        "output_dir": f"{folder}/out-trl", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": job["rows"], "max_length": sizes.row, "max_steps": MANY, "learning_rate": 1e-6,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1,
    } | job.get("options", {})  # fmt: skip
    if job["what"] == "sft":
        rows = [
            {"input_ids": row["prompt"] + row["response"],
             "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["response"])}
            for row in read_ids(folder, "sft")
        ]  # fmt: skip
        kind, model, config = SFTTrainer, open_actor(folder), SFTConfig(**common)
    else:
        rows = [
            {f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")}
            for row in read_ids(folder, "pairs")
        ]
        kind, model, config = RewardTrainer, open_reward(folder), RewardConfig(**common)
    trainer: Any = kind(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=open_tokenizer(folder), callbacks=[turn]
    )
    trainer.data_collator = counting(trainer.data_collator, turn)
    return trainer


def main() -> None:
    make_trainer(Turns()).train()


if __name__ == "__main__":
    main()
