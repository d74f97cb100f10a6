"""Every benchmark can be imported, and the settings that they share are ones that their steps accept."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import ppo_phases, soak, tiny
from step3_ppo.config import PPOConfig
from tristage.config import load_config

NAMES = sorted(path.stem for path in Path(tiny.__file__).parent.glob("*.py") if path.stem not in ("__init__", "tiny"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts(name):
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
