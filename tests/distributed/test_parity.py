"""A hundred steps of each training step: the same numbers at every ZeRO stage and in every repetition.

To the last bit at ZeRO 0, 1 and 2 where an optimizer step is one micro-batch a rank: over several, stage 2 adds up over
ranks first. Without clipping: the stages add up its norm in another order. Stage 3 adds up gradients in another one.
test_zero_stages.py has the rest, to a tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import step1_sft.train
import step2_dpo.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage.training.metrics import read_metrics

STEPS = ("sft", "reward", "dpo", "ppo")
MAINS = {
    "sft": step1_sft.train.main,
    "reward": step2_reward_model.train.main,
    "dpo": step2_dpo.train.main,
    "ppo": step3_ppo.train.main,
}
LENGTHS = {"short": 12, "long": 100}  # optimizer steps
MEMBERS = {"short": ("sft", "ppo"), "long": STEPS}
CASES = [pytest.param("short", step, id=f"short-{step}") for step in MEMBERS["short"]]
CASES += [pytest.param("long", step, id=f"long-{step}", marks=pytest.mark.slow) for step in STEPS]


def words(step: str, steps: int, precision: str) -> list[str]:
    if step == "ppo":  # 4 minibatches x 2 or 5 epochs an iteration
        epochs = 5 if steps >= 20 else 2
        length = [f"iterations={-(-steps // (4 * epochs))}", f"ppo.epochs={epochs}", "ppo.minibatch=4"]
        free = ["actor.optimizer.clip_norm=0", "critic.optimizer.clip_norm=0"]
    else:
        length, free = [f"max_steps={steps}", "epochs=1000", "micro_batch=4"], ["optimizer.clip_norm=0"]
    return [*length, *free, f"precision={precision}"]


def run_jobs(rank: int, jobs: list[tuple[str, list[str]]]) -> None:
    for step, argv in jobs:
        MAINS[step](argv)


def job(base: Path, name: str, step: str, stage: int, *overrides: str) -> tuple[str, list[str]]:
    folder, rows = base / name, base / "rows"
    if step == "ppo":
        tiny.ppo_config(folder, str(base / "actor"), str(base / "scorer"), str(rows / "prompts.jsonl"), stage)
    else:
        make = {"sft": tiny.sft_config, "reward": tiny.reward_model_config, "dpo": tiny.dpo_config}[step]
        file = {"sft": "sft", "reward": "ranking", "dpo": "preference"}[step]
        make(folder, str(base / "actor"), str(rows / f"{file}.jsonl"), stage)
    return step, ["--config", str(folder / f"{step}.yaml"), *overrides]


def write_inputs(base: Path) -> None:
    rows = tiny.write_rows(base / "rows")
    actor = tiny.teach(tiny.write_model(base / "actor"), rows["sft"])
    tiny.write_reward_model(base / "scorer", actor)


def make_jobs(base: Path, length: str) -> list[tuple[str, list[str]]]:
    jobs, steps = [], LENGTHS[length]
    for step in MEMBERS[length]:
        for stage in (0, 1, 2, 3):
            jobs.append(job(base, f"zero{stage}", step, stage, *words(step, steps, "float32")))
        jobs.append(job(base, "again", step, 2, *words(step, steps, "float32")))
        if length == "long":
            for stage in (1, 2, 3):
                jobs.append(job(base, f"bf16_{stage}", step, stage, *words(step, 20, "bf16")))
    return jobs


class Runs:
    """What ran of each length, at the first question of it."""

    def __init__(self, factory: pytest.TempPathFactory):
        self.factory, self.bases = factory, {}

    def base(self, length: str) -> Path:
        if length not in self.bases:
            self.bases[length] = self.factory.mktemp(length)
            write_inputs(self.bases[length])
            run_ranks(2, run_jobs, make_jobs(self.bases[length], length), timeout=1200)
        return self.bases[length]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


def metrics(base: Path, name: str, step: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "throughput/", "memory/"))}
        for line in read_metrics(base / name / step / "metrics.jsonl")
    ]


def weights(base: Path, name: str, step: str) -> dict[str, torch.Tensor]:
    finals = ("final", "final_critic") if step == "ppo" else ("final",)
    return {
        f"{final}/{key}": tensor
        for final in finals
        for key, tensor in load_file(base / name / step / final / "model.safetensors").items()
    }


def difference(base: Path, step: str, one: str, other: str) -> float:
    """Of all weights together, relative to their size."""
    ours, theirs = weights(base, one, step), weights(base, other, step)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in theirs.values())) ** 0.5


def assert_equal(base: Path, step: str, one: str, other: str) -> None:
    apart = difference(base, step, one, other)
    print(f"{step}, {one} and {other}: weights differ by {apart:.2g}")
    assert apart == 0


@pytest.mark.parametrize(("length", "step"), CASES)
def test_zero_0_1_and_2_train_the_same_weights_to_the_last_bit(length: str, step: str, runs: Runs) -> None:
    base = runs.base(length)
    for stage in (1, 2):
        assert_equal(base, step, f"zero{stage}", "zero0")


@pytest.mark.parametrize(("length", "step"), CASES)
def test_zero_3_trains_the_same_weights_to_rounding(length: str, step: str, runs: Runs) -> None:
    base = runs.base(length)
    apart = difference(base, step, "zero3", "zero0")
    print(f"{step}, {length}: zero3 and zero0 differ by {apart:.2g}")
    assert apart < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_in_bf16_zero_1_2_and_3_train_the_same_weights_to_the_last_bit(step: str, runs: Runs) -> None:
    base = runs.base("long")
    for stage in (2, 3):
        assert_equal(base, step, f"bf16_{stage}", "bf16_1")


@pytest.mark.parametrize(("length", "step"), CASES)
def test_a_run_repeated_gives_every_number_again(length: str, step: str, runs: Runs) -> None:
    base = runs.base(length)
    ours, theirs = metrics(base, "again", step), metrics(base, "zero2", step)
    steps = {"ppo": {12: 2, 100: 5}[LENGTHS[length]]}.get(step, LENGTHS[length])
    assert [line["step"] for line in ours if line["split"] == "train"] == list(range(1, steps + 1))
    assert ours == theirs
    assert_equal(base, step, "again", "zero2")
