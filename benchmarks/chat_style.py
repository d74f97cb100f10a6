"""A DeepSpeed-Chat-style contestant of against_peers, written for this comparison from a description of its loop.

What decides its cost: rows padded to the limit; full logits at every position; `module.generate` of transformers under
the engine, with ZeRO-3's hooks in place, so that every token gathers every parameter; one generation batch is one
training micro-batch and one optimizer step; actor, critic, reference and reward forwards on the padded sequences; the
loss of the language model on every token that is not padding; the reward model's loss token by token. Plain DeepSpeed
engines; AdamW is PyTorch's fused one, the fastest there is on a CPU. Greedy decoding, as there, or sampled where
responses are to end at different lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import deepspeed
import torch
from torch.nn.functional import logsigmoid, pad

from benchmarks.models import EOS, PAD, open_actor, open_reward, read_ids, read_sizes
from benchmarks.turns import Turns

GAMMA, LAM, KL_COEF, CLIP, REWARD_CLIP = 1.0, 0.95, 0.1, 0.2, 5.0


class RewardModel(torch.nn.Module):
    """A value per position, [B,T]."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        model = open_reward(folder)
        self.base, self.head = model.model, model.score

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(input_ids=ids, attention_mask=mask).last_hidden_state).squeeze(-1)


def engine(model: torch.nn.Module, stage: int, rows: int, trained: bool = True) -> Any:
    config = {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": 1.0, "steps_per_print": 10**9}
    config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True) if trained else None
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([row[:width] + [PAD] * (width - len(row)) for row in rows])


