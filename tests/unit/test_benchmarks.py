"""Every benchmark can be imported, their settings are ones that steps accept, and the page on speed quotes results."""

from __future__ import annotations

import importlib
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks import (
    against_peers,
    figures,
    floor,
    models,
    ours,
    ppo_phases,
    scaling,
    seeds,
    soak,
    speed_page,
    tiny,
    trl_ppo,
)
from benchmarks.against_peers import EXPERIMENTS
from benchmarks.turns import Contestant
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.helpers.runs import write_ppo, write_run
from tests.helpers.tiny import REPO
from tristage.config import load_config
from tristage.data.sets import load_sets
from tristage.models.tokenizer import load_tokenizer

STALE = "run python -m benchmarks.speed_page"
HELPERS = ("__init__", "figures", "tiny", "turns")
NAMES = sorted(path.stem for path in Path(tiny.__file__).parent.glob("*.py") if path.stem not in HELPERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts(name):
    if name == "trl_steps":
        pytest.importorskip("trl", reason="trl is not installed, so there is no such contestant (pip install trl)")
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_settings_of_benchmarks_are_accepted_and_their_batches_divide(tmp_path, stage):
    sft = tiny.sft_config(tmp_path, "a/model", "rows.jsonl", stage, "micro_batch=4")
    assert (sft.output, sft.global_batch, sft.deepspeed) == (str(tmp_path / "sft"), 8, f"zero{stage}")
    ppo = tiny.ppo_config(tmp_path, "an/actor", "a/reward", "rows.jsonl", stage, "ppo.epochs=1")
    assert (ppo.actor.model, ppo.reward.model, ppo.ppo.epochs) == ("an/actor", "a/reward", 1)
    assert ppo.plan(2).accumulation == 2
    assert ppo_phases.settings_for(tmp_path, stage).plan(2).accumulation == 2


def test_the_iterations_of_the_soak_are_cheap_and_have_two_ranks(tmp_path):
    config = soak.write_config(tmp_path)
    settings = load_config(PPOConfig, ["--config", config, "iterations=7", *soak.CHEAPEST])
    assert (settings.iterations, settings.rollout.prompts, settings.plan(2).accumulation) == (7, 4, 1)


# -- against peers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest models and rows."""
    path = tmp_path_factory.mktemp("models")
    models.write(path, models.SMALLEST)
    return str(path)


def test_the_chance_of_eos_is_the_one_that_gives_the_mean_length():
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(models.FIRST_WORD, models.SMALLEST.vocabulary, (4, 40), generator=seeded)
    chances = {mixed: models.make_actor(models.SMALLEST, mixed)(ids).logits.softmax(-1)[..., models.EOS]
               for mixed in (False, True)}  # fmt: skip
    odds = models.odds_of_eos(models.SMALLEST.response)
    expected = odds / (1 + odds)
    assert float(chances[False].max()) < 1e-9
    torch.testing.assert_close(chances[True], torch.full_like(chances[True], expected), rtol=0.05, atol=0)
    mean = sum((1 - expected) ** place for place in range(models.SMALLEST.response))  # that it has a token there
    assert math.isclose(mean, 0.4 * models.SMALLEST.response, rel_tol=1e-6)


def test_the_rows_of_peers_are_those_that_our_data_pipeline_reads(folder):
    job = EXPERIMENTS["sft"].job | {"folder": folder}
    settings = ours.settings_for(job, 1)
    assert isinstance(settings, SFTConfig)
    tokenizer = load_tokenizer(settings.model)
    train, heldout = load_sets(settings, tokenizer)
    read = sorted(example.ids for rows in (train, heldout) for example in (rows[i] for i in range(len(rows))))
    assert read == sorted(row["prompt"] + row["response"] for row in models.read_ids(folder, "sft"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_our_settings_of_each_experiment_are_accepted(folder, name):
    entries = [entry for entry in EXPERIMENTS[name].entries.values() if entry.module == against_peers.OURS]
    for entry in entries:
        job = EXPERIMENTS[name].job | entry.job | {"folder": folder}
        assert ours.settings_for(job, 2).plan(2).global_batch == 2 * job["rows"]
    assert entries[0] == next(iter(EXPERIMENTS[name].entries.values()))  # ratios are to the first


def test_trl_ppo_makes_one_optimizer_step_per_iteration_and_counts_tokens_up_to_eos():
    job = EXPERIMENTS["wide-mixed"].job | {"folder": "a"}
    options = trl_ppo.options_of(job, response=128, ranks=2)
    assert options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == against_peers.WIDE
    assert (options["num_mini_batches"], options["num_ppo_epochs"], options["stop_token"]) == (1, 1, "eos")
    eos = models.EOS
    assert trl_ppo.real_tokens(torch.tensor([[5, eos, 6, eos], [5, 6, 7, 8], [eos, 5, 5, 5]])) == 2 + 4 + 1


def record(tokens: int, **phases: float) -> dict:
    return {"phases": phases, "tokens": tokens, "wall": 1.0, "peak_mib": 100.0}


def test_a_ratio_is_taken_per_token_within_a_repetition():
    found = {
        "tristage": {"started": [1.0, 3.0], "steps": [[record(10, rollout=1.0, update=1.0)] * 2,
                                                      [record(10, rollout=2.0, update=2.0)] * 2]},
        "peer": {"started": [2.0, 2.0], "steps": [[record(20, rollout=6.0, update=2.0)] * 2,
                                                  [record(20, rollout=8.0, update=8.0)] * 2]},
    }  # fmt: skip
    rows = against_peers.summary(found)
    assert rows["peer"]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert rows["tristage"]["ratio"]["median"] == 1.0
    assert rows["peer"]["cpu_seconds"] == {"median": 12.0, "low": 8.0, "high": 16.0}
    assert rows["peer"]["phases"] == {"rollout": 7.0, "update": 5.0}
    assert rows["peer"]["ms_per_token"]["low"] == 400.0 and rows["peer"]["tokens"] == 40
    assert rows["tristage"]["start_cpu_seconds"] == 2.0


def test_contestants_take_turns_and_their_records_are_written(tmp_path, capsys):
    out = tmp_path / "found.json"
    against_peers.main([str(out), "--smallest", "--repetitions", "1", "--experiments", "zero3"])
    written = json.loads(out.read_text())
    assert {"torch", "deepspeed"} < set(written["versions"]) and "against_peers" in written["command"]
    (found,) = written["experiments"].values()
    assert list(found) == ["tristage", "DeepSpeed-Chat style"]
    sizes = models.SMALLEST
    for contestant in found.values():
        assert len(contestant["started"]) == 2 and len(contestant["steps"]) == 1
        for rank in contestant["steps"][0]:
            assert list(rank["phases"]) == ["rollout", "score", "update"] and min(rank["phases"].values()) > 0
            assert rank["tokens"] == 4 * sizes.response  # EOS is never drawn
    assert "DeepSpeed-Chat style" in capsys.readouterr().out


def test_trl_takes_turns(folder):
    pytest.importorskip("trl", reason="trl is not installed, so there is no such contestant (pip install trl)")
    with Contestant(against_peers.TRL, EXPERIMENTS["reward_model"].job | {"folder": folder}, ranks=1) as contestant:
        (found,) = contestant.step()
    assert list(found["phases"]) == ["step"] and found["tokens"] > 8


def test_a_contestant_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match=r"benchmarks.ours has ended too early(.|\n)*sizes.json"):
        Contestant("benchmarks.ours", {"what": "sft", "folder": str(tmp_path), "rows": 1, "micro_batch": 1}, ranks=1)


# -- floor and scaling -------------------------------------------------------------------------------------------------


def test_the_floor_of_a_network_computed_by_hand():
    sizes = models.Sizes(
        width=2, layers=1, heads=1, vocabulary=10, reward_width=2, reward_layers=1, prompt=2, response=2
    )
    found = floor.floor(sizes, rows=1, rate={"flops": 1.0, "bytes": 1e9})
    # A token in the trunk: 24 * 2^2 = 96, with 4 * 2 * context for attention; a logit 2 * 2 * 10 = 40.
    assert found["rollout"] == 2 * (96 + 8) + 2 * (96 + 8 * 3 + 40)
    forward, critic = 4 * (96 + 16) + 2 * 40, 4 * (96 + 16)
    assert found["score"] == forward + 2 * critic
    assert math.isclose(found["update"], 3 * (forward + critic), rel_tol=1e-6)
    slow = floor.floor(sizes, rows=2, rate={"flops": 1e18, "bytes": 1.0})
    weights = 12 * 4 + 20
    assert math.isclose(slow["rollout"], 2 * 4 * (weights + 2 * 2 * 2 * 3) / 2)  # two rows share the weights
    assert math.isclose(slow["update"], 28 * 2 * weights / 2 / 2)  # actor and critic, two ranks, two rows


def test_rates_are_measured():
    found = floor.rates(models.SMALLEST, repetitions=3)
    assert found["flops"] > 0 and found["bytes"] > 0


class FakeContestant:
    """Rollout costs 1, 2, ... CPU seconds, the warm-up 1, and other phases half of that; no ranks are started."""

    def __init__(self, module, job, ranks):
        self.ranks, self.steps = ranks, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def step(self):
        self.steps += 1
        return [record(8, rollout=1.0 * self.steps, score=0.5 * self.steps, update=0.5 * self.steps)] * self.ranks


def test_floor_and_scaling_write_seconds_per_response_without_the_warm_up(tmp_path, monkeypatch):
    for module in (floor, scaling):
        monkeypatch.setattr(module, "Contestant", FakeContestant)
        module.main([str(tmp_path / f"{module.__name__}.json"), "--smallest", "--repetitions", "3"])
    cases = json.loads((tmp_path / "benchmarks.floor.json").read_text())["cases"]
    assert {rows: case["measured"]["rollout"] * int(rows) for rows, case in cases.items()} == {"4": 3.0, "32": 3.0}
    assert "| sum |" in speed_page.floor_table(cases)
    axes = json.loads((tmp_path / "benchmarks.scaling.json").read_text())["axes"]
    assert list(axes) == list(speed_page.AXES) and axes["ranks"]["1"]["score"] == 1.5 / scaling.ROWS
    assert "ranks: 2" in speed_page.scaling_table(axes)


def test_the_grid_changes_one_thing_at_a_time():
    base = models.Sizes()
    grid = scaling.grid(base)
    middle = scaling.Point(base)
    assert all(middle in points.values() for points in grid.values())
    assert len({point for points in grid.values() for point in points.values()}) == 1 + 4 * 2 + 1
    assert all(point.sizes.prompt + point.sizes.response <= base.positions
               for points in grid.values() for point in points.values())  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_on_speed_and_its_figures_are_those_of_the_results():
    page = speed_page.PAGE.read_text(encoding="utf-8")
    assert speed_page.filled(page, speed_page.blocks()) == page, STALE
    for name, picture in speed_page.figures().items():
        assert (speed_page.PICTURES / name).read_text(encoding="utf-8") == picture, STALE


def test_results_are_of_experiments_that_there_are():
    found = speed_page.read("against_peers")["experiments"]
    assert set(speed_page.TITLES) == set(EXPERIMENTS) and found
    assert {name: set(found[name]) - set(EXPERIMENTS[name].entries) for name in found} == dict.fromkeys(found, set())


def test_a_figure_draws_bars_to_scale():
    bars = [figures.Bar("a & b", {"x": 1.0, "y": 3.0}, "4"), figures.Bar("c", {"y": 2.0}, "2")]
    root = ET.fromstring(figures.draw("title", "unit", {"group": bars}))
    drawn = [(box.get("class"), float(box.get("width", 0))) for box in root.iter("{http://www.w3.org/2000/svg}rect")]
    (x, first), (y, second), (again, third) = drawn[-3:]
    assert (x, y, again) == ("part0", "part1", "part1")
    assert math.isclose(3 * first, second, rel_tol=0.01) and math.isclose(2 * first, third, rel_tol=0.01)


def test_seeds_are_put_together_and_the_docs_have_their_table(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"runs/{seed}"
        grades = [[0.5, 0.7], [0.9, 0.7], [0.8 + 0.1 * seed, 0.8]]
        write_ppo(folder / "step3_ppo", [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], grades, seed=seed)
        names = {"reward_model/accuracy": 0.5, "reward_model/length_baseline": 0.6}
        heldout = [{"step": 0, **names}, {"step": 9, **names, "reward_model/accuracy": 0.8}]
        write_run(folder / "step2_reward_model", "step2_reward_model", [], heldout)
    seeds.main([str(tmp_path / "runs"), "--out", str(tmp_path / "seeds.json")])
    found = json.loads((tmp_path / "seeds.json").read_text())
    assert found["summary"]["gold"]["change"] == pytest.approx((0.2 + 0.25) / 2)
    assert found["summary"]["gold"]["deviation"] == pytest.approx(0.05 / 2**0.5)
    assert "longer wins" not in found["summary"]  # of the data
    assert "| 1 | 0.800 | 0.600 | 0.600 | 0.850 | 0.850 | 1.0 |" in capsys.readouterr().out
    published = json.loads((REPO / "benchmarks/results/quickstart_seeds.json").read_text())
    assert seeds.table(published["seeds"]) in (REPO / "docs/getting-started.md").read_text()
    gold = seeds.summary(published["seeds"])["gold"]
    assert [f"{x:.3f}" for x in (gold["change"], *gold["interval"])] == ["0.261", "0.251", "0.271"]  # as README has it
    assert all(after - before > 0.15 for before, after in (seed["gold"] for seed in published["seeds"]))
