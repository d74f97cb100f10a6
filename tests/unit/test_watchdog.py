"""The watchdog's decisions on the other ranks' heartbeats, by a clock that the test sets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from tests.helpers import tiny
from tristage.config import BatchPlan, OptimizerSettings
from tristage.dist import progress, watchdog
from tristage.dist.watchdog import EXIT_STALLED, Watchdog
from tristage.engine import engine_config, frozen_engine, train_engine
from tristage.machine.processes import own_id
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer
from tristage.rollout import PaddedRollout, SamplingConfig, SeededRequest, row_uniforms

SECONDS = 100.0  # the interval is then 1 s: something is noticed 98 s after it was last seen


class Ended(Exception):
    """os._exit, with its code."""


class World:
    """Rank 0 of three under a watchdog whose clock is `now`; the heartbeats of the others are written by hand."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 3):
        self.now = 1000.0
        self.heartbeats: dict[int, dict[str, Any]] = {}
        self.folder = folder
        self.dog = Watchdog(-1)
        with self.clock():
            self.dog.watch(folder, SECONDS, rank, ranks)
        progress.current.step = 4
        own = own_id()._asdict() | {"host": "a"}
        for peer in self.dog.peers:
            self.heartbeats[peer] = own | {"step": 4, "phase": "step", "place": 10, "moves": 20, "beat": 1}
            self.heartbeats[peer] |= {"state": "running", "verdict": None}

    def clock(self) -> Any:
        return mock.patch.object(watchdog.time, "monotonic", lambda: self.now)

    def live(self, seconds: int, silent: tuple[int, ...] = (), moving: tuple[int, ...] = ()) -> None:
        """That many seconds; raises Ended. The ranks not `silent` beat each second, those `moving` get on."""
        for _ in range(seconds):
            self.now += 1
            for peer, heartbeat in self.heartbeats.items():
                heartbeat["beat"] += peer not in silent
                heartbeat["moves"] += peer in moving
                (self.folder / f"rank_{peer:05d}.json").write_text(json.dumps(heartbeat))
            with self.clock():
                self.dog.beat()
                self.dog.check()

    def assert_left_alone(self) -> None:
        """The last look at the others was now, and found nothing."""
        assert self.dog.checked_at == self.now
        own = json.loads(self.dog.file.read_text())
        assert (own["state"], own["verdict"], self.dog.lost) == ("running", None, False)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    def exit_now(code: int) -> None:
        raise Ended(code)

    with (
        mock.patch.object(watchdog.os, "_exit", exit_now),
        mock.patch.object(watchdog.os, "kill"),
        mock.patch.object(watchdog.time, "sleep"),
        mock.patch.object(progress, "current", progress.Progress()),
    ):
        progress.current.place = 10
        yield World(tmp_path)


def ending(world: World, capsys: pytest.CaptureFixture[str], seconds: int = 110, **how: Any) -> str:
    """What is said when the run ends by the watchdog within so many seconds."""
    with pytest.raises(Ended) as ended:
        world.live(seconds, **how)
    assert ended.value.args == (EXIT_STALLED,)
    return capsys.readouterr().err


def test_ranks_that_make_progress_are_never_stopped(world):
    for _ in range(4):
        world.live(95)  # one phase, in which nobody moves
        world.live(1, moving=(2,))  # one is enough: the others wait for it
    world.assert_left_alone()


def test_a_silent_rank_is_named(world, capsys):
    said = ending(world, capsys, silent=(2,), moving=(1,))
    assert said.startswith("error: rank 2 on ") and "sent no heartbeat for 9" in said
    watchdog.os.kill.assert_called_once()  # a stopped process is woken, to write its stacks


def test_of_ranks_that_stand_still_the_one_that_is_behind_is_named(world, capsys):
    world.heartbeats[1] |= {"place": 9, "phase": "reward function f"}
    said = ending(world, capsys)
    assert said.startswith("error: rank 1 on ") and "in reward function f after step 4) made no progress for 9" in said


def test_where_no_rank_is_behind_all_are_listed(world, capsys):
    said = ending(world, capsys)
    assert "nor did any other rank (rank 0: start, rank 1: step, rank 2: step)" in said


def test_this_rank_can_be_the_one_that_is_behind(world, capsys):
    progress.current.place = 5
    assert ending(world, capsys).startswith("error: rank 0 on ")


@pytest.mark.parametrize("heartbeat", [{"phase": "save"}, {"step": None}])
def test_saving_and_the_first_step_may_take_three_times_as_long(world, capsys, heartbeat):
    world.heartbeats[1] |= heartbeat
    world.live(290)
    world.assert_left_alone()
    assert " made no progress for 29" in ending(world, capsys, 20)


def test_time_in_which_this_process_was_stopped_does_not_count(world):
    world.live(50)
    world.now += 10_000
    world.live(40)
    world.live(1, moving=(1,))
    world.assert_left_alone()


