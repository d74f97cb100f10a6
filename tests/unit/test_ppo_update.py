"""Which rows the optimizer steps of one PPO iteration take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import step3_ppo.update
from step3_ppo.engines import Engines
from step3_ppo.train import which_limit
from tests.helpers import tiny
from tristage.config import BatchPlan

ROWS, MINIBATCH, EPOCHS = 24, 4, 3


@pytest.fixture
def dealt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of the iteration: for each of its PPO epochs, the rows of every optimizer step."""
    words = [f"rollout.prompts={ROWS}", f"ppo.minibatch={MINIBATCH}", f"ppo.epochs={EPOCHS}", "ppo.micro_batch=2"]
    settings = tiny.ppo_config(tmp_path, "actor", "reward", "rows.jsonl", 0, *words)
    steps: list[list[int]] = []
    monkeypatch.setattr(step3_ppo.update.Minibatch, "step", lambda self, rows, *_: steps.append(rows))
    engine = SimpleNamespace(train=lambda: None)
    sequences = SimpleNamespace(attention_mask=torch.ones(ROWS, 5, dtype=torch.bool))
    experience: Any = SimpleNamespace(logprobs=torch.zeros(ROWS, 3), sequences=sequences)
    plan = BatchPlan.make(MINIBATCH, 2, 1)

    def rows_of(iteration: int) -> list[list[list[int]]]:
        steps.clear()
        step3_ppo.update.ppo_update(Engines(engine, engine, None, None), experience, iteration, settings, plan)
        each = ROWS // MINIBATCH
        return [steps[start : start + each] for start in range(0, len(steps), each)]

    return rows_of


def as_sets(steps: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(rows) for rows in steps}


@pytest.mark.parametrize("words, steps", [
    ([], "24 optimizer steps"),
    (["ppo.target_kl=1"], "24 optimizer steps at most"),
])  # fmt: skip
def test_what_ends_a_run_is_said_in_iterations_steps_and_passes(tmp_path: Path, words: list[str], steps: str) -> None:
    given = ["iterations=3", "rollout.prompts=16", "ppo.minibatch=4", "ppo.epochs=2", *words]
    settings = tiny.ppo_config(tmp_path, "actor", "reward", "rows.jsonl", 0, *given)
    assert which_limit(settings, 32) == f"iterations end the run at 3: {steps}, 1.5 passes over 32 prompts"


def test_every_epoch_takes_every_row_once(dealt: Any) -> None:
    epochs = dealt(1)
    assert len(epochs) == EPOCHS
    for steps in epochs:
        assert [len(rows) for rows in steps] == [MINIBATCH] * (ROWS // MINIBATCH)
        assert sorted(row for rows in steps for row in rows) == list(range(ROWS))


def test_rows_are_dealt_into_other_minibatches_in_each_epoch_and_iteration(dealt: Any) -> None:
    """Not the same sets of rows in another order: other sets."""
    made = [as_sets(steps) for iteration in (1, 2) for steps in dealt(iteration)]
    assert not set.intersection(*made)
    for i, one in enumerate(made):
        assert all(one != other for other in made[:i])


def test_an_iteration_that_is_run_again_deals_the_same_minibatches(dealt: Any) -> None:
    assert dealt(2) == dealt(2)
