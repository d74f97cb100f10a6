"""Held-out numbers of wide batches are those of one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import step1_sft.heldout
import step2_dpo.heldout
import step2_reward_model.heldout
from step2_dpo.reference import answer_logprobs, precompute
from step2_reward_model.train import normalize_scores
from tests.helpers import tiny
from tristage.data import loader
from tristage.data.sets import load_sets
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


class Engine:
    """What evaluations use of an engine, on one rank; counts forwards and their rows."""

    def __init__(self, model: Any) -> None:
        self.module, self.rows = model, []

    def __call__(self, input_ids: torch.Tensor, *masks: torch.Tensor) -> Any:
        self.rows.append(len(input_ids))
        return self.module(input_ids, *masks)

    def eval(self) -> None:
        self.module.eval()


class World:
    """A tiny model with its rows; `make` builds a step's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, tiny.write_rows(folder / "rows")
        self.path = tiny.write_model(folder / "model", gain=3.0)
        self.tokenizer = load_tokenizer(self.path)
        self.policy = Engine(load_causal_lm(self.path, self.tokenizer, dtype=torch.float32))
        self.scorer = Engine(load_reward_model(self.path, self.tokenizer, dtype=torch.float32, new_head_seed=0))

    def open(self, make: Callable[..., Any], rows: str) -> tuple[Any, Any, Any]:
        settings = make(self.folder, self.path, self.rows[rows])
        return settings, *load_sets(settings, self.tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("width"))


def sft(world: World) -> tuple[Engine, Any]:
    _, rows, _ = world.open(tiny.sft_config, "sft")
    return world.policy, step1_sft.heldout.evaluate(world.policy, rows, 4, world.tokenizer, CPU)


def reward_model(world: World) -> tuple[Engine, Any]:
    settings, rows, _ = world.open(tiny.reward_model_config, "ranking")
    return world.scorer, step2_reward_model.heldout.evaluate(
        world.scorer, rows, settings, world.tokenizer, CPU
    ).metrics()


def normalisation(world: World) -> tuple[Engine, Any]:
    settings, rows, _ = world.open(tiny.reward_model_config, "ranking")
    normalize_scores(world.scorer, rows, settings, world.tokenizer, CPU)
    model = world.scorer.module
    found = {"offset": model.score_offset, "scale": model.score_scale}
    model.model.config.update({"score_offset": 0.0, "score_scale": 1.0})
    return world.scorer, found


def dpo(world: World) -> tuple[Engine, Any]:
    settings, rows, _ = world.open(tiny.dpo_config, "preference")
    flat = lambda micro, batch: torch.zeros(len(batch.prompt_index))  # noqa: E731
    return world.policy, step2_dpo.heldout.evaluate(world.policy, flat, rows, settings, world.tokenizer, CPU)


@torch.no_grad()
def references(world: World) -> tuple[Engine, Any]:
    _, rows, _ = world.open(tiny.dpo_config, "preference")
    cached = precompute(
        lambda micro, batch: answer_logprobs(world.policy, batch), rows, 4, world.tokenizer.pad_token_id, CPU
    )
    return world.policy, {"logprobs": cached.logprobs, "starts": cached.starts}


def one_row_each(rows: list[int], lengths: np.ndarray, tokens: int) -> list[loader.RowNumbers]:
    return [[row] for row in rows]


@pytest.mark.parametrize("evaluation", [sft, reward_model, normalisation, dpo, references])
def test_wide_batches_give_the_numbers_of_single_rows_in_fewer_forwards(
    evaluation: Callable[[World], tuple[Engine, Any]], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loader.WIDTH, "cpu", loader.WIDTH["cuda"])
    engine, wide = evaluation(world)
    forwards, engine.rows[:] = len(engine.rows), []
    monkeypatch.setattr(loader, "_cut", one_row_each)
    _, narrow = evaluation(world)
    assert 4 * forwards <= len(engine.rows)
    engine.rows[:] = []
    assert wide.keys() == narrow.keys()
    for name in narrow:
        np.testing.assert_allclose(wide[name], narrow[name], rtol=2e-5, atol=2e-6, err_msg=name)
