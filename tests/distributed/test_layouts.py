"""What one number of ranks and one ZeRO stage saved, another goes on with: every weight and moment, to the last bit."""

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
from tristage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import deal
from tristage.ema import WeightAverage
from tristage.engine import DTYPES, engine_config, train_engine
from tristage.models import load_causal_lm, load_tokenizer
from tristage.pieces import PieceReader

CPU = torch.device("cpu")
# (ranks, ZeRO stage, precision) of a writer -> those that read it; each reader steps on, and is compared with the rest.
LAYOUTS = {
    (2, 2, "float32"): [(2, 0, "float32"), (2, 1, "float32"), (2, 2, "float32"), (2, 3, "float32")],
    (2, 3, "float32"): [(2, 0, "float32"), (2, 2, "float32"), (2, 3, "float32"), (4, 3, "float32")],
    (2, 0, "float32"): [(1, 0, "float32"), (1, 3, "float32"), (4, 2, "float32"), (2, 2, "float32")],
    (1, 2, "float32"): [(2, 2, "float32"), (2, 3, "float32"), (4, 0, "float32"), (1, 2, "float32")],
    (2, 1, "bf16"): [(2, 1, "bf16"), (2, 2, "bf16"), (1, 0, "bf16"), (2, 3, "bf16"), (2, 0, "bf16"), (4, 1, "bf16")],
    (2, 0, "bf16"): [(2, 0, "bf16"), (1, 2, "bf16"), (4, 3, "bf16")],
}
WHOLE = 10**5  # parameters up to this size are not partitioned while they compute, as in the shipped ZeRO-3 JSON


def name_of(layout: tuple[int, int, str]) -> str:
    ranks, stage, precision = layout
    return f"{ranks}ranks_zero{stage}_{precision}"


def build(model: str, stage: int, precision: str, threshold: int) -> tuple[Any, Any, Any]:
    template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
    if stage == 3:
        template["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    plan = BatchPlan.make(8, 2, dist.world_size())
    config = engine_config(template, precision, plan, clip_norm=1.0)
    tokenizer = load_tokenizer(model)
    network = load_causal_lm(model, tokenizer, dtype=DTYPES[precision], engine_config=config)
    optimizer = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2)
    return train_engine(network, config, optimizer, total_steps=12), plan, tokenizer


def step(engine: Any, plan: Any, tokenizer: Any, number: int) -> float:
    lengths = [(3, 5), (2, 9), (7, 2), (4, 4), (1, 3), (6, 6), (2, 2), (5, 8)]
    rows = tiny.random_examples(lengths, tokenizer, seed=number)
    dealt = deal(range(len(rows)), [len(row.ids) for row in rows], plan, dist.rank())
    batches = [collate_sft(pick(rows, micro), tokenizer.pad_token_id) for micro in dealt]
    return sft_step(engine, batches, CPU)["sft/loss"]


def settings_in(folder: str, output: str) -> Any:
    return tiny.sft_config(Path(folder), "model", "rows.jsonl", 0, f"output={folder}/{output}", "check_disk=false")


def write(rank: int, folder: str, model: str, layouts: list[tuple[int, int, str]]) -> None:
    """Four steps in each layout, saved with a moving average."""
    dist.init("cpu")
    for layout in layouts:
        engine, plan, tokenizer = build(model, *layout[1:], threshold=0)
        average = WeightAverage(engine, 0.5)
        for number in range(4):
            step(engine, plan, tokenizer, number)
            average.update(number, skipped=False)
        own = average.pieces()
        save_checkpoint(settings_in(folder, name_of(layout)), 4, {"model": engine}, own=own)


def read(rank: int, folder: str, model: str, pairs: list[tuple[Any, Any]]) -> dict[str, list[float]]:
    """Each checkpoint loaded in another layout, saved again at once, then two steps: their losses."""
    dist.init("cpu")
    losses = {}
    for source, layout in pairs:
        settings = settings_in(folder, f"{name_of(source)}-{name_of(layout)}")
        written = Path(folder) / name_of(source) / "checkpoints" / "step_000004"
        found = Checkpoint(written, json.loads((written / "state.json").read_text()))
        engine, plan, tokenizer = build(model, *layout[1:], threshold=WHOLE if layout[0] == 2 else 0)
        average = WeightAverage(engine, 0.5)
        assert load_checkpoint(settings, found, {"model": engine}) == 4
        average.restore(found.pieces("own"))
        save_checkpoint(settings, 4, {"model": engine}, own=average.pieces())
        losses[settings.output] = [step(engine, plan, tokenizer, number) for number in (4, 5)]
        save_checkpoint(settings, 6, {"model": engine})
    return losses


PAIRS = [(source, layout) for source, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("layouts")
    model = tiny.write_model(folder / "model")
    losses = {}
    for ranks in (1, 2):
        run_ranks(ranks, write, str(folder), model, [source for source in LAYOUTS if source[0] == ranks])
    for ranks in (1, 2, 4):
        found = run_ranks(ranks, read, str(folder), model, [pair for pair in PAIRS if pair[1][0] == ranks])
        assert all(other == found[0] for other in found)
        losses |= found[0]
    return folder, losses


def tensors(folder: Path, which: str, ranks: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = PieceReader(folder / which, ranks)
    found = {}
    for name in reader.places:
        found[name] = torch.full((reader.total(name),), torch.nan)
        reader.read(name, 0, found[name])
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name_of(pair[0])}-{name_of(pair[1])}")
def test_every_weight_moment_and_average_carries_over_to_any_layout(pair, runs) -> None:
    source, layout = pair
    for which in ("model", "own"):
        theirs = tensors(runs[0] / name_of(source) / "checkpoints" / "step_000004", which, source[0])
        there = runs[0] / f"{name_of(source)}-{name_of(layout)}" / "checkpoints" / "step_000004"
        ours = tensors(there, which, layout[0])
        assert set(ours) == set(theirs) and len(theirs) > 10
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(torch.isnan(tensor).any() for tensor in ours.values())


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name_of(pair[0])}-{name_of(pair[1])}")
def test_a_run_that_went_on_in_another_layout_ends_as_one_that_did_not(pair, runs) -> None:
    """Losses of the two steps after it within 1e-5 of those in the writer's own layout (float32; bf16 rounds)."""
    source, layout = pair
    same = (source, source)
    if same not in PAIRS:
        same = next(other for other in PAIRS if other[0] == source)
    losses = {each: runs[1][str(runs[0] / f"{name_of(each[0])}-{name_of(each[1])}")] for each in (pair, same)}
    tolerance = 1e-5 if layout[2] == "float32" else 0.02
    assert losses[pair] == pytest.approx(losses[same], abs=tolerance, rel=0)
