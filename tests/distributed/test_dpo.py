"""DPO, IPO and SimPO on ranks: the gradient of a step does not depend on its layout, nor the run on the ZeRO stage.

Gradients as in helpers/gradients.py: transformers' own model in float64, one answer at a time and without padding,
against what DeepSpeed hands to the optimizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import step2_dpo.train
from step2_dpo.config import DPOConfig
from step2_dpo.reference import PrecomputedReference
from tests.helpers import tiny
from tests.helpers.gradients import (
    CPU,
    LAYOUTS,
    ROWS,
    TOLERANCE,
    Oracle,
    Step,
    ranking_lengths,
    ranking_rows,
    row_logprobs,
    sgd,
    worst_difference,
)
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.config import BatchPlan
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import deal
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer
from tristage.training.metrics import read_metrics

BETA, SMOOTHING, GAMMA = 0.1, 0.2, 1.0
LOSSES = {
    "sigmoid": [f"beta={BETA}", f"label_smoothing={SMOOTHING}"],
    "ipo": ["loss=ipo", f"beta={BETA}"],
    "simpo": ["loss=simpo", "beta=2.0", f"gamma={GAMMA}"],
}
STAGES = (0, 1, 2, 3)
COMPARED = ("dpo/loss", "dpo/accuracy", "dpo/margin", "dpo/chosen_reward", "dpo/chosen_logprob", "optimizer/grad_norm")
RTOL, ATOL = 1e-5, 2e-6  # margins are small differences of log-probabilities of size 20


# ---- gradients ------------------------------------------------------------------------------------------------------


def reference_of(path: str, rows: list[Any]) -> PrecomputedReference:
    """Log-probabilities near those of the policy in `path`: log-ratios of some nats, both ways."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    answers = [answer for examples, _ in rows for answer in examples]
    with torch.no_grad():
        said = [float(row_logprobs(model, answer.ids, answer.prompt_length).sum()) for answer in answers]
    noise = np.random.default_rng(0).normal(scale=3.0, size=len(said))
    starts = np.cumsum([0, *(len(examples) for examples, _ in rows)])
    return PrecomputedReference((np.array(said) + noise).astype(np.float32), starts)


def prompt_row(
    loss: str, rows: list[Any], known: PrecomputedReference
) -> Callable[[Any, Any], tuple[torch.Tensor, int]]:
    """The loss of one prompt, written out; `rows` find its place."""

    def one(model: Any, row: Any) -> tuple[torch.Tensor, int]:
        examples, ranks = row
        tokens = [row_logprobs(model, answer.ids, answer.prompt_length) for answer in examples]
        start = known.starts[rows.index(row)]
        ratios = [found.sum() - float(known.logprobs[start + i]) for i, found in enumerate(tokens)]
        losses = []
        for i, j in [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]:
            gap = BETA * (ratios[i] - ratios[j])
            if loss == "sigmoid":
                losses.append(-(1 - SMOOTHING) * F.logsigmoid(gap) - SMOOTHING * F.logsigmoid(-gap))
            elif loss == "ipo":
                mean_gap = ratios[i] / len(tokens[i]) - ratios[j] / len(tokens[j])
                losses.append((mean_gap - 1 / (2 * BETA)) ** 2)
            else:
                losses.append(-F.logsigmoid(2.0 * (tokens[i].mean() - tokens[j].mean()) - GAMMA))
        return torch.stack(losses).mean(), 1

    return one


def make_settings(folder: str, path: str, loss: str) -> DPOConfig:
    return tiny.dpo_config(Path(folder) / f"{loss}{dist.rank()}", path, "unused", 0, *LOSSES[loss])


def run_gradients(rank: int, folder: str, path: str, stages: list[int], micro_batches: list[int]) -> dict[Any, Any]:
    """{(loss, stage, micro-batch): result} of one optimizer step each; all but "sigmoid" with the last layout alone."""
    found: dict[Any, Any] = {}
    tokenizer = load_tokenizer(path)
    rows = ranking_rows(tokenizer)
    known = reference_of(path, rows)
    with mock.patch.object(engine.engines, "_adamw", sgd):
        dist.init("cpu")
        for stage in stages:
            template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
            for micro_batch in micro_batches:
                plan = BatchPlan.make(ROWS, micro_batch, dist.world_size())
                config = engine.engine_config(template, "float32", plan)
                dealt = deal(range(len(rows)), ranking_lengths(rows), plan, dist.rank())
                batches = [(micro, collate_ranking(pick(rows, micro), tokenizer.pad_token_id)) for micro in dealt]
                for loss in LOSSES if micro_batch == micro_batches[-1] else ["sigmoid"]:
                    step = Step(load_causal_lm, path, tokenizer, config)
                    reference = (lambda micro, batch: None) if loss == "simpo" else known
                    settings = make_settings(folder, path, loss)
                    metrics, _ = step2_dpo.train.dpo_step(step.engine, reference, batches, settings, CPU)
                    found[loss, stage, micro_batch] = step.result(metrics, "dpo/loss", "optimizer/grad_norm")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("dpo_gradients") / "gpt2", "gpt2", gain=1.5)


