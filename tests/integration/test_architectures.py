"""The three steps, chained through folders, on models with other positions, norms and tied embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage.training.metrics import read_metrics

CASES = [
    *[("opt", False, 2), ("gpt2", True, 2), ("opt", True, 3), ("gpt2", False, 3), ("llama", True, 3)],
    *[("granite", False, 0), ("granite", True, 3)],  # a scalar head of our own
]


def train_three_steps(rank: int, folder: str) -> None:
    from step1_sft.train import main as sft
    from step2_reward_model.train import main as reward_model
    from step3_ppo.train import main as ppo

    rows = {name: f"{folder}/rows/{name}.jsonl" for name in ("sft", "ranking", "prompts")}
    for architecture, pad_is_eos, stage in CASES:
        here = Path(folder) / name_of(architecture, pad_is_eos, stage)
        config = tiny.sft_config(here, str(here / "model"), rows["sft"], stage)
        sft(["--config", config.file, "max_steps=12"])
        config = tiny.reward_model_config(here, f"{here}/sft/final", rows["ranking"], stage)
        reward_model(["--config", config.file, "max_steps=3"])
        config = tiny.ppo_config(here, f"{here}/sft/final", f"{here}/reward/final", rows["prompts"], stage)
        ppo(["--config", config.file, "iterations=2"])


def name_of(architecture: str, pad_is_eos: bool, stage: int) -> str:
    return f"{architecture}-pad{'_is' if pad_is_eos else '_not'}_eos-zero{stage}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    tiny.write_rows(folder / "rows")
    for architecture, pad_is_eos, stage in CASES:
        tiny.write_model(folder / name_of(architecture, pad_is_eos, stage) / "model", architecture, pad_is_eos)
    run_ranks(2, train_three_steps, str(folder), timeout=600)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_three_steps_train_and_hand_their_folders_on(folder, case):
    here = folder / name_of(*case)
    losses = [line["sft/loss"] for line in read_metrics(here / "sft/metrics.jsonl") if line["split"] == "heldout"]
    assert losses[-1] < losses[0]
    ppo = read_metrics(here / "ppo/metrics.jsonl")
    assert ppo[1]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the untouched actor is its reference
    assert ppo[-1]["objective/kl"] != 0.0
    for name in ("sft/final", "reward/final", "ppo/final", "ppo/final_critic"):
        assert (here / name / "model.safetensors").is_file()
