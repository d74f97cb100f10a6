"""TRL's PPOTrainer as a contestant of against_peers, on data-parallel ranks over gloo.

The last release that has it is 1.12.0 (trl.experimental.ppo), so it runs in an environment of its own:

    python -m venv trl-ppo && trl-ppo/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0
    python -m benchmarks.against_peers --trl-ppo-python trl-ppo/bin/python

A job says `folder`, `actor`, `rows` per rank and iteration, `micro_batch`, `sampled`, and `options` of PPOConfig. Rows
that have ended are computed until the last one has.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.models import EOS, open_actor, open_reward, open_tokenizer, read_ids, read_sizes
from benchmarks.turns import Turns

MANY = 100_000  # iterations: the benchmark ends the run


class Turn(TrainerCallback):
    """A turn is an iteration, whose phases begin where the trainer's own functions are called."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.tokens = turns, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns.begin("rollout")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns.end(self.tokens)
        self.turns.begin("rollout")

    def watch(self, module: Any) -> None:
        """Scoring begins when `batch_generation` returns, updating at the first forward that keeps a graph."""
        generate, forward = module.batch_generation, module.forward

        def watched_generate(model: Any, queries: Any, *rest: Any) -> Any:
            found = generate(model, queries, *rest)
            self.tokens = real_tokens(found[0][:, queries.shape[1] :])
            self.turns.switch("score")
            return found

        def watched_forward(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and "update" not in self.turns.phases:
                self.turns.switch("update")
            return forward(*arguments)

        module.batch_generation, module.forward = watched_generate, watched_forward


def real_tokens(responses: torch.Tensor) -> int:
    """responses [B,R] -> their tokens up to and including the first EOS."""
    ended_before = (responses == EOS).long().cumsum(dim=1) - (responses == EOS).long()
    return int((ended_before == 0).sum())


def options_of(job: dict[str, Any], response: int, ranks: int) -> dict[str, Any]:
    """The arguments of PPOConfig: one optimizer step per iteration, as the other contestants do."""
    micro_batch = min(job["rows"], job["micro_batch"])
    return {
        "output_dir": f"{job['folder']}/out-trl", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": job["rows"] // micro_batch,
        "num_mini_batches": 1, "num_ppo_epochs": 1, "local_rollout_forward_batch_size": job["rows"],
        "response_length": response, "stop_token": "eos" if job["sampled"] else None, "temperature": 1.0,
        "total_episodes": MANY * job["rows"] * ranks, "num_sample_generations": 0, "learning_rate": 1e-6, "seed": 1,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    } | job.get("options", {})  # fmt: skip


def make_trainer(turns: Turns) -> Any:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    job, turn = turns.job, Turn(turns)
    folder = job["folder"]
    policy, reference = (open_actor(folder, job["actor"]) for _ in range(2))
    value, reward = (open_reward(folder) for _ in range(2))
    rows = [{"input_ids": row["prompt"]} for row in read_ids(folder, "prompts")]
    turn.watch(ppo_trainer)
    config = PPOConfig(**options_of(job, read_sizes(folder).response, turns.ranks))
    return PPOTrainer(
        config, open_tokenizer(folder), policy, reference, reward, Dataset.from_list(rows), value, callbacks=[turn]
    )


def main() -> None:
    make_trainer(Turns()).train()


if __name__ == "__main__":
    main()
