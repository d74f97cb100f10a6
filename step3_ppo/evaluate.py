"""A policy on held-out prompts: score, KL, length, and the grade of a rule that training never sees.

    python -m step3_ppo.evaluate --config configs/quickstart/step3_ppo.yaml actor.model=OUT/final reference.model=SFT
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Engines, collect, response_metrics, rows_of_all_ranks
from tristage import dist
from tristage.batches import PromptBatch
from tristage.data.collate import collate_prompts, pick
from tristage.data.loader import evaluation_rows
from tristage.data.store import Rows
from tristage.errors import UserError
from tristage.metrics import Stopwatch
from tristage.rollout import PaddedRollout

Grader = Callable[[list[str], list[str]], list[float]]
EVALUATION_DRAW = 0  # iterations count from 1; every evaluation samples with the same numbers


def load_grader(name: str | None, file: str) -> Grader | None:
    """The function that `grader` names. Raises UserError when it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: key `grader`: {name} cannot be imported ({error}); write module:function") from None


def prompt_batch(rows: Rows, indices: list[int | None], settings: PPOConfig, tokenizer: Any) -> PromptBatch:
    """Some prompts, left padded to max_prompt_tokens, so that all ranks have as many columns."""
    return collate_prompts(pick(rows, indices), indices, tokenizer.pad_token_id, settings.max_prompt_tokens)


def evaluate(
    engines: Engines,
    rollouts: PaddedRollout,
    rows: Rows,
    settings: PPOConfig,
    tokenizer: Any,
    grader: Grader | None,
    device: torch.device,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, samples) of one sampled response to every held-out prompt. A collective."""
    indices = [row for (row,) in evaluation_rows(rows.lengths, 1, dist.world_size(), dist.rank())]
    batch = prompt_batch(rows, indices, settings, tokenizer).to(device)
    own = collect(engines, rollouts, batch, EVALUATION_DRAW, settings, Stopwatch(device))
    gather = rows_of_all_ranks(batch)
    sequences = own.sequences.map(gather)
    logprobs, ref_logprobs, entropy, scores, real = (
        gather(x) for x in (own.logprobs, own.ref_logprobs, own.entropy, own.scores, batch.is_real)
    )
    found = response_metrics(sequences, logprobs, ref_logprobs, entropy, scores, real.float())
    metrics = {name: float(value) for name, value in found.items()}
    if not dist.is_main():
        return metrics, []
    kept = real.nonzero().flatten().tolist()
    prompts = _decode(tokenizer, sequences.input_ids[:, : sequences.prompt_columns], sequences.prompt_mask, kept)
    responses = _decode(tokenizer, sequences.responses, sequences.response_mask, kept)
    samples = [
        {"prompt": prompt, "response": response, "score": float(scores[row])}
        for prompt, response, row in zip(prompts, responses, kept, strict=True)
    ]
    if grader is not None:
        grades = grader(prompts, responses)
        metrics["objective/grade"] = sum(grades) / len(grades)
        for sample, grade in zip(samples, grades, strict=True):
            sample["grade"] = grade
    return metrics, samples[: settings.num_samples]


def _decode(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[str]:
    kept = [ids[row][mask[row]].tolist() for row in rows]
    return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]
