"""Sums of two or three numbers from reasoning-gym, with the answer in a column of its own.

    python -m results.arithmetic_data output/arithmetic

A few demonstrations teach the form of an answer; prompts to train on, held-out ones and demonstrations do not overlap.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from results.assets import write_rows, write_smollm2
from results.sentiment_data import REWARD_LAYERS, TEMPLATE

DEMONSTRATIONS, HELDOUT, TRAIN = 64, 256, 2048


def main(argv: list[str]) -> None:
    out = Path(argv[0])
    write_smollm2(out / "model", TEMPLATE)
    write_critic(write_smollm2(out / "model_cut", TEMPLATE, REWARD_LAYERS), out / "critic")
    write_data(out / "data")


def write_critic(model: str, folder: Path) -> None:
    """`model` as a network that gives values, with a head of zeros."""
    critic = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    critic.score.weight.data.zero_()
    critic.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def problems(count: int) -> list[dict[str, Any]]:
    """Sums, half of two numbers and half of three: {"prompt", "answer", "metadata"}."""
    made = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=0, min_terms=2, max_terms=3, min_digits=1, max_digits=1
    )
    return [{"prompt": row["question"], "answer": row["answer"], "metadata": row["metadata"]} for row in made]


def write_data(folder: Path) -> None:
    rows = problems(DEMONSTRATIONS + HELDOUT + TRAIN)
    demonstrations = [{"prompt": row["prompt"], "response": row["answer"]} for row in rows[:DEMONSTRATIONS]]
    shown = {row["prompt"] for row in demonstrations}
    others = [row for row in rows[DEMONSTRATIONS:] if row["prompt"] not in shown]
    heldout = others[:HELDOUT]
    shown = {row["prompt"] for row in heldout}
    train = [row for row in others[HELDOUT:] if row["prompt"] not in shown]
    write_rows(folder, {"sft.train": demonstrations, "prompts.train": train, "prompts.heldout": heldout})


if __name__ == "__main__":
    main(sys.argv[1:])
