"""A run that is killed and started again ends as if nothing had happened: same lines, same weights, to the last bit.

The kill is an exception from RunLog.write on every rank, some steps after a checkpoint; the run is then started again
with the same arguments, in the same two processes. All cases share them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import step1_sft.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.interrupted import Killed, kill_at, untimed
from tests.helpers.ranks import run_ranks
from tristage import dist

STEPS = {"sft": step1_sft.train, "reward": step2_reward_model.train, "ppo": step3_ppo.train}
UPDATES = {"sft": "sft_step", "reward": "reward_model_step", "ppo": "ppo_update"}
# What trains, the ZeRO stage, the steps at which the run is killed (checkpoints are every 3 steps, or 2 iterations).
CASES = {
    "sft": ("sft", 2, [5]),
    "reward": ("reward", 2, [5]),
    "ppo": ("ppo", 2, [3]),
    "sft_zero0": ("sft", 0, [5]),
    "ppo_zero3": ("ppo", 3, [3]),
    "twice": ("sft", 2, [2, 8]),  # first before any checkpoint
    "ppo_value_head": ("ppo", 2, [3]),
    "ppo_everything": ("ppo", 2, [3]),
    "ppo_everything_zero3": ("ppo", 3, [3]),
}
# All that carries over from one iteration to the next beside the weights, and the pretraining mix's place in its text.
EVERYTHING = [
    *(
        "ppo.adaptive_kl_target=0.5",
        "ppo.adaptive_kl_horizon=50",
        "ppo.scale_reward=true",
        "ppo.missing_eos_penalty=0.5",
    ),
    *("ppo.bootstrap=true", "ppo.entropy_coef=0.01", "ema={decay: 0.9, start: 0.3}", "critic.warmup_iterations=1"),
]


def nothing_trains(step: str) -> Any:
    return mock.patch.object(STEPS[step], UPDATES[step], side_effect=AssertionError("a finished run trained"))


def run_cases(rank: int, whole: dict[str, list[str]], parts: dict[str, list[str]]) -> None:
    """Each case's run in one piece (argv in `whole`) and in pieces (`parts`), then once more when it is finished."""
    for case, (step, _, kills) in CASES.items():
        main: Callable[[list[str]], None] = STEPS[step].main
        main(whole[case])
        for kill in kills:
            with kill_at(kill), pytest.raises(Killed):
                main(parts[case])
        main(parts[case])
        dist.barrier()
        if rank == 0:
            output = Path(parts[case][1]).parent / step
            shutil.copytree(output / "final", output / "final_of_the_run")
            shutil.copy(output / "metrics.jsonl", output / "metrics_of_the_run.jsonl")
            shutil.rmtree(output / "final")
        dist.barrier()
        with nothing_trains(step):
            main(parts[case])


def write_case(folder: Path, base: Path, case: str) -> list[str]:
    step, stage, _ = CASES[case]
    rows = base / "rows"
    if step == "sft":
        tiny.sft_config(folder, str(base / "actor"), str(rows / "sft.jsonl"), stage)
    elif step == "reward":
        tiny.reward_model_config(folder, str(base / "actor"), str(rows / "ranking.jsonl"), stage)
    else:
        tiny.ppo_config(folder, str(base / "actor"), str(base / "scorer"), str(rows / "prompts.jsonl"), stage)
    argv = ["--config", str(folder / f"{step}.yaml")]
    if step == "ppo":
        more = [*EVERYTHING, f"pretraining={{data: {base / 'text.txt'}, block_tokens: 16, blocks: 8}}"]
        everything = more if "everything" in case else []
        if "value_head" in case:
            everything = ["critic=null", "value_head={coef: 0.5, old_policy_kl_coef: 0.1}"]
        return [*argv, "save_every=2", "evaluate_every=2", "iterations=4", *everything]
    return [*argv, "save_every=3", "evaluate_every=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("resume")
    rows = tiny.write_rows(base / "rows")
    actor = tiny.teach(tiny.write_model(base / "actor"), rows["sft"])
    tiny.write_reward_model(base / "scorer", actor)
    (base / "text.txt").write_text("Name four fruits. fig, kiwi, lion. " * 200)
    whole = {case: write_case(base / case / "whole", base, case) for case in CASES}
    parts = {case: write_case(base / case / "parts", base, case) for case in CASES}
    run_ranks(2, run_cases, whole, parts, timeout=400)
    return base


def output(folder: Path, case: str, which: str) -> Path:
    return folder / case / which / CASES[case][0]


@pytest.mark.parametrize("case", CASES)
def test_the_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(case: str, folder: Path) -> None:
    ours, theirs = (untimed(output(folder, case, which) / "metrics.jsonl") for which in ("parts", "whole"))
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == its


@pytest.mark.parametrize("case", CASES)
def test_no_step_is_missing_or_written_twice(case: str, folder: Path) -> None:
    lines = untimed(output(folder, case, "parts") / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= 4
    heldout = [line["step"] for line in lines if line["split"] == "heldout"]
    assert heldout == sorted(set(heldout)) and heldout[0] == 0 and heldout[-1] == steps[-1]


@pytest.mark.parametrize("case", CASES)
def test_the_weights_of_a_resumed_run_are_those_of_an_uninterrupted_one(case: str, folder: Path) -> None:
    finals = ["final", "final_critic"] if CASES[case][0] == "ppo" else ["final"]
    finals += ["final_ema"] if "everything" in case else []
    start = load_file(folder / ("scorer" if case == "reward" else "actor") / "model.safetensors")
    for final in finals:
        ours, theirs = (load_file(output(folder, case, w) / final / "model.safetensors") for w in ("parts", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert any(name in start and not torch.equal(theirs[name], start[name]) for name in theirs)


@pytest.mark.parametrize("case", [case for case, (step, _, _) in CASES.items() if step == "ppo"])
def test_the_samples_of_a_resumed_run_are_those_of_an_uninterrupted_one(case: str, folder: Path) -> None:
    ours, theirs = (output(folder, case, which) / "samples.jsonl" for which in ("parts", "whole"))
    assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize("case", CASES)
def test_a_finished_run_started_again_trains_nothing_and_exports_again(case: str, folder: Path) -> None:
    parts = output(folder, case, "parts")
    assert (parts / "metrics.jsonl").read_text() == (parts / "metrics_of_the_run.jsonl").read_text()
    names = sorted(path.name for path in (parts / "final_of_the_run").iterdir())
    assert sorted(path.name for path in (parts / "final").iterdir()) == names
    ours, theirs = (load_file(parts / name / "model.safetensors") for name in ("final", "final_of_the_run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", CASES)
def test_two_whole_checkpoints_are_kept_and_latest_names_the_last(case: str, folder: Path) -> None:
    checkpoints = output(folder, case, "parts") / "checkpoints"
    found = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert len(found) == 2 and all(name.startswith("step_") and "partial" not in name for name in found)
    assert (checkpoints / "latest").read_text() == found[-1]
    last = untimed(output(folder, case, "parts") / "metrics.jsonl")[-1]["step"]
    assert json.loads((checkpoints / found[-1] / "state.json").read_text())["step"] == last
