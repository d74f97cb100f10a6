"""What step 3 writes down of a run: every held-out number, samples, win rates, speed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import step3_ppo.train
from tests.helpers import tiny
from tristage.intervals import win_rate
from tristage.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output of three iterations on one rank; then of a second process that does the fourth."""
    folder = tmp_path_factory.mktemp("records")
    rows = tiny.write_rows(folder / "rows")
    actor = tiny.teach(tiny.write_model(folder / "actor"), rows["sft"])
    scorer = tiny.write_reward_model(folder / "scorer", actor)
    tiny.ppo_config(folder, actor, scorer, rows["prompts"])
    words = ["--config", str(folder / "ppo.yaml"), f"output={folder}/out", "evaluate_every=1", "save_every=1"]
    words += ["samples_every=2", "logged_samples=3", "data.heldout_fraction=0.2", "resume_changed=true"]
    with tiny.one_rank():
        step3_ppo.train.main([*words, "iterations=3"])
        step3_ppo.train.main([*words, "iterations=4"])
    yield folder / "out"


def lines(run: Path, split: str) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if line["split"] == split}


def test_every_held_out_number_is_kept_and_means_are_the_metrics(run: Path) -> None:
    rows, metrics = read_metrics(run / "heldout.jsonl"), lines(run, "heldout")
    assert [line["step"] for line in rows] == [0, 1, 2, 3, 4]
    names = {"score": "objective/score", "kl": "objective/kl", "length": "rollout/length", "ended": "rollout/eos_rate"}
    for line in rows:
        for column, name in (names | {"grade": "objective/grade"}).items():
            mean = sum(line[column]) / len(line[column])
            assert mean == pytest.approx(metrics[line["step"]][name], rel=1e-4, abs=1e-5)


def test_win_rates_compare_with_the_responses_before_training(run: Path) -> None:
    rows, metrics = {line["step"]: line for line in read_metrics(run / "heldout.jsonl")}, lines(run, "heldout")
    assert "objective/win_rate" not in metrics[0]
    for step in (1, 2, 3, 4):  # the last by a process that found the first line in the folder
        for judge, name in (("score", "objective/win_rate"), ("grade", "objective/grade_win_rate")):
            rate, low, high = win_rate(rows[step][judge], rows[0][judge])
            assert metrics[step][name] == pytest.approx(rate, abs=1e-6)
            assert metrics[step][f"{name}_low"] <= rate <= metrics[step][f"{name}_high"]
            assert low == pytest.approx(metrics[step][f"{name}_low"], abs=0.02)
            assert high == pytest.approx(metrics[step][f"{name}_high"], abs=0.02)


def test_samples_are_the_same_held_out_prompts_and_some_of_the_rollouts(run: Path) -> None:
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    heldout = [sample for sample in samples if sample["split"] == "heldout"]
    prompts = {step: [s["prompt"] for s in heldout if s["step"] == step] for step in range(5)}
    assert len(set(prompts[0])) == 3 and all(prompts[step] == prompts[0] for step in prompts)
    assert [(s["step"], s["row"]) for s in samples if s["split"] == "train"] == [
        (step, row) for step in (2, 4) for row in range(3)
    ]
    rows = {line["step"]: line for line in read_metrics(run / "heldout.jsonl")}
    for sample in heldout:
        for column in ("score", "kl", "length", "grade"):
            assert sample[column] == pytest.approx(rows[sample["step"]][column][sample["row"]], rel=1e-4, abs=1e-6)
        assert sample["scores"] == {"model": sample["score"]} and isinstance(sample["ended"], bool)


def test_every_iteration_has_its_speed_and_its_memory(run: Path) -> None:
    for line in lines(run, "train").values():
        phases = sum(line[f"time/{phase}"] for phase in ("rollout", "score", "update"))
        assert line["time/iteration"] == pytest.approx(phases)
        assert line["time/rank_spread"] == 1.0 and line["memory/peak_gib"] > 0.1
        assert line["throughput/samples_per_second"] == pytest.approx(16 / phases)
        for phase in ("rollout", "score", "update"):
            assert line[f"throughput/{phase}_tflops"] > 0
        assert "throughput/update_mfu" not in line  # no peak is known of a CPU


def test_the_first_ratios_of_an_iteration_are_one(run: Path) -> None:
    for line in lines(run, "train").values():
        assert line["policy/first_ratio_error"] < 1e-5 < abs(line["policy/ratio"] - 1)


def test_the_commonest_response_of_an_iteration_is_counted(run: Path) -> None:
    for line in lines(run, "train").values():
        assert round(line["rollout/commonest_share"] * 16, 6) in range(1, 17)
