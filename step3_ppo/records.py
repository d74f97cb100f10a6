"""What a run writes down: responses as a person reads them, numbers of every held-out prompt, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step3_ppo.build import PPORun
from step3_ppo.heldout import evaluate, samples_of
from step3_ppo.rollout import Responses, rows_of_all_ranks
from tristage import dist
from tristage.batches import PromptBatch
from tristage.intervals import win_rate
from tristage.training.metrics import RunLog, Stopwatch, is_due

JUDGES = {"score": "objective/win_rate", "grade": "objective/grade_win_rate"}  # column of heldout.jsonl -> metric


def write_heldout(run: PPORun, log: RunLog, watch: Stopwatch, iteration: int) -> None:
    """Evaluate the actor, and with `ema` its average, and write metrics, samples and every number. A collective."""
    with watch("evaluate"):
        found, averaged = evaluate(run, iteration), None
        if run.average is not None and iteration:
            with run.average.in_place():
                averaged = evaluate(run, iteration)
    metrics = found.metrics | watch.take()
    if dist.is_main():
        log.write_rows(iteration, found.columns())
        before = (log.rows_before_training() if iteration else None) or {}
        metrics |= win_rates(found.columns(), before)
        if averaged is not None:
            of_average = averaged.metrics | win_rates(averaged.columns(), before)
            metrics |= {f"ema/{name}": value for name, value in of_average.items()}
    log.write(iteration, "heldout", metrics)
    log.write_samples(iteration, found.samples[: run.settings.logged_samples])


def win_rates(now: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """How often a response is better than the one before training to the same prompt, by each judge that both have:
    the share, ties as half, and its 95 % interval.
    """
    found: dict[str, float] = {}
    for judge, metric in JUDGES.items():
        if judge in now and len(now[judge]) == len(before.get(judge, ())) and None not in before[judge]:
            rate, low, high = win_rate(now[judge], before[judge])
            found |= {metric: rate, f"{metric}_low": low, f"{metric}_high": high}
    return found


def write_samples(run: PPORun, log: RunLog, own: Responses, prompts: PromptBatch, iteration: int) -> None:
    """Write the first responses of a rollout, if the iteration is one of `samples_every`. A collective."""
    settings = run.settings
    if is_due(settings.samples_every, iteration):
        found = own.map(rows_of_all_ranks(prompts))
        rows = range(min(settings.logged_samples, settings.responses))
        log.write_samples(iteration, samples_of(found, run.inputs.tokenizer, "train", rows))
