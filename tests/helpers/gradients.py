"""Gradients of an optimizer step, twice: by an oracle in float64, and as DeepSpeed hands them to the optimizer.

The oracle is transformers' own model, one row at a time and without padding, with the losses written out: sum over all
real tokens (or prompts) of the step, divided once by their count. The other is read off an SGD step: with learning rate
RATE and no momentum, weights before - weights after is RATE * gradient. RATE is so large that the weights' own rounding
vanishes, and a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import tiny
from tristage import engine
from tristage.batches import Experience, Sequences
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_prompts
from tristage.data.loader import deal
from tristage.models.tokenizer import load_tokenizer

RATE = 2.0**14
ROWS = 8
CPU = torch.device("cpu")
# (ranks, micro-batch): what each rank runs of the 8 rows follows from it.
LAYOUTS = [(1, 8), (1, 1), (2, 4), (2, 2)]
TOLERANCE = 1e-5  # of a parameter's largest gradient

# Very different lengths, so that a mean of means would not pass.
SFT_LENGTHS = [(9, 1), (4, 2), (12, 3), (3, 5), (20, 8), (5, 13), (7, 25), (2, 60)]
ANSWERS = [(2, 1, 9), (30, 2), (1, 4, 16, 40, 3), (5, 6), (8, 1, 1), (12, 50), (3, 9, 27)]  # lengths, prompt by prompt
RANKS = [(1, 0, 2), (0, 1), (3, 1, 0, 2, 4), (1, 0), (0, 1, 1), (1, 0), (2, 1, 0)]  # one tie; 1 to 10 pairs a prompt
RESPONSES = [1, 40, 2, 3, 25, 5, 1, 14]
PROMPTS = [20, 3, 11, 7, 2, 16, 5, 9]
TEMPERATURE, CLIP = 0.7, 0.2


# ---- the rows --------------------------------------------------------------------------------------------------------


def sft_rows(tokenizer: Any, case: str) -> list[Any]:
    """8 rows; "sft_last" is the short last step of an epoch: 3 rows, fillers for the others."""
    rows = tiny.random_examples(SFT_LENGTHS, tokenizer)
    return rows[3:6] if case == "sft_last" else rows


def ranking_rows(tokenizer: Any) -> list[Any]:
    """7 prompts (the eighth place is a filler) with 2 to 5 answers."""
    return [
        (tiny.random_examples([(4 + i, n) for n in lengths], tokenizer, seed=i), tuple(map(float, ranks)))
        for i, (lengths, ranks) in enumerate(zip(ANSWERS, RANKS, strict=True))
    ]


def ranking_lengths(rows: list[Any]) -> list[int]:
    return [max(len(example.ids) for example in examples) for examples, _ in rows]


def make_experience(tokenizer: Any, shift: dict[str, torch.Tensor]) -> Experience:
    """Random responses with advantages, returns and old numbers made up; `shift` is what the models say of them."""
    generator = torch.Generator().manual_seed(3)
    prompts = tiny.random_examples([(n - 1, 1) for n in PROMPTS], tokenizer, seed=5)
    batch = collate_prompts(prompts, range(ROWS), tokenizer.pad_token_id)
    columns = torch.arange(max(RESPONSES))
    lengths = torch.tensor(RESPONSES)[:, None]
    mask = columns < lengths
    ids = torch.randint(4, len(tokenizer), mask.shape, generator=generator)
    ended = (columns == lengths - 1) & (columns < len(columns) - 1)  # the longest is cut, without EOS
    ids = ids.masked_fill(ended, tokenizer.eos_token_id).masked_fill(~mask, tokenizer.pad_token_id)
    sequences = Sequences(
        torch.cat([batch.input_ids, ids], 1), torch.cat([batch.attention_mask, mask], 1),
        (tokenizer.eos_token_id,), batch.input_ids.shape[1],
    )  # fmt: skip

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(mask.shape, generator=generator) * scale * mask

    logprobs, values = shift["logprobs"] + noise(0.3), shift["values"] + noise(0.3)  # in and out of both clips
    return Experience(sequences, logprobs, logprobs + noise(0.1), values, noise(1.0), values + noise(1.0))


# ---- the oracle ------------------------------------------------------------------------------------------------------


def row_logprobs(model: Any, ids: list[int], start: int, temperature: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0] / temperature
    return torch.log_softmax(logits, -1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]


def row_values(model: Any, ids: list[int]) -> torch.Tensor:
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


def sft_row(model: Any, row: Any) -> tuple[torch.Tensor, int]:
    logprobs = row_logprobs(model, row.ids, row.prompt_length)
    return -logprobs.sum(), len(logprobs)


def unpadded(experience: Experience, row: int) -> tuple[list[int], int, torch.Tensor]:
    """(ids, where the response starts, its columns) of a row without its padding."""
    sequences = experience.sequences
    ids = sequences.input_ids[row][sequences.attention_mask[row]].tolist()
    return ids, int(sequences.prompt_mask[row].sum()), sequences.response_mask[row]


def policy_row(experience: Experience) -> Callable[[Any, Any], tuple[torch.Tensor, int]]:
    def loss(model: Any, row: int) -> tuple[torch.Tensor, int]:
        ids, start, kept = unpadded(experience, row)
        ratio = (row_logprobs(model, ids, start, TEMPERATURE) - experience.logprobs[row][kept].double()).exp()
        advantages = experience.advantages[row][kept].double()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return -gain.sum(), len(gain)

    return loss


class Oracle:
    """Loss, count and gradient of every row of a step, by one float64 backward each."""

    def __init__(self, auto_class: Any, path: str, rows: list[Any], lengths: list[int], loss: Any):
        model = auto_class.from_pretrained(path, dtype=torch.float64)
        self.lengths, self.losses, self.counts, self.gradients = lengths, [], [], []
        for row in rows:
            model.zero_grad()
            value, count = loss(model, row)
            value.backward()
            self.losses.append(value.item())
            self.counts.append(count)
            self.gradients.append({f"model.{n}": p.grad.numpy().copy() for n, p in model.named_parameters()
                                   if p.grad is not None})  # fmt: skip

    def gradient(self) -> dict[str, np.ndarray]:
        return self.weighted([1 / sum(self.counts)] * len(self.counts))

    def loss(self) -> float:
        return sum(self.losses) / sum(self.counts)

    def weighted(self, weights: list[float]) -> dict[str, np.ndarray]:
        return {
            name: sum(weight * gradient[name] for weight, gradient in zip(weights, self.gradients, strict=True))
            for name in self.gradients[0]
        }

    def mean_of_means(self, ranks: int, micro_batch: int) -> dict[str, np.ndarray]:
        """The wrong gradient: each micro-batch divides by its own count, then the micro-batches are averaged."""
        plan = BatchPlan.make(ROWS, micro_batch, ranks)
        dealt = [micro for rank in range(ranks) for micro in deal(range(len(self.counts)), self.lengths, plan, rank)]
        weights = [0.0] * len(self.counts)
        for micro in dealt:
            real = [row for row in micro if row is not None]
            for row in real:
                weights[row] = 1 / len(dealt) / sum(self.counts[other] for other in real)
        return self.weighted(weights)


def worst_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Over parameters: the largest difference, in units of the parameter's largest expected gradient.

    A gradient that is 0 on paper (a bias that moves all scores alike, in a loss of their differences) holds rounding
    alone; it is measured against the model's largest.
    """
    top = max(np.abs(gradient).max() for gradient in expected.values())
    return max(
        np.abs(found[name] - expected[name]).max() / max(np.abs(expected[name]).max(), 1e-2 * top) for name in expected
    )