@pytest.fixture(scope="module")
def results(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """{(ranks, loss, stage, micro-batch): result}; two ranks start once for all their cases."""
    folder = str(tmp_path_factory.mktemp("settings"))
    with tiny.one_rank():
        alone = run_gradients(0, folder, model, [0, 2], [8, 1])
    together = run_ranks(2, run_gradients, folder, model, [0, 1, 2, 3], [4, 2])[0]
    return {(1, *key): value for key, value in alone.items()} | {(2, *key): value for key, value in together.items()}


@pytest.fixture(scope="module")
def oracles(model: str) -> dict[str, Oracle]:
    rows = ranking_rows(load_tokenizer(model))
    known = reference_of(model, rows)
    return {
        loss: Oracle(AutoModelForCausalLM, model, rows, ranking_lengths(rows), prompt_row(loss, rows, known))
        for loss in LOSSES
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_the_float64_oracle_for_every_layout_and_zero_stage(
    loss: str, results: dict[Any, Any], oracles: dict[str, Oracle]
) -> None:
    expected = oracles[loss].gradient()
    own = {key: value for key, value in results.items() if key[1] == loss}
    layouts = {(ranks, micro_batch) for ranks, _, _, micro_batch in own}
    assert layouts == (set(LAYOUTS) if loss == "sigmoid" else {(1, 1), (2, 2)})
    assert {stage for _, _, stage, _ in own} == set(STAGES)
    worst = {key: worst_difference(value["gradient"], expected) for key, value in own.items()}
    print(f"{loss}: largest relative difference {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ranks, micro_batch", LAYOUTS[1:])
def test_the_mean_of_micro_batch_means_would_be_another_gradient(
    loss: str, ranks: int, micro_batch: int, oracles: dict[str, Oracle]
) -> None:
    """One of the eight places is a filler, so its micro-batch has a prompt less than the others."""
    wrong = oracles[loss].mean_of_means(ranks, micro_batch)
    assert worst_difference(wrong, oracles[loss].gradient()) > 0.01


@pytest.mark.parametrize("loss", LOSSES)
def test_reported_loss_and_gradient_norm_are_those_of_the_whole_step(
    loss: str, results: dict[Any, Any], oracles: dict[str, Oracle]
) -> None:
    norm = sum((gradient**2).sum() for gradient in oracles[loss].gradient().values()) ** 0.5
    for key, value in results.items():
        if key[1] == loss:
            assert value["loss"] == pytest.approx(oracles[loss].loss(), rel=1e-5), key
            assert value["norm"] == pytest.approx(norm, rel=1e-5), key


# ---- ZeRO stages ----------------------------------------------------------------------------------------------------


def run_jobs(rank: int, jobs: list[list[str]]) -> None:
    for argv in jobs:
        step2_dpo.train.main(argv)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of each loss at each stage, on rankings, from a model that was taught a little."""
    folder = tmp_path_factory.mktemp("dpo_stages")
    rows = tiny.write_rows(folder / "rows")
    model = tiny.teach(tiny.write_model(folder / "model"), rows["sft"])
    jobs = []
    for loss, words in LOSSES.items():
        for stage in STAGES:
            here = folder / f"{loss}{stage}"
            jobs.append(["--config", tiny.dpo_config(here, model, rows["ranking"], stage, *words).file, *words])
    run_ranks(2, run_jobs, [[*argv, "max_steps=3"] for argv in jobs], timeout=600)
    return folder


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_three_steps_agree_across_zero_stages(loss: str, stage: int, runs: Path) -> None:
    ours, theirs = (read_metrics(runs / f"{loss}{own}/dpo/metrics.jsonl") for own in (stage, 0))
    assert [(line["step"], line["split"]) for line in ours] == [
        (0, "heldout"), (1, "train"), (2, "train"), (3, "train"), (3, "heldout"),
    ]  # fmt: skip
    worst = 0.0
    for mine, its in zip(ours, theirs, strict=True):
        for name in COMPARED if mine["split"] == "train" else COMPARED[:-1]:
            worst = max(worst, abs(mine[name] - its[name]) / (RTOL * abs(its[name]) + ATOL))
    print(f"{loss}, stage {stage}: largest difference {worst:.2g} of what is allowed")
    assert worst < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_the_compared_steps_move_the_policy(loss: str, runs: Path) -> None:
    lines = [line for line in read_metrics(runs / f"{loss}0/dpo/metrics.jsonl") if line["split"] == "heldout"]
    assert all(math.isfinite(value) for line in lines for value in line.values() if not isinstance(value, str))
    assert abs(lines[-1]["dpo/chosen_logprob"] - lines[0]["dpo/chosen_logprob"]) > 0.1
