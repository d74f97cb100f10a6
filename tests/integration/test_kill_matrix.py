"""R1: `kill -9` of a random rank at a random moment, then the run started again: as if it had never happened.

The default run takes each training step once, each at another ZeRO stage; `-m slow` the other combinations. The draws
are from the names of the cases: a failure happens again.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import step1_sft.train
import step2_dpo.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.faults import Kill, Ranks, assert_same_run

MAINS = {
    "sft": step1_sft.train.main,
    "reward": step2_reward_model.train.main,
    "dpo": step2_dpo.train.main,
    "ppo": step3_ppo.train.main,
}
STEPS = {"sft": 7, "reward": 7, "dpo": 7, "ppo": 4}
SECONDS_A_STEP = {"sft": 0.1, "reward": 0.1, "dpo": 0.1, "ppo": 1.0}
ALWAYS = [("sft", 2), ("reward", 1), ("dpo", 0), ("ppo", 3)]
SLOW = [(step, stage) for step in MAINS for stage in range(4) if (step, stage) not in ALWAYS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kills")
    rows = tiny.write_rows(base / "rows")
    actor = tiny.teach(tiny.write_model(base / "actor"), rows["sft"])
    tiny.write_reward_model(base / "scorer", actor)
    return base


def write_config(base: Path, folder: Path, step: str, stage: int) -> list[str]:
    actor, rows = str(base / "actor"), base / "rows"
    more = ["save_every=2", "evaluate_every=3", "watchdog_seconds=60"]
    if step == "ppo":
        config = tiny.ppo_config(folder, actor, str(base / "scorer"), str(rows / "prompts.jsonl"), stage)
        return ["--config", config.file, "iterations=4", *more]
    files = {"sft": "sft", "reward": "ranking", "dpo": "preference"}
    makers = {"sft": tiny.sft_config, "reward": tiny.reward_model_config, "dpo": tiny.dpo_config}
    config = makers[step](folder, actor, str(rows / f"{files[step]}.jsonl"), stage)
    return ["--config", config.file, "epochs=1", *more]


def check(base: Path, step: str, stage: int) -> None:
    folder, rng = base / f"{step}_{stage}", random.Random(f"{step} {stage}")
    whole = write_config(base, folder / "whole", step, stage)
    assert Ranks(2, MAINS[step], whole, folder / "whole.log").codes() == [0, 0], (folder / "whole.log").read_text()
    kill = Kill(rng.randrange(2), rng.randrange(1, STEPS[step] - 1), rng.uniform(0, SECONDS_A_STEP[step]))
    print(f"{step}, ZeRO {stage}: {kill}")
    parts = write_config(base, folder / "parts", step, stage)
    codes = Ranks(2, MAINS[step], parts, folder / "killed.log", kill).codes()
    assert codes[kill.rank] == -9 and codes[1 - kill.rank] not in (0, 2, 75), codes
    assert Ranks(2, MAINS[step], parts, folder / "resumed.log").codes() == [0, 0], (folder / "resumed.log").read_text()
    assert_same_run(folder / "parts" / step, folder / "whole" / step)


@pytest.mark.parametrize("step, stage", ALWAYS)
def test_a_killed_run_ends_as_an_uninterrupted_one(step: str, stage: int, folder: Path) -> None:
    check(folder, step, stage)


@pytest.mark.slow
@pytest.mark.parametrize("step, stage", SLOW)
def test_a_killed_run_ends_as_an_uninterrupted_one_elsewhere(step: str, stage: int, folder: Path) -> None:
    check(folder, step, stage)