class Rows:
    """This rank's rows of each step, again from the start after the last."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.rows, self.turns, self.size = read_ids(turns.job["folder"], name), turns, turns.job["rows"]

    def of_step(self, number: int) -> list[dict[str, list[int]]]:
        first = (number * self.turns.ranks + self.turns.rank) * self.size
        return [self.rows[(first + place) % len(self.rows)] for place in range(self.size)]


# -- steps 1 and 2 -----------------------------------------------------------------------------------------------------


def sft(turns: Turns) -> Callable[[int], int]:
    """A step: the number of a step -> its real tokens on this rank."""
    job, rows = turns.job, Rows(turns, "sft")
    width, model = read_sizes(job["folder"]).row, engine(open_actor(job["folder"]), 2, job["rows"])

    def step(number: int) -> int:
        ids = padded([row["prompt"] + row["response"] for row in rows.of_step(number)], width)
        mask = ids != PAD
        labels = ids.masked_fill(~mask, -100)
        model.backward(model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss)
        model.step()
        return int(mask.sum())

    return step


def reward_model(turns: Turns) -> Callable[[int], int]:
    job, rows = turns.job, Rows(turns, "pairs")
    width, model = read_sizes(job["folder"]).row, engine(RewardModel(job["folder"]), 2, job["rows"])

    def step(number: int) -> int:
        pairs = rows.of_step(number)
        ids = padded([row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs], width)
        mask = ids != PAD
        model.backward(token_pair_loss(model(ids, mask), ids, mask))
        model.step()
        return int(mask.sum())

    return step


def token_pair_loss(values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values [2B,T], better answers first: the mean over pairs of the loss from where the two differ to the longer end.
    """
    losses = []
    for chosen, rejected, differs, real in zip(
        *values.chunk(2), ids[: len(ids) // 2] != ids[len(ids) // 2 :], mask[: len(ids) // 2] | mask[len(ids) // 2 :],
        strict=True,
    ):  # fmt: skip
        span = slice(int(differs.nonzero()[0]), int(real.sum()))
        losses.append(-logsigmoid(chosen[span] - rejected[span]).mean())
    return torch.stack(losses).mean()


# -- step 3 ------------------------------------------------------------------------------------------------------------


class PPO:
    """Four engines, one iteration after another."""

    def __init__(self, turns: Turns) -> None:
        self.turns, job = turns, turns.job
        folder, stage, rows = job["folder"], job["stage"], job["rows"]
        frozen = 3 if stage == 3 else 0
        self.sizes, self.rows = read_sizes(folder), Rows(turns, "prompts")
        self.actor = engine(open_actor(folder, job["actor"]), stage, rows)
        self.reference = engine(open_actor(folder, job["actor"]), frozen, rows, trained=False)
        self.critic = engine(RewardModel(folder), stage, rows)
        self.reward = engine(RewardModel(folder), frozen, rows, trained=False)

    def iteration(self, number: int) -> int:
        sequences = self.rollout(number)
        self.turns.switch("score")
        experience = self.score(sequences)
        self.turns.switch("update")
        self.update(sequences, *experience)
        return int((sequences[:, self.sizes.prompt :] != PAD).sum())

    @torch.no_grad()
    def rollout(self, number: int) -> torch.Tensor:
        """[B,P+R], padded to the limit."""
        sizes, job = self.sizes, self.turns.job
        prompts = torch.tensor([row["prompt"] for row in self.rows.of_step(number)])
        for model in (self.actor, self.reference, self.critic, self.reward):
            model.eval()
        limit = sizes.prompt + sizes.response
        sequences = self.actor.module.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_length=limit, pad_token_id=PAD, eos_token_id=EOS,
            synced_gpus=job["stage"] == 3, do_sample=job["sampled"], top_k=0,
        )  # fmt: skip
        return pad(sequences, (0, limit - sequences.shape[1]), value=PAD)

    @torch.no_grad()
    def score(self, sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, values, advantages and returns, [B,P+R-1] and [B,R]."""
        self.actor.train()
        self.critic.train()
        mask, start = sequences != PAD, self.sizes.prompt - 1
        logprobs, reference = (self.logprobs(model, sequences, mask) for model in (self.actor, self.reference))
        values = self.critic(sequences, mask)[:, :-1]
        ends = mask.sum(dim=1) - 1
        scores = self.reward(sequences, mask).gather(1, ends[:, None]).squeeze(1)
        rewards = -KL_COEF * (logprobs - reference)
        for row, end in enumerate(ends.tolist()):
            rewards[row, end - 1] += scores[row].clamp(-REWARD_CLIP, REWARD_CLIP)
            rewards[row, end:], values[row, end:] = 0, 0
        advantages, last = [], torch.zeros(len(values))
        for place in reversed(range(start, values.shape[1])):
            after = values[:, place + 1] if place + 1 < values.shape[1] else 0.0
            last = rewards[:, place] + GAMMA * after - values[:, place] + GAMMA * LAM * last
            advantages.append(last)
        found = torch.stack(advantages[::-1], dim=1)
        return logprobs, values, found, found + values[:, start:]

    def logprobs(self, model: Any, sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=sequences, attention_mask=mask, use_cache=False).logits[:, :-1]
        return logits.log_softmax(dim=-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)

    def update(self, sequences: torch.Tensor, old: torch.Tensor, values: torch.Tensor, *targets: torch.Tensor) -> None:
        start, mask = self.sizes.prompt - 1, sequences != PAD
        advantages, returns = targets
        real = mask[:, 1:][:, start:]
        new = self.logprobs(self.actor, sequences, mask)[:, start:]
        ratio = ((new - old[:, start:]) * real).exp()
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        self.actor.backward((losses * real).sum() / real.sum())
        self.actor.step()
        found, before = self.critic(sequences, mask)[:, start:-1], values[:, start:]
        clipped = found.clamp(before - CLIP, before + CLIP)
        errors = torch.maximum((found - returns) ** 2, (clipped - returns) ** 2)
        self.critic.backward(0.5 * (errors * real).sum() / real.sum())
        self.critic.step()


def main() -> None:
    turns = Turns()
    torch.manual_seed(turns.rank)
    deepspeed.init_distributed()
    if turns.job["what"] == "ppo":
        step, first = PPO(turns).iteration, "rollout"
    else:
        step, first = {"sft": sft, "reward_model": reward_model}[turns.job["what"]](turns), "step"
    for number in count():
        turns.begin(first)
        turns.end(step(number))


if __name__ == "__main__":
    main()
