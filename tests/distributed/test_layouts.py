"""What one number of ranks and one ZeRO stage saved, another goes on with: every weight and moment, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tristage.config import BatchPlan, OptimizerSettings
from tristage.engine import DTYPES, engine_config, train_engine
from tristage.engine.average import WeightAverage
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer
from tristage.storage.pieces import PieceReader

Layout = tuple[int, int, str]  # ranks, ZeRO stage, precision
# A writer -> those that read it. The first reader's losses are what the others' are compared with.
QUICK: dict[Layout, list[Layout]] = {
    (2, 2, "float32"): [(2, 2, "float32"), (1, 2, "float32"), (2, 3, "float32"), (4, 2, "float32")],
    (2, 3, "float32"): [(2, 3, "float32"), (2, 2, "float32"), (1, 0, "float32")],
    (1, 2, "float32"): [(1, 2, "float32"), (2, 2, "float32")],
    (2, 1, "bf16"): [(2, 1, "bf16"), (2, 2, "bf16")],
}
SLOW: dict[Layout, list[Layout]] = {
    (2, 2, "float32"): [(2, 2, "float32"), (2, 0, "float32"), (2, 1, "float32"), (4, 3, "float32")],
    (2, 3, "float32"): [(2, 3, "float32"), (2, 0, "float32"), (4, 3, "float32"), (4, 0, "float32")],
    (2, 0, "float32"): [(2, 0, "float32"), (1, 0, "float32"), (1, 3, "float32"), (4, 2, "float32"), (2, 2, "float32")],
    (1, 2, "float32"): [(1, 2, "float32"), (2, 3, "float32"), (4, 0, "float32")],
    (2, 1, "bf16"): [(2, 1, "bf16"), (1, 0, "bf16"), (2, 3, "bf16"), (2, 0, "bf16"), (4, 1, "bf16")],
    (2, 0, "bf16"): [(2, 0, "bf16"), (1, 2, "bf16"), (4, 3, "bf16")],
}
WHOLE = 10**5  # parameters up to this size are not partitioned while they compute, as in the shipped ZeRO-3 JSON


def name_of(layout: Layout) -> str:
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


def settings_in(folder: str, output: str) -> Any:
    return tiny.sft_config(Path(folder), "model", "rows.jsonl", 0, f"output={folder}/{output}", "check_disk=false")


def write(rank: int, folder: str, model: str, layouts: list[Layout]) -> None:
    """Four steps in each layout, saved with a moving average."""
    dist.init("cpu")
    for layout in layouts:
        engine, plan, tokenizer = build(model, *layout[1:], threshold=0)
        average = WeightAverage(engine, 0.5)
        for number in range(4):
            tiny.sft_train_step(engine, plan, tokenizer, number)
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
        losses[settings.output] = [tiny.sft_train_step(engine, plan, tokenizer, number) for number in (4, 5)]
        save_checkpoint(settings, 6, {"model": engine})
    return losses


GROUPS = [pytest.param(QUICK, id="quick"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=GROUPS)
def runs(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Layout, list[Layout]], Any]:
    folder, layouts = tmp_path_factory.mktemp("layouts"), request.param
    model = tiny.write_model(folder / "model")
    pairs = [(source, layout) for source, readers in layouts.items() for layout in readers]
    losses: dict[str, list[float]] = {}
    for ranks in (1, 2):
        run_ranks(ranks, write, str(folder), model, [source for source in layouts if source[0] == ranks])
    for ranks in (1, 2, 4):
        found = run_ranks(ranks, read, str(folder), model, [pair for pair in pairs if pair[1][0] == ranks])
        assert all(other == found[0] for other in found)
        losses |= found[0]
    return folder, layouts, losses


def tensors(folder: Path, which: str, ranks: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = PieceReader(folder / which, ranks)
    found = {}
    for name in reader.places:
        found[name] = torch.full((reader.total(name),), torch.nan)
        reader.read(name, 0, found[name])
    return found


def test_every_weight_moment_and_average_carries_over_to_any_layout(runs) -> None:
    folder, layouts, _ = runs
    for source, readers in layouts.items():
        for which in ("model", "own"):
            theirs = tensors(folder / name_of(source) / "checkpoints" / "step_000004", which, source[0])
            assert len(theirs) > 10 and not any(torch.isnan(tensor).any() for tensor in theirs.values())
            for layout in readers:
                there = folder / f"{name_of(source)}-{name_of(layout)}" / "checkpoints" / "step_000004"
                ours = tensors(there, which, layout[0])
                assert set(ours) == set(theirs)
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (source, layout)


def test_a_run_that_went_on_in_another_layout_ends_as_one_that_did_not(runs) -> None:
    """Losses of the two steps after it within 1e-5 of those in the writer's own layout (float32; bf16 rounds)."""
    folder, layouts, losses = runs
    for source, (same, *others) in layouts.items():
        expected = losses[str(folder / f"{name_of(source)}-{name_of(same)}")]
        for layout in others:
            tolerance = 1e-5 if layout[2] == "float32" else 0.02
            found = losses[str(folder / f"{name_of(source)}-{name_of(layout)}")]
            assert found == pytest.approx(expected, abs=tolerance, rel=0), (source, layout)
