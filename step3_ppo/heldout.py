"""A policy on held-out prompts: during training and on its own (evaluate.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step3_ppo.build import PPORun
from step3_ppo.rewards import decode
from step3_ppo.rollout import (
    Responses,
    prompt_batch,
    response_metrics,
    rows_of_all_ranks,
    sample_responses,
    score_responses,
)
from tristage import dist
from tristage.algo.masking import masked_sum
from tristage.answering.scorers import score_texts
from tristage.data.loader import evaluation_rows

EVALUATION_DRAW = 0  # iterations count from 1; every evaluation samples with the same numbers


@dataclass(frozen=True)
class Evaluation:
    """One sampled response to every held-out prompt: means, and on rank 0 each response."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # as samples.jsonl has them, in the order of the prompts; on other ranks none

    def columns(self) -> dict[str, list[float]]:
        """A line of heldout.jsonl: a number per prompt of score, KL, length, whether it ended, and any grade."""
        names = [name for name in ("score", "kl", "length", "ended", "grade") if name in self.samples[0]]
        return {name: [float(sample[name]) for sample in self.samples] for name in names}


def evaluate(run: PPORun, iteration: int = 0) -> Evaluation:
    """One sampled response to every held-out prompt after `iteration`, with the same random numbers each time. A
    collective.
    """
    inputs, settings, tokenizer = run.inputs, run.settings, run.inputs.tokenizer
    rows, grader = inputs.heldout, inputs.grader
    places = [row for (row,) in evaluation_rows(rows.lengths, 1, dist.world_size(), dist.rank())]
    batch = prompt_batch(rows, range(len(rows)), places, settings, tokenizer).to(run.device)
    with run.rollouts.fail_together():
        run.rollouts.sync_weights(iteration)
        sampled = sample_responses(run.rollouts, batch, settings.rollout, settings.seed, EVALUATION_DRAW)
    own = score_responses(run.engines, tokenizer, sampled, batch, settings, inputs.functions)
    gather = rows_of_all_ranks(batch)
    real = gather(batch.is_real)
    found = own.map(lambda x: gather(x)[real])
    metrics = {name: float(value) for name, value in response_metrics(found).items()}
    if not dist.is_main():
        return Evaluation(metrics, [])
    samples = samples_of(found, tokenizer, "heldout", range(len(rows)))
    if grader is not None:
        prompts, responses = ([sample[key] for sample in samples] for key in ("prompt", "response"))
        labels = [rows.labels(i) for i in range(len(rows))]
        grades = score_texts(grader, prompts, responses, f"grader {settings.grader}", labels).scores.tolist()
        metrics["objective/grade"] = sum(grades) / len(grades)
        samples = [sample | {"grade": grade} for sample, grade in zip(samples, grades, strict=True)]
    return Evaluation(metrics, samples)


def samples_of(found: Responses, tokenizer: Any, split: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """An entry of samples.jsonl for each of `rows`, without its step; KL and log-probability in nats."""
    sequences, mask = found.sequences, found.sequences.response_mask
    prompts = decode(tokenizer, sequences.input_ids[:, : sequences.prompt_columns], sequences.prompt_mask, rows)
    responses = decode(tokenizer, sequences.responses, mask, rows)
    columns = {
        "score": found.scores,
        "kl": found.kl,
        "reference_logprob": masked_sum(found.ref_logprobs, mask, dim=1),
        "length": mask.sum(dim=1),
        "ended": sequences.ended,
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    terms = {name: term.tolist() for name, term in found.terms.items()}
    extra = {name: term.tolist() for name, term in found.extra.items()}
    return [
        {"split": split, "row": row, "prompt": prompt, "response": response}
        | {name: column[row] for name, column in numbers.items()}
        | {"scores": {name: term[row] for name, term in terms.items()}}
        | {name: number[row] for name, number in extra.items() if math.isfinite(number[row])}
        for row, prompt, response in zip(rows, prompts, responses, strict=True)
    ]
