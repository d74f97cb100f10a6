"""The reward model's other losses: their gradient does not depend on how prompts were dealt to ranks either.

As helpers/gradients.py: transformers' own model in float64, an answer at a time and without padding, against what
DeepSpeed hands to the optimizer. Here answers of a prompt begin alike, and one is the beginning of another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from step2_reward_model.train import reward_model_step
from tests.helpers import oracles, tiny
from tests.helpers.gradients import (
    CPU,
    ROWS,
    TOLERANCE,
    Oracle,
    Step,
    ranking_lengths,
    row_values,
    sgd,
    worst_difference,
)
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.algo.losses import ELO_K_FACTOR, ELO_ROUNDS
from tristage.config import BatchPlan
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import deal
from tristage.data.tokenize import Example
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

OPTIONS = {"margin": 0.3, "label_smoothing": 0.1, "centering": 0.05}
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "pairs with options": ("pairs", OPTIONS),
    "tokens": ("tokens", {}),
    "tokens with options": ("tokens", OPTIONS),
    "elo": ("elo", {}),
}
# Prompt by prompt: (tokens that the answers share, tokens of each after them, ranks); the eighth place is a filler.
PROMPTS = [
    (3, (2, 1, 9), (1, 0, 2)),
    (0, (30, 2), (0, 1)),
    (5, (1, 4, 16, 40, 3), (3, 1, 0, 2, 4)),
    (9, (0, 6), (1, 0)),  # one is the beginning of the other
    (1, (8, 1, 1), (0, 1, 1)),
    (20, (12, 25), (1, 0)),
    (2, (3, 9, 0), (2, 1, 0)),
]


def prompt_rows(tokenizer: Any) -> list[Any]:
    rows = []
    for i, (shared, tails, ranks) in enumerate(PROMPTS):
        beginning = tiny.random_examples([(4 + i, shared + 1)], tokenizer, seed=i)[0].ids[:-1]
        ends = [example.ids[:-1] for example in tiny.random_examples([(n, 1) for n in tails], tokenizer, seed=50 + i)]
        rows.append(([Example([*beginning, *end], 4 + i) for end in ends], tuple(map(float, ranks))))
    return rows


def compared(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """The places of two answers that `loss: tokens` compares."""
    shorter = min(len(first), len(second))
    apart = [t for t in range(shorter) if first[t] != second[t]]
    return [(t, t) for t in range(apart[0], shorter)] if apart else [(len(first) - 1, len(second) - 1)]


def prompt_loss(form: str, options: dict[str, float]) -> Callable[[Any, Any], tuple[torch.Tensor, int]]:
    margin, e, centering = (options.get(name, 0.0) for name in ("margin", "label_smoothing", "centering"))

    def comparison(better: torch.Tensor, worse: torch.Tensor, ranks_apart: float) -> torch.Tensor:
        gap = better - worse - margin * ranks_apart
        return -(1 - e) * F.logsigmoid(gap) - e * F.logsigmoid(-gap) + centering * (better + worse) ** 2

    def loss(model: Any, row: Any) -> tuple[torch.Tensor, int]:
        answers, ranks = row
        values = [row_values(model, answer.ids) for answer in answers]
        if form == "elo":
            index = torch.zeros(len(ranks), dtype=torch.long)
            targets = oracles.elo_ratings(index, torch.tensor(ranks), ELO_K_FACTOR, ELO_ROUNDS)
            return torch.stack([(v[-1] - t) ** 2 for v, t in zip(values, targets, strict=True)]).mean(), 1
        losses = []
        for i, j in oracles.ranking_pairs(torch.zeros(len(ranks)), torch.tensor(ranks)):
            places = compared(answers[i].ids, answers[j].ids) if form == "tokens" else [(-1, -1)]
            own = [comparison(values[i][s], values[j][t], ranks[j] - ranks[i]) for s, t in places]
            losses.append(torch.stack(own).mean())
        return torch.stack(losses).mean(), 1

    return loss


def run_all(rank: int, path: str, layouts: list[tuple[int, int]]) -> dict[Any, Any]:
    """{(case, stage, micro-batch): result} of `layouts`, which are (stage, micro-batch)."""
    tokenizer = load_tokenizer(path)
    rows, found = prompt_rows(tokenizer), {}
    with mock.patch.object(engine.engines, "_adamw", sgd):
        dist.init("cpu")
        for stage, micro_batch in layouts:
            plan = BatchPlan.make(ROWS, micro_batch, dist.world_size())
            config = engine.engine_config(json.loads(Path(tiny.deepspeed_json(stage)).read_text()), "float32", plan)
            dealt = deal(range(len(rows)), ranking_lengths(rows), plan, dist.rank())
            batches = [collate_ranking(pick(rows, micro), tokenizer.pad_token_id) for micro in dealt]
            for case, (form, options) in CASES.items():
                step = Step(load_reward_model, path, tokenizer, config)
                metrics, _ = reward_model_step(step.engine, batches, form, CPU, **options)
                found[case, stage, micro_batch] = step.result(metrics, "reward_model/loss", "optimizer/grad_norm")
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward losses")
    return tiny.write_reward_model(folder / "reward", tiny.write_model(folder / "gpt2", "gpt2", gain=1.5))


@pytest.fixture(scope="module")
def results(path: str) -> dict[Any, Any]:
    with tiny.one_rank():
        alone = run_all(0, path, [(0, 8), (2, 1)])
    together = run_ranks(2, run_all, path, [(0, 4), (1, 2), (2, 2), (3, 4), (3, 2)])[0]
    return {(1, *key): value for key, value in alone.items()} | {(2, *key): value for key, value in together.items()}


@pytest.fixture(scope="module")
def expected(path: str) -> dict[str, Oracle]:
    rows, scorer = prompt_rows(load_tokenizer(path)), AutoModelForSequenceClassification
    return {
        case: Oracle(scorer, path, rows, ranking_lengths(rows), prompt_loss(form, options))
        for case, (form, options) in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_gradient_loss_and_norm_equal_the_float64_oracle_for_every_layout_and_zero_stage(
    case: str, results: dict[Any, Any], expected: dict[str, Oracle]
) -> None:
    gradient = expected[case].gradient()
    norm = sum((one**2).sum() for one in gradient.values()) ** 0.5
    own = {key: value for key, value in results.items() if key[1] == case}
    assert len(own) == 7
    for key, value in own.items():
        assert worst_difference(value["gradient"], gradient) < TOLERANCE, key
        assert value["loss"] == pytest.approx(expected[case].loss(), rel=1e-5), key
        assert value["norm"] == pytest.approx(norm, rel=1e-5), key


def test_the_cases_have_different_gradients(expected: dict[str, Oracle]) -> None:
    for case in CASES:
        for other in CASES:
            if case != other:
                assert worst_difference(expected[case].gradient(), expected[other].gradient()) > 0.01


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks, micro_batch", [(1, 1), (2, 2)])
def test_the_mean_of_micro_batch_means_would_be_another_gradient(
    case: str, ranks: int, micro_batch: int, expected: dict[str, Oracle]
) -> None:
    wrong = expected[case].mean_of_means(ranks, micro_batch)
    assert worst_difference(wrong, expected[case].gradient()) > 0.01
