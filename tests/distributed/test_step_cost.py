"""What an optimizer step of two ranks sends and copies: a collective or a copy that is added shows here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from step1_sft.train import sft_step
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.batches import SFTBatch
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_sft
from tristage.engine import engine_config, train_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer

REPO = Path(__file__).parents[2]
STEPS = 3
# Of one step at ZeRO 2: token count, gradients, overflow, flags, the norm of two parameter groups, metrics.
ALL_REDUCES, ALL_GATHERS = 7, 2


def run_steps(rank: int, path: str) -> dict[str, Any]:
    """{"default", "reduce_scatter": (counts of one step, weights after STEPS)}."""
    device, tokenizer = dist.init("cpu"), load_tokenizer(path)
    examples = tiny.random_examples([(5, 4), (7, 9)], tokenizer, seed=rank)
    batch = collate_sft(examples, tokenizer.pad_token_id)
    return {
        "default": trained(path, tokenizer, batch, device, {}),
        "reduce_scatter": trained(path, tokenizer, batch, device, {"reduce_scatter": True}),
    }


def trained(path: str, tokenizer: Any, batch: SFTBatch, device: torch.device, more: dict[str, bool]) -> Any:
    template = json.loads((REPO / "configs/deepspeed/zero2.json").read_text())
    template["zero_optimization"] |= more
    config = engine_config(template, "float32", BatchPlan.make(4, 2, 2), clip_norm=1.0)
    model = load_causal_lm(path, tokenizer, dtype=torch.float32, engine_config=config)
    engine = train_engine(model, config, OptimizerSettings(learning_rate=1e-2), 10)
    for _ in range(STEPS - 1):
        sft_step(engine, [batch], device)
    with torch.profiler.profile() as profile:
        sft_step(engine, [batch], device)
    counts = {event.key: event.count for event in profile.key_averages()}
    return counts, {name: weight.detach().numpy().copy() for name, weight in engine.module.named_parameters()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, run_steps, tiny.write_model(tmp_path_factory.mktemp("model")))


def test_a_step_has_no_more_collectives_than_its_parts_need(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        counts, _ = rank["default"]
        sent = {name.removeprefix("c10d::"): count for name, count in counts.items() if name.startswith("c10d::")}
        assert sent == {"allreduce_": ALL_REDUCES, "_allgather_base_": ALL_GATHERS}


def test_reducing_in_place_trains_the_same_weights_with_fewer_copies(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (counts, weights), (other_counts, other_weights) = rank["default"], rank["reduce_scatter"]
        assert counts["aten::cat"] == other_counts["aten::cat"] - 1  # the bucket is not flattened again
        assert all((weights[name] == other_weights[name]).all() for name in other_weights)
