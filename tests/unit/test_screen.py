"""What a terminal shows while a run goes on, drawn on a recording console; the launcher's view of a run's files."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tristage.dist import progress
from tristage.launch.supervise import PROGRESS, _copy, _Terminal
from tristage.runs.screen import Follower, Screen, TimeLeft, clock_of, short

PPO = {"objective/score": 1.234567, "objective/kl": 2.5, "rollout/length": 8.0, "throughput/tokens_per_second": 2737.9}
PPO |= {"memory/peak_gib": 0.5949, "time/rollout": 1.0, "time/score": 1.0, "time/update": 6.0, "policy/loss": 0.1}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(screen: Screen, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(screen.picture())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def screen() -> Screen:
    clock = Clock()
    made = Screen(Console(file=io.StringIO()), "ppo", 40, clock)
    made.phase = lambda: "update"
    made.update(0, "heldout", {"objective/score": -1.0, "objective/kl": 0.0, "objective/grade": 0.5})
    for step in range(1, 11):
        clock.now += 100.0 if step == 1 else 6.0  # the first compiles
        made.update(step, "train", PPO)
    return made


def test_the_display_has_progress_numbers_held_out_and_phases(screen: Screen) -> None:
    bar, numbers, heldout, phases = drawn(screen, 100)
    assert bar.startswith("ppo ") and bar.endswith("10/40 0:03:00 left update") and "━" in bar  # 30 steps of 6 s
    assert numbers == "score 1.235 kl 2.5 length 8 tokens/s 2,738 GiB 0.5949"
    assert heldout == "held out at 0: score -1 kl 0 grade 0.5"
    assert phases == "time: rollout  12% ██  score  12% ██  update  75% █████████"


@pytest.mark.parametrize("width", (30, 60, 200))
def test_no_line_is_wider_than_the_terminal(screen: Screen, width: int) -> None:
    lines = drawn(screen, width)
    assert len(lines) == 4 and all(len(line) <= width for line in lines)


def test_before_the_first_step_the_display_says_what_is_done() -> None:
    screen = Screen(Console(file=io.StringIO()))
    assert drawn(screen, 60)[0].endswith("0/? ? left starting")


def test_a_rank_in_a_collective_is_waiting_and_the_last_step_is_done(screen: Screen) -> None:
    screen.phase = lambda: "max_over_ranks, waiting for the others"
    assert drawn(screen, 100)[0].endswith("left waiting")
    screen.update(40, "train", PPO)
    assert drawn(screen, 100)[0].endswith("40/40 done")


def test_time_left_forgets_the_first_steps() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.until(100) is None
    for step in range(1, 31):
        clock.now += 1000.0 if step < 5 else 2.0
        left.finished(step)
    assert left.until(100) == pytest.approx(70 * 2.0)
    assert clock_of(3723.9) == "1:02:03"


def test_unknown_metrics_are_shown_by_their_names() -> None:
    assert short({"eval/acc": 0.5, "eval/big": 12345.6}) == "eval/acc 0.5 eval/big 12,346"
    assert short({"sft/loss": 1.0, "optimizer/grad_norm": 2.0}) == "loss 1"


def test_the_launcher_follows_what_the_ranks_write(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    heartbeat = tmp_path / "logs/rank_00000.json"
    heartbeat.write_text(json.dumps({"title": "old", "total": 1, "phase": "dead"}))
    os.utime(heartbeat, (time.time() - 60,) * 2)
    follower = Follower(tmp_path, Screen(Console(file=io.StringIO())))
    follower.look()
    assert follower.screen.title == ""  # an earlier run's heartbeat
    heartbeat.write_text(json.dumps({"title": "sft", "total": 9, "phase": "step"}).ljust(4096))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write('{"step": 1, "split": "train", "sft/loss": 3.0}\n{"step": 2, "split": "tra')
        file.flush()
        follower.look()
        assert (follower.screen.step, follower.screen.title, follower.screen.total) == (1, "sft", 9)
        file.write('in", "sft/loss": 2.0}\n')
    follower.look()
    assert (follower.screen.step, follower.screen.latest) == (2, {"sft/loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "heldout", "sft/loss": 9.0}\n')  # resumed
    follower.look()
    assert follower.screen.heldout == (1, {"sft/loss": 9.0})


def test_a_missing_or_damaged_run_does_not_disturb_the_launcher(tmp_path: Path) -> None:
    follower = Follower(tmp_path, Screen(Console(file=io.StringIO())))
    follower.look()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_00000.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    follower.look()
    assert follower.screen.step == 0


def test_the_display_takes_the_place_of_progress_lines_and_the_log_keeps_them(tmp_path: Path) -> None:
    lines = [
        b"ppo 3/40 score 1.2 kl 0.5 left 0:01:02\n",
        b"ppo 1/40 score 1.2 kl 0.5 left ?\n",
        b"reward model 0/900 held out: loss 0.69\n",
        b"warning: step 3: clipping: 0.4 of the tokens\n",
        b"sft is 3/4 done\n",
    ]
    assert [bool(PROGRESS.fullmatch(line)) for line in lines] == [True, True, True, False, False]

    def shown(folder: Path) -> list[str]:
        log, screen = io.BytesIO(), io.StringIO()
        follower = Follower(folder, Screen(Console(file=screen, width=20)))
        _copy(iter(lines), _Terminal(sys.stdout, follower), log, lambda line: True)  # type: ignore[arg-type]
        assert log.getvalue() == b"".join(lines)
        return screen.getvalue().splitlines()

    assert len(shown(tmp_path)) == 5  # rank 0 is on a node whose folder is not seen here
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "split": "heldout", "sft/loss": 9.0}\n')  # its first line
    assert shown(tmp_path) == ["warning: step 3: clipping: 0.4 of the tokens", "sft is 3/4 done"]


# -- work that takes long ---------------------------------------------------------------------------------------


def test_work_that_takes_long_says_what_it_is_and_how_long_it_took(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.02)
    with progress.telling("loading m"):
        time.sleep(0.2)
    assert capsys.readouterr().out.splitlines() == ["loading m ...", "loading m: 0 s"]
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 5.0)
    with progress.telling("loading m"):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.02)
    with progress.telling("loading m"):
        time.sleep(0.2)
    assert capsys.readouterr().out == ""