# ---- what DeepSpeed makes of it --------------------------------------------------------------------------------------


def sgd(model: torch.nn.Module, config: dict[str, Any], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


class Step:
    """A trained engine around one optimizer step, whose gradient it reads off."""

    def __init__(self, load: Any, path: str, tokenizer: Any, config: dict[str, Any]):
        model = load(path, tokenizer, dtype=torch.float32, engine_config=config)
        optimizer = OptimizerSettings(learning_rate=RATE, schedule="constant")
        self.engine = engine.train_engine(model, config, optimizer, total_steps=1)
        self.before = {name: weights.clone() for name, weights in engine.full_state_dict(self.engine).items()}

    def result(self, metrics: dict[str, float], loss: str, norm: str) -> dict[str, Any]:
        after = engine.full_state_dict(self.engine)
        gradient = {name: (self.before[name] - after[name]).double().div(RATE).numpy() for name in after}
        return {"gradient": gradient, "loss": metrics[loss], "norm": metrics[norm]}


# ---- models ----------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, str]:
    """Models of two families, a reward model and an experience of theirs in `folder`; "settings" is for configs."""
    paths = {name: tiny.write_model(folder / name, name, gain=1.5) for name in ("gpt2", "llama_untied")}
    paths["reward"] = tiny.write_reward_model(folder / "reward", paths["gpt2"])
    paths["settings"], paths["experience"] = str(folder), str(folder / "experience.pt")
    tokenizer = load_tokenizer(paths["gpt2"])
    blank = make_experience(tokenizer, {"logprobs": torch.tensor(0.0), "values": torch.tensor(0.0)})
    policy = AutoModelForCausalLM.from_pretrained(paths["gpt2"], dtype=torch.float64)
    critic = AutoModelForSequenceClassification.from_pretrained(paths["reward"], dtype=torch.float64)
    said = {"logprobs": torch.zeros(blank.mask.shape), "values": torch.zeros(blank.mask.shape)}
    with torch.no_grad():
        for row in range(ROWS):
            ids, start, kept = unpadded(blank, row)
            said["logprobs"][row, kept] = row_logprobs(policy, ids, start, TEMPERATURE).float()
            said["values"][row, kept] = row_values(critic, ids)[start - 1 : -1].float()
    torch.save(make_experience(tokenizer, said), paths["experience"])
    return paths
