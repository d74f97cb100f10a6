"""A policy on held-out prompts: during training and on its own (evaluate.py)."""

from __future__ import annotations

from typing import Any

from step3_ppo.build import PPORun
from step3_ppo.rewards import decode, score_texts
from step3_ppo.rollout import prompt_batch, response_metrics, rows_of_all_ranks, sample_responses, score_responses
from tristage import dist
from tristage.data.loader import evaluation_rows

EVALUATION_DRAW = 0  # iterations count from 1; every evaluation samples with the same numbers


def evaluate(run: PPORun, iteration: int = 0) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, samples) of one sampled response to every held-out prompt after `iteration`. A collective."""
    inputs, settings, tokenizer = run.inputs, run.settings, run.inputs.tokenizer
    rows, grader = inputs.heldout, inputs.grader
    places = [row for (row,) in evaluation_rows(rows.lengths, 1, dist.world_size(), dist.rank())]
    batch = prompt_batch(rows, range(len(rows)), places, settings, tokenizer).to(run.device)
    with run.rollouts.fail_together():
        run.rollouts.sync_weights(iteration)
        sampled = sample_responses(run.rollouts, batch, settings.rollout, settings.seed, EVALUATION_DRAW)
    own = score_responses(run.engines, tokenizer, sampled, batch, settings, inputs.functions)
    gather = rows_of_all_ranks(batch)
    sequences = sampled.sequences.map(gather)
    logprobs, ref_logprobs, entropy, scores, real = (
        gather(x) for x in (own.logprobs, own.ref_logprobs, own.entropy, own.scores, batch.is_real)
    )
    terms = {name: gather(term) for name, term in own.terms.items()}
    found = response_metrics(sequences, logprobs, ref_logprobs, entropy, scores, terms, real.float())
    metrics = {name: float(value) for name, value in found.items()}
    if not dist.is_main():
        return metrics, []
    kept = real.nonzero().flatten().tolist()
    prompts = decode(tokenizer, sequences.input_ids[:, : sequences.prompt_columns], sequences.prompt_mask, kept)
    responses = decode(tokenizer, sequences.responses, sequences.response_mask, kept)
    samples = [
        {"prompt": prompt, "response": response, "score": float(scores[row])}
        for prompt, response, row in zip(prompts, responses, kept, strict=True)
    ]
    if grader is not None:
        grades = score_texts(grader, prompts, responses, f"grader {settings.grader}").tolist()
        metrics["objective/grade"] = sum(grades) / len(grades)
        for sample, grade in zip(samples, grades, strict=True):
            sample["grade"] = grade
    return metrics, samples[: settings.logged_samples]
