"""Averages divide once, by their weights; a run's log is whole lines, also after it was killed and resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.saves import small_disk
from tests.helpers.tiny import sft_config
from tristage import dist
from tristage.errors import UserError
from tristage.training import metrics
from tristage.training.health import Health
from tristage.training.metrics import Averages, RunLog, Stopwatch, read_metrics

CPU = torch.device("cpu")


# -- Averages ----------------------------------------------------------------------------------------------


def test_an_average_weighs_tokens_not_batches():
    averages = Averages()
    averages.add("loss", 10.0, 2)  # 2 tokens of loss 5
    averages.add("loss", 6.0, 6)  # 6 tokens of loss 1
    assert averages.reduce(CPU) == {"loss": 2.0}  # the mean of the two batches' means would be 3


def test_averages_take_tensors_and_keep_names_apart():
    averages = Averages()
    averages.add("a/loss", torch.tensor(3.0), torch.tensor(4))
    averages.add("a", torch.tensor(1.0), 1)
    assert averages.reduce(CPU) == {"a/loss": 0.75, "a": 1.0}


def test_an_average_of_nothing_is_0():
    averages = Averages()
    averages.add("loss", 0.0, 0)
    assert averages.reduce(CPU) == {"loss": 0.0}


def test_totals_and_weights_are_added_over_ranks_before_the_division(monkeypatch):
    other_rank = {"loss": 2.0, "loss/weight": 4.0}
    monkeypatch.setattr(dist, "sum_over_ranks", lambda own, _: {name: own[name] + other_rank[name] for name in own})
    averages = Averages()
    averages.add("loss", 10.0, 2)
    assert averages.reduce(CPU) == {"loss": 12 / 6}


# -- RunLog ------------------------------------------------------------------------------------------------


def run_log(output: Path, total_steps: int = 10, first_step: int = 0) -> RunLog:
    return RunLog(output, "sft", total_steps, first_step)


def write_steps(output: Path, first_step: int, last_step: int, loss: float, total_steps: int = 10) -> None:
    """What a run that starts after `first_step` and is killed after `last_step` leaves."""
    with run_log(output, total_steps, first_step) as log:
        if first_step == 0:
            log.write(0, "heldout", {"sft/loss": loss})
        for step in range(first_step + 1, last_step + 1):
            log.write(step, "train", {"sft/loss": loss})
            log.write_samples(step, [{"response": f"{loss}"}])


def points(output: Path, split: str, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(output / "tensorboard" / split)).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_line_holds_step_split_and_the_metrics(tmp_path):
    with run_log(tmp_path) as log:
        log.write(0, "heldout", {"sft/loss": 2.5, "sft/perplexity": 12.0})
        log.write(1, "train", {"sft/loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 0, "split": "heldout", "sft/loss": 2.5, "sft/perplexity": 12.0}',
        '{"step": 1, "split": "train", "sft/loss": 2.0}',
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with run_log(tmp_path) as log:
        log.write(1, "train", {"sft/loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "sft/loss": 2.0}]


def test_read_metrics_gives_what_was_written(tmp_path):
    write_steps(tmp_path, 0, 2, loss=1.5)
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == [
        {"step": 0, "split": "heldout", "sft/loss": 1.5},
        {"step": 1, "split": "train", "sft/loss": 1.5},
        {"step": 2, "split": "train", "sft/loss": 1.5},
    ]


def test_tensorboard_has_a_tag_per_metric_and_a_writer_per_split(tmp_path):
    write_steps(tmp_path, 0, 2, loss=1.5)
    assert points(tmp_path, "heldout", "sft/loss") == [(0, 1.5)]
    assert points(tmp_path, "train", "sft/loss") == [(1, 1.5), (2, 1.5)]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, 0, 5, loss=1.0)
    write_steps(tmp_path, 3, 6, loss=2.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["sft/loss"] for line in lines] == [1, 1, 1, 1, 2, 2, 2]
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert [line["step"] for line in samples] == [1, 2, 3, 4, 5, 6]
    assert [line["response"] for line in samples] == ["1.0"] * 3 + ["2.0"] * 3


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    write_steps(tmp_path, 0, 5, loss=1.0)
    time.sleep(1.1)  # TensorBoard reads event files in the order of the second in their names
    write_steps(tmp_path, 3, 6, loss=2.0)
    assert points(tmp_path, "train", "sft/loss") == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_a_run_that_starts_again_keeps_nothing_of_an_earlier_one(tmp_path):
    write_steps(tmp_path, 0, 5, loss=1.0)
    write_steps(tmp_path, 0, 1, loss=2.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["sft/loss"]) for line in lines] == [(0, 2), (1, 2)]
    assert [line["response"] for line in read_metrics(tmp_path / "samples.jsonl")] == ["2.0"]


def test_a_line_that_a_killed_run_was_writing_is_dropped(tmp_path):
    write_steps(tmp_path, 0, 2, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "split": "heldout", "sft/lo')
    write_steps(tmp_path, 2, 3, loss=2.0)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_samples_keep_their_text_through_a_resume(tmp_path):
    text = "größer\u2028next \u0085 line\nlast \"quoted\""
    with run_log(tmp_path) as log:
        log.write_samples(1, [{"prompt": "p", "response": text, "score": 0.5}, {"response": "second"}])
    with run_log(tmp_path, first_step=1) as log:
        log.write_samples(2, [{"response": text}])
    with open(tmp_path / "samples.jsonl", encoding="utf-8") as file:
        raw = file.read()
    assert "größer" in raw  # readable as it is, not escaped
    assert [json.loads(line) for line in raw.split("\n")[:-1]] == [
        {"step": 1, "prompt": "p", "response": text, "score": 0.5},
        {"step": 1, "response": "second"},
        {"step": 2, "response": text},
    ]


def test_samples_are_json_whatever_their_numbers(tmp_path):
    with run_log(tmp_path) as log:
        log.write_samples(1, [{"response": "a", "score": float("nan"), "scores": {"model": float("inf"), "f": 1.0}}])
    text = (tmp_path / "samples.jsonl").read_text()
    assert text == '{"step": 1, "response": "a", "score": null, "scores": {"model": null, "f": 1.0}}\n'


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_steps(tmp_path, 0, 2, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_closed_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        with run_log(tmp_path) as log:
            log.write(1, "train", {"sft/loss": 2.0})
            raise RuntimeError("out of memory")
    assert log.file.closed


def test_progress_is_about_twenty_lines_with_the_metrics_that_matter(tmp_path, capsys):
    write_steps(tmp_path, 0, 100, loss=1.23456, total_steps=100)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "sft 0/100 held out: loss 1.235"
    assert len(lines) == 20
    assert lines[0].startswith("sft 5/100 loss 1.235 left 0:00:")
    assert lines[-1] == "sft 100/100 loss 1.235 left 0:00:00"


def test_a_slow_run_says_something_every_minute(tmp_path, capsys, monkeypatch):
    now = iter(range(0, 10**6, 45))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(now)))
    write_steps(tmp_path, 0, 6, loss=1.0, total_steps=1000)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["2/1000", "4/1000", "6/1000"]


def test_a_terminal_gets_a_display_that_starts_at_the_resumed_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with run_log(tmp_path, first_step=4) as log:
        assert log.screen.step == 4
        log.write(7, "train", {"sft/loss": 2.0})
        assert (log.screen.step, log.screen.latest) == (7, {"sft/loss": 2.0})
    assert not log.screen.live.is_started  # the terminal is handed back


def test_samples_are_shown_as_text_that_cannot_break_its_table(tmp_path):
    with run_log(tmp_path) as log:
        log.write_samples(3, [{"split": "heldout", "prompt": "a|b\n<b>", "response": "c", "score": 0.123456}])
    board = EventAccumulator(str(tmp_path / "tensorboard/heldout")).Reload()
    (shown,) = board.Tensors("samples/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    assert text.splitlines()[2] == "| a&#124;b<br>&lt;b&gt; | c | 0.1235 |"
    assert shown.step == 3


# -- a full disk, a removed folder -------------------------------------------------------------------------


def fill(disk: Path) -> None:
    """Leave no byte."""
    for size in (1 << 16, 1):
        with contextlib.suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
            while True:
                file.write(b"x" * size)


@pytest.mark.parametrize("lines", [1, 200])
def test_a_full_disk_ends_a_run_with_one_sentence_and_keeps_the_lines_before(tmp_path, capfd, lines):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(UserError) as told:
            with run_log(disk, 10_000) as log:
                for step in range(1, lines + 1):
                    log.write(step, "train", {"sft/loss": 1.0})
                fill(disk)
                for step in range(lines + 1, 10_000):
                    log.write(step, "train", {"sft/loss": 1.0})
        assert str(told.value).startswith(f"{disk}/metrics.jsonl: the disk is full; make room and start again: the run")
        kept = (disk / "metrics.jsonl").read_text().split("\n")[:-1]
        assert [json.loads(line)["step"] for line in kept][:lines] == list(range(1, lines + 1))
        said = capfd.readouterr()
        assert "Traceback" not in said.err and said.out.count("no more is written for TensorBoard") <= 1
        (disk / "ballast").unlink()
        write_steps(disk, lines, lines + 1, loss=2.0)  # room was made, the run goes on
        assert [line["step"] for line in read_metrics(disk / "metrics.jsonl")] == list(range(1, lines + 2))


def test_a_disk_that_is_full_at_the_start_is_one_sentence(tmp_path, capfd):
    with small_disk(tmp_path / "disk", 1 << 18) as disk:
        write_steps(disk, 0, 2, loss=1.0)
        before = (disk / "metrics.jsonl").read_text()
        fill(disk)
        with pytest.raises(UserError, match="metrics.jsonl: the disk is full"):
            with run_log(disk, first_step=1):
                pass
        assert (disk / "metrics.jsonl").read_text() == before
        with pytest.raises(UserError, match="samples.jsonl: the disk is full"):
            log = run_log(disk)
            log.write_samples(3, [{"response": "x" * 10_000}])


def test_tensorboard_that_cannot_write_is_given_up_and_the_run_goes_on(tmp_path, capfd):
    hook = threading.excepthook
    with run_log(tmp_path) as log:
        log.write(1, "train", {"sft/loss": 1.0})
        log.board.writers["train"].flush()
        shutil.rmtree(tmp_path / "tensorboard")
        (tmp_path / "tensorboard").touch()
        for step in range(2, 8):
            log.write(step, "train", {"sft/loss": 1.0})
            time.sleep(0.05)  # its thread writes
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    said = capfd.readouterr()
    assert said.out.count(f"warning: {tmp_path}/tensorboard: ") == 1
    assert said.out.count("no more is written for TensorBoard in this run") == 1
    assert "Traceback" not in said.err and threading.excepthook is hook


def test_without_a_folder_for_tensorboard_the_run_starts(tmp_path, capfd):
    (tmp_path / "tensorboard").touch()
    write_steps(tmp_path, 0, 2, loss=1.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert "no more is written for TensorBoard" in capfd.readouterr().out


def test_errors_of_other_threads_are_still_printed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def broken() -> None:
        raise RuntimeError("of this thread")

    with run_log(tmp_path):
        thread = threading.Thread(target=broken)
        thread.start()
        thread.join()
    assert [str(arguments.exc_value) for arguments in seen] == ["of this thread"]


def test_a_folder_that_is_removed_under_a_run_is_one_sentence_and_does_not_come_back(tmp_path, capfd):
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UserError, match=r"out/metrics.jsonl: was removed, .*; put back what you still need and start"):
        with run_log(output) as log:
            log.write(1, "train", {"sft/loss": 1.0})
            shutil.rmtree(output)
            log.write(2, "train", {"sft/loss": 1.0})
    with pytest.raises(UserError, match="out/samples.jsonl: was removed"):
        log.write_samples(2, [{"response": ""}])
    assert not output.exists() and "Traceback" not in capfd.readouterr().err


def test_bad_steps_are_noted_or_one_sentence(tmp_path):
    settings = sft_config(tmp_path, "m", "r")
    health = Health(settings)
    with pytest.raises(UserError, match="sft/bad_batches: was removed"):
        health.record_bad_step(1, "loss", [{"rows": ["a"]}])
    with pytest.raises(UserError, match="sft/health.jsonl: was removed"):
        health.record_bad_step(1, "loss", [])
    (tmp_path / "sft").mkdir()
    health.record_bad_step(1, "loss", [{"rows": ["ä"]}])
    assert "ä" in (tmp_path / "sft/bad_batches/step_000001_rank0.jsonl").read_text()
    assert json.loads((tmp_path / "sft/health.jsonl").read_text())["ranks"] == [0]


# -- Stopwatch ---------------------------------------------------------------------------------------------


def test_a_stopwatch_adds_up_a_phase_and_clears(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    watch = Stopwatch(CPU)
    for phase in ("rollout", "update", "rollout"):
        with watch(phase):
            pass
    assert watch.take() == {"time/rollout": 3.0, "time/update": 0.5}
    assert watch.take() == {}


def test_a_stopwatch_measures_seconds():
    watch = Stopwatch(CPU)
    with watch("sleep"):
        time.sleep(0.02)
    assert 0.02 <= watch.take()["time/sleep"] < 5


def test_a_phase_that_fails_is_timed_and_its_error_goes_on():
    watch = Stopwatch(CPU)
    with pytest.raises(KeyError):
        with watch("step"):
            raise KeyError
    assert list(watch.take()) == ["time/step"]
