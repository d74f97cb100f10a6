"""TRL's PPOTrainer on the quickstart's task: the models, prompts, samples and rates of its config.

    trl-ppo/bin/python -m results.trl_ppo output/results/ablations/seed0 OUT 0

The last release that has it is 1.12.0, so it runs in an environment of its own (docs/speed.md says how to make it).
OUT/<n> is the policy after n iterations. Here, as in the quickstart, an iteration is 128 responses, twice in
minibatches of 64.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

warnings.simplefilter("ignore")
ITERATIONS, EVERY = 40, 5
ACTOR_RATE, CRITIC_RATE, EPS = 5e-4, 1e-3, 1e-5


class Save(TrainerCallback):
    """Writes the policy before training and every few iterations."""

    def __init__(self, policy: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
        self.policy, self.tokenizer, self.out = policy, tokenizer, out

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % EVERY == 0:
            self.policy.save_pretrained(self.out / str(state.global_step))
            self.tokenizer.save_pretrained(self.out / str(state.global_step))


def main(folder: Path, out: Path, seed: int) -> None:
    set_seed(seed)
    sft, reward_folder = folder / "step1_sft/final", folder / "step2_reward_model/final"
    tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    rows = [json.loads(line)["prompt"] for line in open(folder / "data/prompts.train.jsonl", encoding="utf-8")]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row}], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(
        [{"params": policy.parameters(), "lr": ACTOR_RATE}, {"params": value.parameters(), "lr": CRITIC_RATE}],
        betas=(0.9, 0.95),
        eps=EPS,
        weight_decay=0.0,
    )
    config = PPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, gradient_checkpointing=False, seed=seed,
        per_device_train_batch_size=128, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=2,
        local_rollout_forward_batch_size=128, response_length=24, stop_token="eos", temperature=1.0,
        total_episodes=ITERATIONS * 128, num_sample_generations=0, kl_coef=0.05, lr_scheduler_type="linear",
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tokenizer, policy, reference, reward, Dataset.from_list([{"input_ids": row} for row in ids]), value,
        optimizers=(optimizer, None), callbacks=[Save(policy, tokenizer, out)],
    )  # fmt: skip
    assert trainer.args.num_total_batches == ITERATIONS
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