def test_a_rank_that_is_done_may_be_silent(world):
    world.heartbeats[1] |= {"state": "done"}
    for _ in range(5):
        world.live(90, silent=(1,))
        world.live(1, silent=(1,), moving=(2,))
    world.assert_left_alone()


def test_a_rank_that_was_never_seen_is_not_watched(world):
    del world.heartbeats[1]
    for _ in range(5):
        world.live(90)
        world.live(1, moving=(2,))
    world.assert_left_alone()
    assert world.dog.seen.keys() == {2}


@pytest.mark.parametrize(
    "heartbeat",
    [{"state": "failed"}, {"pid": 2**22 + 1}, {"started": 1}],
    ids=["failed", "no process", "another process"],
)
def test_a_lost_rank_ends_the_others_after_the_launcher_had_time_to_see_it(world, capsys, heartbeat):
    world.live(3)
    world.heartbeats[2] |= heartbeat
    world.live(8)
    assert "rank 2 on" in ending(world, capsys, 3)


def test_a_step_of_the_clock_ends_nothing(world):
    """psutil derives the start of a process from the wall clock, by way of the boot time."""
    world.live(3)
    boot, now = psutil.boot_time(), time.time()
    with (
        mock.patch("psutil._pslinux.boot_time", lambda: boot + 3),
        mock.patch.object(watchdog.time, "time", lambda: now + 3),
    ):
        world.live(20)
    world.assert_left_alone()


def test_a_process_of_another_machine_is_not_looked_for_here(world):
    world.heartbeats[2] |= {"machine": "elsewhere", "pid": 2**22 + 1}
    world.live(20)
    world.assert_left_alone()


def test_the_launchers_signal_ends_a_rank_that_lost_another_at_once(world, capsys):
    world.dog.may_save = True
    world.live(1)
    world.heartbeats[2] |= {"pid": 2**22 + 1}
    world.dog.signalled(15)
    assert "rank 2 on" in ending(world, capsys, 1)


def test_the_verdict_of_rank_0_ends_the_others_which_write_their_stacks(tmp_path, world):
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other", rank=2)
    assert other.dog.peers == [0]
    other.live(3)
    other.heartbeats[0]["verdict"] = "rank 1 made no progress"
    with pytest.raises(Ended):
        other.live(1)
    text = (tmp_path / "other/stacks_rank_00002.txt").read_text()
    assert "rank 1 made no progress" in text and "test_watchdog.py" in text


def test_a_heartbeat_always_has_the_same_size(world):
    for place in (1, 10**9):
        progress.current.place = place
        progress.current.phase = "a reward function of a long name " * place if place < 10 else "\u00e4\u4e2d" * 500
        world.dog.verdict = "\u4e2d" * 400
        world.dog.beat()
        assert world.dog.file.stat().st_size == watchdog.HEARTBEAT_BYTES
        assert json.loads(world.dog.file.read_text())["place"] == place


def test_one_request_may_arrive_twice_and_a_second_one_ends_at_once(world):
    world.dog.may_save = True
    with world.clock():
        world.dog.signalled(15)
        world.now += 0.5
        world.dog.signalled(2)
        assert world.dog.signalled_at == 1000.0
        world.now += 1
        with pytest.raises(Ended) as ended:
            world.dog.signalled(2)
    assert ended.value.args == (130,)


def test_before_there_is_anything_to_save_a_signal_ends_at_once(world):
    with pytest.raises(Ended) as ended:
        world.dog.signalled(10)
    assert ended.value.args == (watchdog.EXIT_PREEMPTED,)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 computes logits with the model's own forward
def test_each_forward_and_each_sampled_token_of_an_engine_is_a_heartbeat(tmp_path, trained, family):
    path = tiny.write_model(tmp_path, family)
    tokenizer = load_tokenizer(path)
    config = engine_config({}, "float32", BatchPlan.make(2, 2, 1))
    model = load_causal_lm(path, tokenizer, dtype=torch.float32)
    settings = OptimizerSettings(learning_rate=1e-3)
    with tiny.one_rank():
        engine = train_engine(model, config, settings, 1) if trained else frozen_engine(model, config)
        ids, mask = torch.full((2, 5), 9), torch.ones(2, 5, dtype=torch.bool)
        before = progress.current.moves
        engine(ids, mask, mask)
        assert progress.current.moves == before + 1
        request = SeededRequest(ids, mask, row_uniforms(0, 1, torch.arange(2), 4))
        sampled = PaddedRollout(engine, tokenizer, rows_at_once=2).generate(request, SamplingConfig(4, 1.0, 1.0, 0))
        tokens = int(sampled.attention_mask[:, 5:].any(dim=0).sum())
        assert progress.current.moves == before + 1 + tokens
