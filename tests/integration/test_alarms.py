"""Runs that are made sick: the health monitor names what is wrong, and ends the run where it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import step1_sft.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage.errors import UserError
from tristage.runs.record import Run, lines_of


def same_for_all(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that teaches nothing."""
    return [1.0 for _ in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ppo.yaml and sft.yaml."""
    folder = tmp_path_factory.mktemp("alarms")
    rows = tiny.write_rows(folder / "rows")
    actor = tiny.teach(tiny.write_model(folder / "actor"), rows["sft"])
    tiny.ppo_config(folder, actor, tiny.write_reward_model(folder / "scorer", actor), rows["prompts"])
    tiny.sft_config(folder, actor, rows["sft"])
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    with tiny.one_rank():
        yield


def alarms(output: Path) -> set[str]:
    return {str(line["alarm"]) for line in lines_of(output / "health.jsonl")}


def test_a_policy_that_runs_away_is_told(folder: Path, alone: None, tmp_path: Path, capsys: Any) -> None:
    words = ["ppo.kl_coef=0", "actor.optimizer.learning_rate=0.05", "actor.optimizer.schedule=constant", "iterations=8"]
    step3_ppo.train.main(["--config", str(folder / "ppo.yaml"), f"output={tmp_path}", *words])
    assert {"kl_per_token_high", "eos_rate_low", "identical_responses"} <= alarms(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("kl_per_token_high: the KL to the reference is") == 1
    assert "worry: kl_per_token_high, first at step" in printed  # in the verdict


def test_fine_tuning_that_diverges_is_told(folder: Path, alone: None, tmp_path: Path) -> None:
    words = ["optimizer.learning_rate=0.5", "optimizer.schedule=constant", "optimizer.clip_norm=0", "max_steps=30"]
    step1_sft.train.main(["--config", str(folder / "sft.yaml"), f"output={tmp_path}", "epochs=20", *words])
    assert alarms(tmp_path) == {"loss_rises"}


def test_a_healthy_tiny_run_is_told_nothing(folder: Path, alone: None, tmp_path: Path) -> None:
    step1_sft.train.main(["--config", str(folder / "sft.yaml"), f"output={tmp_path}"])
    assert alarms(tmp_path) == set()


def stopped(rank: int, config: str, output: str) -> tuple[str, int]:
    """What a run with a useless reward ends with; then the last step of the run that goes on."""
    reward = 'reward={functions: [{function: "tests.integration.test_alarms:same_for_all"}]}'
    words = ["--config", config, f"output={output}", reward, "critic.model=", "iterations=4"]
    try:
        step3_ppo.train.main([*words, "health.stop_on=constant_score"])
    except UserError as error:
        step3_ppo.train.main(words)
        return str(error), Run(Path(output)).last_step
    return "", 0


def test_stop_on_ends_all_ranks_after_a_checkpoint_and_the_run_can_go_on(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(2, stopped, str(folder / "ppo.yaml"), str(tmp_path), timeout=200)
    assert found[0] == found[1]
    message, last = found[0]
    assert message.startswith(f"{tmp_path}: stopped at step 1 by health.stop_on constant_score: every response")
    assert message.endswith("the checkpoint is written: start again to go on")
    assert last == 4 and len(list(lines_of(tmp_path / "metrics.jsonl"))) == 4 + 2  # and two evaluations
