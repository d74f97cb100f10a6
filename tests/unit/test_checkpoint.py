"""A checkpoint is whole or not there, the pointer comes last, and what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.tiny import sft_config
from tristage import checkpoint
from tristage.checkpoint import check_resumable, latest_checkpoint, load_checkpoint, save_checkpoint
from tristage.errors import UserError

STAGES = {"model": 2}


class StandInEngine:
    """An engine whose state is one number; keeps what a checkpoint folder looked like while it was written."""

    def __init__(self, value: int = 0, stage: int = 2, is_quantized: bool = False):
        self.value, self.stage = value, stage
        self.module = SimpleNamespace(model=SimpleNamespace(is_quantized=is_quantized))
        self.options: list[dict[str, bool]] = []
        self.seen: list[tuple[str, bool]] = []

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, **options: bool) -> None:
        self.options.append(options)
        self.seen.append((Path(folder).name, save_latest))
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "value").write_text(str(self.value))

    def load_checkpoint(self, folder: str, tag: str, **options: bool) -> tuple[str, dict]:
        self.options.append(options)
        self.value = int((Path(folder) / tag / "value").read_text())
        return folder, {}

    def zero_optimization_stage(self) -> int:
        return self.stage


@pytest.fixture
def settings(tmp_path: Path):
    """Settings of a run in tmp_path/sft that keeps 2 checkpoints."""
    return sft_config(tmp_path, "model", "rows.jsonl")


def with_overrides(tmp_path: Path, *overrides: str):
    return sft_config(tmp_path, "model", "rows.jsonl", 0, *overrides)


def folders(settings) -> list[str]:
    return sorted(path.name for path in (Path(settings.output) / "checkpoints").iterdir())


def save(settings, step: int, value: int = 0) -> None:
    save_checkpoint(settings, step, {"model": StandInEngine(value)})


# -- saving and loading ------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_engine_by_engine(settings):
    save_checkpoint(settings, 7, {"actor": StandInEngine(1), "critic": StandInEngine(2)})
    engines = {"actor": StandInEngine(), "critic": StandInEngine()}
    assert load_checkpoint(settings, engines) == 7
    assert (engines["actor"].value, engines["critic"].value) == (1, 2)


def test_the_latest_checkpoint_is_loaded(settings):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    engine = StandInEngine()
    assert load_checkpoint(settings, {"model": engine}) == 2
    assert engine.value == 20


def test_without_a_checkpoint_a_run_starts_at_0_with_its_own_weights(settings):
    engine = StandInEngine(5)
    assert load_checkpoint(settings, {"model": engine}) == 0
    assert engine.value == 5
    check_resumable(settings, STAGES)


def test_a_checkpoint_holds_its_step_ranks_and_stages(settings):
    save_checkpoint(settings, 12, {"actor": StandInEngine(stage=3), "critic": StandInEngine(stage=1)})
    folder = Path(settings.output) / "checkpoints" / "step_000012"
    assert sorted(path.name for path in folder.iterdir()) == ["actor", "critic", "state.json"]
    state = json.loads((folder / "state.json").read_text())
    assert state == {"step": 12, "ranks": 1, "zero_stages": {"actor": 3, "critic": 1}, "control": None}


# -- killed while saving -----------------------------------------------------------------------------------


def test_engines_write_beside_and_do_not_point_at_it(settings):
    engine = StandInEngine()
    save_checkpoint(settings, 3, {"model": engine})
    assert engine.seen == [("step_000003.partial", False)]  # False: DeepSpeed writes no `latest` of its own
    assert folders(settings) == ["latest", "step_000003"]


def test_the_pointer_is_written_last(settings, monkeypatch):
    save(settings, 1, value=10)
    root = Path(settings.output) / "checkpoints"
    found = []

    def look_and_write(path: Path, text: str) -> None:
        found.append((folders(settings), (root / text / "state.json").is_file(), path.read_text()))

    monkeypatch.setattr(checkpoint, "_write_whole", look_and_write)
    save(settings, 2)
    assert found == [(["latest", "step_000001", "step_000002"], True, "step_000001")]


def test_a_save_that_dies_in_an_engine_leaves_the_checkpoint_before(settings):
    class Dies(StandInEngine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool, **options: bool) -> None:
            super().save_checkpoint(folder, tag, save_latest, **options)
            raise OSError("no space left on device")

    save(settings, 1, value=10)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(settings, 2, {"model": Dies(20)})
    assert folders(settings) == ["latest", "step_000001", "step_000002.partial"]
    engine = StandInEngine()
    assert load_checkpoint(settings, {"model": engine}) == 1
    assert engine.value == 10


def test_a_checkpoint_leaves_quantised_weights_out_and_does_not_miss_them(settings):
    engines = {"whole": StandInEngine(), "quantised": StandInEngine(is_quantized=True)}
    save_checkpoint(settings, 1, engines)
    load_checkpoint(settings, engines)
    assert engines["whole"].options == [{}, {"load_module_strict": True}]
    assert engines["quantised"].options == [{"exclude_frozen_parameters": True}, {"load_module_strict": False}]


def test_a_partial_folder_is_never_a_checkpoint_and_gives_way_to_a_whole_one(settings):
    partial = Path(settings.output) / "checkpoints" / "step_000002.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "stale").touch()
    (partial / "state.json").write_text('{"step": 2}')
    assert latest_checkpoint(Path(settings.output)) is None
    assert load_checkpoint(settings, {"model": StandInEngine()}) == 0
    save(settings, 2)
    assert folders(settings) == ["latest", "step_000002"]
    assert not (partial.with_suffix("") / "model" / "stale").exists()


def test_a_pointer_at_nothing_is_an_error_that_names_it(settings):
    save(settings, 1)
    pointer = Path(settings.output) / "checkpoints" / "latest"
    pointer.write_text("step_000009")
    with pytest.raises(UserError) as caught:
        latest_checkpoint(Path(settings.output))
    assert str(caught.value) == (
        f"{pointer}: points at step_000009, which is not there; write the name of a whole checkpoint"
    )


def test_a_pointer_may_be_written_by_hand(settings):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    (Path(settings.output) / "checkpoints" / "latest").write_text("step_000001\n")
    assert load_checkpoint(settings, {"model": StandInEngine()}) == 1


# -- rotation ----------------------------------------------------------------------------------------------


def test_only_the_last_ones_are_kept(settings):
    for step in (1, 2, 3, 4):
        save(settings, step)
    assert folders(settings) == ["latest", "step_000003", "step_000004"]


def test_keep_last_1_keeps_the_one_just_written(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    for step in (1, 2):
        save(settings, step)
    assert folders(settings) == ["latest", "step_000002"]


def test_steps_of_seven_digits_are_not_older_than_those_of_six(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    save(settings, 999_999)
    age(settings, "step_999999")
    save(settings, 1_000_000)
    assert folders(settings) == ["latest", "step_1000000"]


def test_a_run_that_starts_again_keeps_its_own_checkpoint_not_the_higher_ones_it_found(tmp_path):
    settings = with_overrides(tmp_path, "resume=never")
    for step in (200, 400):
        save(settings, step)
        age(settings, f"step_000{step}")
    save(settings, 100)
    assert "step_000100" in folders(settings)
    assert latest_checkpoint(Path(settings.output)).name == "step_000100"
    age(settings, "step_000100", hours=1)
    save(settings, 150)
    assert folders(settings) == ["latest", "step_000100", "step_000150"]


def age(settings, name: str, hours: int = 2) -> None:
    """As if the checkpoint had been written hours ago: file systems tell the time in ticks longer than a save here."""
    folder = Path(settings.output) / "checkpoints" / name
    then = folder.stat().st_mtime - 3600 * hours + int(name.removeprefix("step_")) / 1e6
    os.utime(folder, (then, then))


def test_a_step_saved_again_replaces_the_one_before(settings):
    save(settings, 1, value=10)
    save(settings, 1, value=11)
    engine = StandInEngine()
    assert (load_checkpoint(settings, {"model": engine}), engine.value) == (1, 11)


# -- what cannot be resumed --------------------------------------------------------------------------------


def test_the_same_ranks_and_stages_can_be_resumed(settings, monkeypatch):
    save(settings, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_resumable(settings, STAGES)


def test_another_number_of_ranks_is_refused(settings, monkeypatch):
    save(settings, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError) as caught:
        check_resumable(settings, STAGES)
    assert str(caught.value) == (
        f"{settings.output}/checkpoints/step_000001: was written by 1 ranks, this run has 4; start as many, "
        "or start again with resume=never"
    )


@pytest.mark.parametrize("stages", [{"model": 3}, {"actor": 2}, {"model": 2, "critic": 2}])
def test_other_engines_or_stages_are_refused(settings, stages):
    save(settings, 1)
    with pytest.raises(UserError) as caught:
        check_resumable(settings, stages)
    assert str(caught.value) == (
        f"{settings.output}/checkpoints/step_000001: was written with ZeRO stages {STAGES}, this run has {stages}; "
        "use the same, or start again with resume=never"
    )


def test_resume_never_looks_at_no_checkpoint(settings, tmp_path):
    save(settings, 1, value=10)
    never = with_overrides(tmp_path, "resume=never")
    check_resumable(never, {"model": 3})
    engine = StandInEngine(5)
    assert load_checkpoint(never, {"model": engine}) == 0
    assert engine.value == 5
