"""A policy on held-out prompts: score, KL, length, and the grade of a rule that training never sees.

    python -m step3_ppo.evaluate --config configs/quickstart/step3_ppo.yaml actor.model=OUT/final reference.model=SFT
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines, build_engines, check_models, engine_configs
from step3_ppo.rewards import RewardTerm, TextScorer, check_turns, decode, load_grader, load_reward_terms, score_texts
from step3_ppo.rollout import collect, make_rollouts, response_metrics, rows_of_all_ranks
from tristage import dist
from tristage.batches import PromptBatch
from tristage.config import BatchPlan, load_config
from tristage.data.collate import collate_prompts
from tristage.data.loader import evaluation_rows
from tristage.data.sets import load_heldout
from tristage.data.store import Rows
from tristage.errors import UserError
from tristage.rollout import PaddedRollout
from tristage.training import run
from tristage.training.metrics import Stopwatch

EVALUATION_DRAW = 0  # iterations count from 1; every evaluation samples with the same numbers


def prompt_batch(
    rows: Rows,
    indices: Sequence[int],
    places: Sequence[int | None],
    settings: PPOConfig,
    tokenizer: Any,
    samples: int = 1,
) -> PromptBatch:
    """This rank's prompts, each `samples` times, left padded to max_prompt_tokens: all ranks have as many columns.

    `indices` are the prompts of all ranks, `places` those in `indices` that are this rank's (None: a filler).
    """
    wide = [place for place in places for _ in range(samples)]
    draws = [None if place is None else place * samples + i % samples for i, place in enumerate(wide)]
    examples = [None if place is None else rows[indices[place]] for place in wide]
    turns = None
    if settings.reward.retokenize:
        turns = [None if place is None else rows.turns(indices[place]) for place in wide]
    return collate_prompts(examples, draws, tokenizer.pad_token_id, settings.max_prompt_tokens, turns)


def evaluate(
    engines: Engines,
    rollouts: PaddedRollout,
    rows: Rows,
    settings: PPOConfig,
    tokenizer: Any,
    functions: list[RewardTerm],
    grader: TextScorer | None,
    device: torch.device,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, samples) of one sampled response to every held-out prompt. A collective."""
    places = [row for (row,) in evaluation_rows(rows.lengths, 1, dist.world_size(), dist.rank())]
    batch = prompt_batch(rows, range(len(rows)), places, settings, tokenizer).to(device)
    own = collect(engines, rollouts, batch, EVALUATION_DRAW, settings, Stopwatch(device), functions)
    gather = rows_of_all_ranks(batch)
    sequences = own.sequences.map(gather)
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
    return metrics, samples[: settings.num_samples]


def main(argv: list[str]) -> None:
    settings = load_config(PPOConfig, argv)
    dist.check_device(settings.device, settings.file)
    if settings.reference is None:
        raise UserError(
            f"{settings.file}: key `reference` is missing; an exported folder has no adapters to switch off, give "
            "reference.model (where actor.lora started) and reference.deepspeed"
        )
    configs = engine_configs(settings, BatchPlan.make(dist.world_size(), 1, dist.world_size()))
    configs.pop("critic", None)
    tokenizer = check_models(settings)
    functions = load_reward_terms(settings)
    grader = load_grader(settings)
    heldout = load_heldout(settings, tokenizer)
    check_turns(settings, heldout)
    device = dist.init(settings.device)
    engines = build_engines(settings, configs, tokenizer, train=False)
    rollouts = make_rollouts(engines, tokenizer, settings)
    metrics, samples = evaluate(engines, rollouts, heldout, settings, tokenizer, functions, grader, device)
    for sample in samples:
        dist.print0(f"\n{sample['prompt']}\n-> {sample['response']}\n   score {sample['score']:.3f}")
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)
