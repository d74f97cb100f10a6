"""Each condition of the health monitor is raised by the fault it is for, and none of them by healthy runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.recordings import READ, recorded
from tristage.config.health import HealthSettings
from tristage.runs.record import lines_of
from tristage.training import alarms as module
from tristage.training.alarms import Alarms, table
from tristage.training.conditions import CONDITIONS
from tristage.training.metrics import RunLog, read_metrics

REPO = Path(__file__).parents[2]
RUNS = recorded()
Line = dict[str, float]


def monitor(output: Path, reference: str = "actor", **limits: Any) -> Alarms:
    specs = [SimpleNamespace(name="actor", path="actor"), SimpleNamespace(name="reference", path=reference)]
    health = HealthSettings.model_validate(limits)
    settings: Any = SimpleNamespace(engine_specs=lambda: specs, health=health, output=str(output))
    return Alarms(settings)


def alarms_of(output: Path) -> list[tuple[str, int]]:
    return [(line["alarm"], line["step"]) for line in lines_of(output / "health.jsonl")]


def healthy(step: str) -> list[tuple[int, str, Line]]:
    return [(number, split, dict(metrics)) for number, split, metrics in RUNS[f"seed0/{step}"]]


def rising(start: float, by: float) -> Callable[[int, float], float]:
    return lambda since, value: start + by * since


def always(value: float) -> Callable[[int, float], float]:
    return lambda since, usual: value


def times(factor: float) -> Callable[[int, float], float]:
    return lambda since, usual: factor * usual


# condition -> (recording, split, from which step, what happens to which metrics then, within how many lines)
FAULTS: dict[str, tuple[str, str, int, dict[str, Callable[[int, float], float]], int]] = {
    "ratio_not_one": ("step3_ppo", "train", 5, {"policy/first_ratio_error": always(0.2)}, 1),
    "kl_not_zero": ("step3_ppo", "heldout", 0, {"objective/kl_per_token": always(-0.05)}, 1),
    "kl_negative": ("step3_ppo", "train", 1, {"objective/kl": always(-0.4)}, 5),
    "kl_runaway": ("step3_ppo", "train", 10, {"objective/kl": rising(40, 30)}, 6),
    "kl_per_token_high": ("step3_ppo", "train", 10, {"objective/kl_per_token": always(2.0)}, 3),
    "eos_rate_low": ("step3_ppo", "train", 1, {"rollout/eos_rate": always(0.01)}, 3),
    "empty_responses": ("step3_ppo", "train", 10, {"rollout/length": always(1.2)}, 3),
    "at_limit": ("step3_ppo", "train", 10, {"rollout/eos_rate": rising(0.9, -0.1)}, 8),
    "score_follows_length": (
        *("step3_ppo", "train", 5),
        {"objective/score_length_correlation": always(0.95), "rollout/length": rising(9, 1)},
        12,
    ),
    "entropy_collapse": ("step3_ppo", "train", 10, {"objective/entropy": times(0.05)}, 3),
    "value_useless": ("step3_ppo", "train", 20, {"value/explained_variance": always(-0.2)}, 12),
    "clipping": ("step3_ppo", "train", 10, {"policy/clipfrac": always(0.5)}, 3),
    "gradient_spike": ("step1_sft", "train", 100, {"optimizer/grad_norm": times(80)}, 1),
    "loss_rises": ("step1_sft", "train", 200, {"sft/loss": always(5.0)}, 3),
    "loss_scale_floor": ("step1_sft", "train", 30, {"optimizer/loss_scale": always(1.0)}, 1),
    "identical_responses": ("step3_ppo", "train", 10, {"rollout/commonest_share": always(0.9)}, 3),
    "constant_score": ("step3_ppo", "train", 3, {"objective/score_std": always(0.0)}, 1),
    "score_up_grade_down": (
        *("step3_ppo", "heldout", 20),
        {"objective/grade_win_rate": always(0.5), "objective/grade_win_rate_high": always(0.56)},
        2,
    ),
    "overfitting": ("step1_sft", "heldout", 500, {"sft/loss": rising(1.3, 0.2)}, 2),
    "slow_rank": ("step3_ppo", "train", 10, {"time/rank_spread": always(2.4)}, 10),
}


@pytest.mark.parametrize("name", [condition.name for condition in CONDITIONS])
def test_a_condition_is_raised_by_its_fault_soon_and_alone(tmp_path: Path, name: str) -> None:
    recording, kind, first, changes, within = FAULTS[name]
    alarms, since = monitor(tmp_path), 0
    lines = healthy(recording)
    if name == "overfitting":  # the recording ends too soon
        lines += [(1000 + i, "heldout", {"sft/loss": 1.0}) for i in range(3)]
    for step, split, line in lines:
        if split == kind and step >= first:
            line |= {metric: change(since, line.get(metric, 0.0)) for metric, change in changes.items()}
            since += 1
        alarms.look(step, split, line)
        if alarms.told:
            break
    assert [alarm for alarm, _ in alarms_of(tmp_path)] == [name]
    assert 0 < since <= within


@pytest.mark.parametrize("run", RUNS)
def test_ten_healthy_quickstarts_raise_none(tmp_path: Path, run: str) -> None:
    alarms = monitor(tmp_path)
    for step, split, line in RUNS[run]:
        alarms.look(step, split, line)
    assert alarms_of(tmp_path) == [] and not alarms.told


def test_the_recording_is_of_ten_seeds_and_has_what_conditions_read() -> None:
    assert len(RUNS) == 30 and all(lines[-1][0] >= 40 for lines in RUNS.values())
    seen = {metric for lines in RUNS.values() for _, _, line in lines for metric in line}
    for _, _, _, changes, _ in FAULTS.values():
        assert all(READ.fullmatch(metric) for metric in changes)
        assert {metric for metric in changes if "loss_scale" not in metric} <= seen


def test_every_condition_has_a_threshold_and_a_fault() -> None:
    names = {condition.name for condition in CONDITIONS}
    assert names == set(HealthSettings.model_fields) - {"stop_on"} == set(FAULTS)


def test_a_condition_is_told_once_and_logged_each_time_it_begins(tmp_path: Path, capsys: Any) -> None:
    alarms = monitor(tmp_path)
    for step, kl in enumerate((200, 200, 200, 200, 1, 200, 200, 200), start=1):
        alarms.look(step, "train", {"objective/kl": kl})
        assert alarms.holding == (["kl_runaway"] if step in (3, 4, 8) else [])
    assert alarms_of(tmp_path) == [("kl_runaway", 3), ("kl_runaway", 8)]
    assert capsys.readouterr().out == (
        "warning: step 3: kl_runaway: the KL to the reference is 200 nats per response, over 100\n"
        "  why it matters: the policy has left what the reward model was trained on, and its score means little there\n"
        "  to change: raise ppo.kl_coef, set ppo.adaptive_kl_target, or lower actor.optimizer.learning_rate\n"
    )


def test_a_threshold_can_be_moved_and_turned_off(tmp_path: Path) -> None:
    for limit, raised in ((None, []), (500.0, []), (10.0, [("kl_runaway", 3)])):
        alarms = monitor(tmp_path / str(limit), kl_runaway=limit)
        (tmp_path / str(limit)).mkdir()
        for step in (1, 2, 3):
            alarms.look(step, "train", {"objective/kl": 200.0})
        assert alarms_of(tmp_path / str(limit)) == raised


def test_a_kl_before_training_counts_only_for_a_reference_of_the_same_weights(tmp_path: Path) -> None:
    for step, reference, raised in ((0, "other", []), (5, "actor", []), (0, "actor", [("kl_not_zero", 0)])):
        alarms = monitor(tmp_path, reference)
        alarms.look(step, "heldout", {"objective/kl_per_token": 0.3})
        assert alarms_of(tmp_path) == raised


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    alarms = monitor(tmp_path)
    for step in range(1, 5):
        alarms.look(step, "train", {"objective/kl": math.nan, "policy/grad_norm": math.inf, "rollout/length": None})
    assert alarms_of(tmp_path) == []


# -- in a run ---------------------------------------------------------------------------------------------------


def write(output: Path, first: int, kls: list[float]) -> Alarms:
    alarms = monitor(output, stop_on=["kl_runaway"])
    with RunLog(output, "ppo", 100, first, alarms) as log:
        for step, kl in enumerate(kls, start=first + 1):
            log.write(step, "train", {"objective/kl": kl})
    return alarms


def test_a_resumed_run_looks_back_on_the_lines_before(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path, 0, [200.0, 200.0])
    assert write(tmp_path, 2, [200.0]).stops is not None  # the third in a row
    capsys.readouterr()
    resumed = write(tmp_path, 3, [200.0, 200.0])
    assert resumed.stops is None and resumed.holding == ["kl_runaway"]  # it was started again: it goes on
    assert capsys.readouterr().out.count("warning") == 0
    assert alarms_of(tmp_path) == [("kl_runaway", 3)]
    assert [line["health/alarms"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 1, 1, 1]


def test_a_long_run_is_looked_at_again_at_its_end_alone_and_remembers_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPLAYED", 2)
    lines = [{"step": step, "split": "train", "objective/entropy": 2.0} for step in range(1, 50)]
    alarms = monitor(tmp_path)
    alarms.replay(lines, [{"step": 9, "alarm": "clipping"}, {"step": 9, "bad": "loss"}])
    assert alarms.told == {"clipping"} and alarms.history.start("objective/entropy") == 2.0
    for step in (50, 51, 52):
        alarms.look(step, "train", {"objective/entropy": 0.1})
    assert alarms_of(tmp_path) == [("entropy_collapse", 52)]


def test_lines_after_the_checkpoint_are_dropped_with_their_alarms(tmp_path: Path) -> None:
    write(tmp_path, 0, [1.0, 200.0, 200.0, 200.0])
    write(tmp_path, 1, [1.0, 1.0])
    assert alarms_of(tmp_path) == []


def test_a_name_that_is_not_a_condition_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_high is not a condition; write all, or some of ratio_not_one"):
        HealthSettings.model_validate({"stop_on": "kl_high"})
    assert HealthSettings.model_validate({"stop_on": "all"}).stops_on("clipping")
    assert not HealthSettings.model_validate({"stop_on": "clipping,at_limit"}).stops_on("kl_runaway")


def test_the_page_has_the_conditions_as_they_are() -> None:
    assert all(line.count("|") == 5 for line in table().splitlines())
    assert table() in (REPO / "docs/health.md").read_text(encoding="utf-8")
