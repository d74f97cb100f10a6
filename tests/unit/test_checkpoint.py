"""A checkpoint is whole or does not count, the newest whole one is used, and a run goes on as the run that it was."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.saves import (
    StandInEngine,
    before_each_operation,
    disk_full_at,
    killed_at,
    small_disk,
    synced_before_rename,
)
from tests.helpers.tiny import sft_config
from tristage.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from tristage.config import RunSettings
from tristage.engine.state import engine_pieces
from tristage.errors import UserError
from tristage.storage import durable
from tristage.storage.pieces import Piece, PieceReader, write_pieces


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """Settings of a run in tmp_path/sft that keeps 2 checkpoints."""
    return with_overrides(tmp_path)


def with_overrides(tmp_path: Path, *overrides: str) -> RunSettings:
    return sft_config(tmp_path, "model", "rows.jsonl", 0, *overrides)


def root_of(settings: RunSettings) -> Path:
    return Path(settings.output) / "checkpoints"


def folders(settings: RunSettings) -> list[str]:
    return sorted(path.name for path in root_of(settings).iterdir())


def save(settings: RunSettings, step: int, value: float = 0, **options: Any) -> None:
    save_checkpoint(settings, step, {"model": StandInEngine(value, steps=step % 5)}, **options)


def resume(settings: RunSettings, **engines: StandInEngine) -> tuple[int, float]:
    """(step, value) that a run would continue with; (0, -1) when it starts anew."""
    engine = StandInEngine(-1)
    step = load_checkpoint(settings, find_checkpoint(settings), engines or {"model": engine})
    return step, engine.value


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# -- saving and loading ------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_engine_by_engine(settings):
    save_checkpoint(settings, 7, {"actor": StandInEngine(1), "critic": StandInEngine(2)})
    engines = {"actor": StandInEngine(), "critic": StandInEngine()}
    assert load_checkpoint(settings, find_checkpoint(settings), engines) == 7
    assert (engines["actor"].value, engines["critic"].value) == (1, 2)


def test_moments_schedule_and_counters_go_on_where_they_were(settings):
    whole = StandInEngine(0.5, steps=3)
    save_checkpoint(settings, 3, {"model": whole})
    resumed = StandInEngine()
    load_checkpoint(settings, find_checkpoint(settings), {"model": resumed})
    assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr() == [0.1 / 4]
    for engine in (whole, resumed):
        engine.step()
    assert resumed.global_steps == 4
    for ours, theirs in zip(engine_pieces(resumed), engine_pieces(whole), strict=True):
        assert (ours.name, ours.start, ours.total) == (theirs.name, theirs.start, theirs.total)
        assert torch.equal(ours.tensor, theirs.tensor)


def test_the_newest_checkpoint_is_loaded_whatever_latest_says(settings):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    for text in ("step_000001", "", "step_000009", "../../elsewhere"):
        (root_of(settings) / "latest").write_text(text)
        assert resume(settings) == (2, 20)
    (root_of(settings) / "latest").unlink()
    assert resume(settings) == (2, 20)


def test_without_a_checkpoint_a_run_starts_at_0_with_its_own_weights(settings):
    assert resume(settings) == (0, -1)


def test_a_checkpoint_holds_all_that_the_run_was(settings):
    Path(settings.output).mkdir(parents=True)
    (Path(settings.output) / "environment.json").write_text('{"data": "abc:20"}')
    engines = {"actor": StandInEngine(steps=2), "critic": StandInEngine()}
    save_checkpoint(settings, 12, engines, control={"kl": {"coef": 0.1}})
    folder = root_of(settings) / "step_000012"
    names = ["actor", "critic", "manifest.json", "random_rank0.json", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["ranks"], state["zero_stages"]) == (12, 1, {"actor": 0, "critic": 0})
    assert (state["control"], state["data"], state["best"]) == ({"kl": {"coef": 0.1}}, "abc:20", None)
    assert state["settings"]["optimizer"]["learning_rate"] == settings.optimizer.learning_rate
    assert state["engines"]["actor"]["schedule_step"] == state["engines"]["actor"]["global_steps"] == 2
    found = find_checkpoint(settings)
    assert found.control == {"kl": {"coef": 0.1}} and found.pieces("own") is None


def test_pieces_of_the_step_itself_are_kept_beside_the_engines(settings):
    own = [Piece("average", 0, 3, torch.tensor([1.0, 2.0, 3.0]))]
    save_checkpoint(settings, 1, {"model": StandInEngine()}, own=own)
    read = torch.zeros(2)
    find_checkpoint(settings).pieces("own").read("average", 1, read)
    assert read.tolist() == [2, 3]


def test_the_global_random_states_are_restored(settings):
    save(settings, 1)
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    resume(settings)
    assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == drawn


@pytest.mark.parametrize("own_group", [True, False])  # as ZeRO 0 keeps it, and as the other stages do
def test_the_moving_scale_of_fp16_goes_on_and_a_fixed_one_stays(settings, own_group):
    def scaled(dynamic: bool, scale: float) -> StandInEngine:
        engine = StandInEngine()
        scaler = SimpleNamespace(cur_scale=scale, cur_iter=int(scale), last_overflow_iter=3, other=object())
        if own_group:
            scaler.dynamic_loss_scale = dynamic
            engine.optimizer.loss_scale_config = scaler
        else:
            engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = scaler, dynamic
        engine.scaler = scaler
        return engine

    save_checkpoint(settings, 1, {"model": scaled(True, 512.0)})
    for dynamic, expected in ((True, 512.0), (False, 1.0)):
        engine = scaled(dynamic, 1.0)
        load_checkpoint(settings, find_checkpoint(settings), {"model": engine})
        assert (engine.scaler.cur_scale, engine.scaler.cur_iter) == (expected, int(expected))


def test_a_checkpoint_of_another_model_is_refused(settings):
    save(settings, 1)
    with pytest.raises(UserError, match="weight has 16 elements there and 25 in this model"):
        load_checkpoint(settings, find_checkpoint(settings), {"model": StandInEngine(size=5)})
    with pytest.raises(UserError, match="has no critic"):
        load_checkpoint(settings, find_checkpoint(settings), {"critic": StandInEngine()})


# -- pieces ------------------------------------------------------------------------------------------------


def test_pieces_of_any_cut_are_read_in_any_other(tmp_path):
    whole = torch.randn(23, dtype=torch.float32)
    for rank, (start, stop) in enumerate([(0, 9), (9, 10), (10, 23)]):
        write_pieces(tmp_path / f"rank{rank}.safetensors", [Piece("w", start, 23, whole[start:stop])])
    reader = PieceReader(tmp_path, 3)
    for start in range(23):
        for stop in range(start, 24):
            found = torch.full((stop - start,), torch.nan)
            reader.read("w", start, found)
            assert torch.equal(found, whole[start:stop])
    with pytest.raises(UserError, match=r"lacks w\[23:25\]"):
        reader.read("w", 20, torch.zeros(5))
    with pytest.raises(UserError, match="lacks v"):
        reader.read("v", 0, torch.zeros(1))
    with pytest.raises(UserError, match=r"lacks w\[9:23\]"):
        missing = tmp_path / "missing"
        missing.mkdir()
        for rank, name in enumerate(("rank0", "rank2")):
            shutil.copy(tmp_path / f"{name}.safetensors", missing / f"rank{rank}.safetensors")
        PieceReader(missing, 2).read("w", 0, torch.zeros(23))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_keep_every_bit_of_any_type(tmp_path, dtype):
    tensor = torch.tensor([0.1, -3e-5, float("inf"), 0.0]).to(dtype)
    entry = write_pieces(tmp_path / "rank0.safetensors", [Piece("empty", 4, 4, tensor[:0]), Piece("w", 0, 4, tensor)])
    assert entry.size == (tmp_path / "rank0.safetensors").stat().st_size
    assert entry.checksum == durable.checksum(tmp_path / "rank0.safetensors")
    found = torch.zeros(4, dtype=dtype)
    PieceReader(tmp_path, 1).read("w", 0, found)
    assert torch.equal(found, tensor)


# -- damage ------------------------------------------------------------------------------------------------


def every_file(settings: RunSettings, step: int) -> list[str]:
    folder = root_of(settings) / f"step_{step:06d}"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


FILES = ["manifest.json", "model/rank0.safetensors", "random_rank0.json", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "empty", "delete"])
def test_a_damaged_file_is_reported_and_the_checkpoint_before_is_used(settings, capsys, name, damage):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    assert every_file(settings, 2) == FILES
    path = root_of(settings) / "step_000002" / name
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        flip(path, 8 * (path.stat().st_size // 2))
    else:
        data = path.read_bytes()
        path.write_bytes({"truncate": data[:-1], "append": data + b"\n", "empty": b""}[damage])
    assert resume(settings) == (1, 10)
    said = capsys.readouterr().out
    assert f"warning: {path.parents[len(Path(name).parents) - 1]}: " in said and Path(name).name in said
    assert f"resuming from {root_of(settings) / 'step_000001'}, the newest that is not damaged" in said


def test_when_none_is_whole_the_run_stops_and_says_why(settings):
    for step in (1, 2):
        save(settings, step)
        flip(root_of(settings) / f"step_00000{step}" / "state.json", 800)
    with pytest.raises(UserError, match="every checkpoint is damaged.*02: state.json is damaged.*step_000001.*never"):
        find_checkpoint(settings)


def test_a_checkpoint_of_an_earlier_version_is_no_silent_new_start(settings):
    save(settings, 1)
    (root_of(settings) / "step_000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest.json, as those of earlier versions.*resume=never"):
        find_checkpoint(settings)


def test_a_manifest_that_was_moved_to_other_files_does_not_hold(settings):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    for name in ("manifest.json", "state.json"):
        shutil.copy(root_of(settings) / "step_000001" / name, root_of(settings) / "step_000002" / name)
    assert resume(settings) == (1, 10)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_pickle_in_a_checkpoint_with_a_forged_manifest_is_not_executed(settings, tmp_path, name):
    save(settings, 1)
    folder = root_of(settings) / "step_000001"
    harm = tmp_path / "harm"
    for content in (pickle.dumps(Malicious(harm)), saved_by_torch(Malicious(harm), tmp_path)):
        (folder / name).write_bytes(content)
        paths = {file: folder / file for file in FILES[1:]}
        files = {file: durable.Entry(path.stat().st_size, durable.checksum(path)) for file, path in paths.items()}
        (folder / "manifest.json").write_text(durable.manifest_text(files, 1))
        assert durable.wrong_content(folder, files) is None
        with pytest.raises((UserError, ValueError, KeyError)):
            resume(settings)
        assert not harm.exists()
    pickle.loads(pickle.dumps(Malicious(harm)))
    assert harm.exists()  # it would have been


def saved_by_torch(item: Any, folder: Path) -> bytes:
    torch.save(item, folder / "saved.pt")
    return (folder / "saved.pt").read_bytes()


# -- killed while saving -----------------------------------------------------------------------------------


def test_a_save_that_is_killed_at_any_operation_leaves_the_newest_whole_one(tmp_path):
    """keep_last=1: the hardest case, a removal follows each save."""
    settings = with_overrides(tmp_path, "keep_last=1")
    found = []
    for operation in range(1000):
        shutil.rmtree(settings.output, ignore_errors=True)
        save(settings, 1, value=10)
        killed = killed_at(operation, lambda: save(settings, 2, value=20))
        found.append(resume(settings))
        save(settings, 3, value=30)
        assert folders(settings) == ["latest", "step_000003"]
        assert (root_of(settings) / "latest").read_text() == "step_000003"
        if not killed:
            break
    assert not killed and len(found) > 20
    turn = found.index((2, 20))
    assert found == [(1, 10)] * turn + [(2, 20)] * (len(found) - turn) and turn > 10
    print(f"killed at each of {len(found) - 1} operations: the older checkpoint {turn} times, then the newer")


def test_a_step_that_is_saved_again_is_there_at_any_operation(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    found = set()
    for operation in range(1000):
        shutil.rmtree(settings.output, ignore_errors=True)
        save(settings, 1, value=10)
        killed = killed_at(operation, lambda: save(settings, 1, value=11))
        found.add(resume(settings))
        if not killed:
            break
    assert found == {(1, 10), (1, 11)} and folders(settings) == ["latest", "step_000001"]


def test_never_less_than_one_whole_checkpoint_is_on_the_disk(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    counts = []

    def look(_: int) -> None:
        whole = 0
        for folder in root_of(settings).glob("step_*"):
            manifest = durable.read_manifest(folder)
            sound = isinstance(manifest, durable.Manifest) and not durable.wrong_content(folder, manifest.files)
            whole += sound and folder.suffix != ".partial"
        counts.append(whole)

    save(settings, 1)
    with before_each_operation(look):
        save(settings, 2)
        save(settings, 2)
        save(settings, 3)
    assert min(counts) == 1 and max(counts) == 2
    print(f"whole checkpoints counted at {len(counts)} operations: never none")


def test_a_partial_folder_is_never_a_checkpoint_and_gives_way_to_a_whole_one(settings):
    save(settings, 2)
    shutil.move(root_of(settings) / "step_000002", root_of(settings) / "step_000002.partial")
    assert resume(settings) == (0, -1)
    save(settings, 3)
    assert folders(settings) == ["latest", "step_000003"]


def test_every_file_is_synced_before_the_checkpoint_has_its_name(settings):
    own = [Piece("average", 0, 3, torch.zeros(3))]
    with synced_before_rename() as unsynced:
        save_checkpoint(settings, 1, {"model": StandInEngine()}, own=own)
    assert unsynced == {root_of(settings) / "step_000001": []}


# -- a full disk -------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_write_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    save(settings, 1, value=10)
    operation = 0
    while True:
        try:
            with disk_full_at(operation):
                save(settings, 2, value=20)
            break
        except UserError as error:
            assert "the disk is full: step_000002 needs" in str(error)
        assert resume(settings) in ((1, 10), (2, 20))
        if resume(settings) == (2, 20):
            break
        assert (root_of(settings) / "latest").read_text() == "step_000001"
        assert folders(settings) == ["latest", "step_000001"]
        operation += 1
    assert operation > 10
    print(f"the disk full at each of {operation} writes: one sentence each time, the older checkpoint whole")


def test_a_real_full_disk_is_seen_before_and_during_a_save(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 1_500_000) as disk:
        settings = with_overrides(disk, "check_disk=false")
        save(settings, 1, value=10)
        large = StandInEngine(size=400, steps=1)  # 1.9 MB with its moments
        with pytest.raises(UserError, match=r"the disk is full: step_000002 needs 29\d{5} bytes, 14\d{5} are free"):
            save_checkpoint(settings, 2, {"model": large})
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real("/")._replace(free=10**12))
        with pytest.raises(UserError, match="the disk is full: step_000002 needs"):
            save_checkpoint(settings, 2, {"model": large})
        assert folders(settings) == ["latest", "step_000001"] and resume(settings) == (1, 10)
        monkeypatch.undo()
        assert resume(settings) == (1, 10)
        with pytest.raises(UserError, match=r"a checkpoint takes 29\d{5} bytes, 59\d{5} must be free in .*check_disk"):
            load_checkpoint(with_overrides(disk), None, {"model": large})


def save_on_a_full_disk(rank: int, folder: str) -> list[str]:
    """Both ranks write, and the disk is full under one of them (a stand-in's second parameter is rank 1's)."""
    from tests.helpers.tiny import sft_config as config
    from tristage import dist

    dist.init("cpu")
    settings = config(Path(folder) / f"settings{rank}", "model", "rows.jsonl", 0, f"output={folder}/out")
    save_checkpoint(settings, 1, {"model": StandInEngine(1, steps=1)})
    said = []
    for full in (0, 1):
        try:
            with disk_full_at(3) if rank == full else before_each_operation(lambda _: None):
                save_checkpoint(settings, 2, {"model": StandInEngine(2, steps=2)})
        except UserError as error:
            said.append(str(error))
        dist.barrier()
        said.append(",".join(sorted(path.name for path in Path(folder, "out", "checkpoints").iterdir())))
    found = find_checkpoint(settings)
    assert found is not None
    said.append(found.folder.name)
    return said


def test_all_ranks_agree_that_the_disk_of_one_is_full(tmp_path):
    first, second = run_ranks(2, save_on_a_full_disk, str(tmp_path))
    assert first == second
    full, left, full_again, left_again, found = first
    assert "the disk is full: step_000002 needs" in full and "the disk is full" in full_again
    assert (left, left_again, found) == ("latest,step_000001", "latest,step_000001", "step_000001")


# -- which stay --------------------------------------------------------------------------------------------


def test_only_the_last_ones_are_kept(settings):
    for step in (1, 2, 3, 4):
        save(settings, step)
    assert folders(settings) == ["latest", "step_000003", "step_000004"]
    assert (root_of(settings) / "latest").read_text() == "step_000004"


def test_keep_last_1_keeps_the_one_just_written(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1")
    for step in (999_999, 1_000_000, 5):  # by the order of saving: steps have any number of digits
        save(settings, step)
        assert folders(settings) == ["latest", f"step_{step:06d}"]


def test_every_so_many_steps_one_stays(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1", "keep_every_n_steps=4")
    for step in range(1, 11):
        save(settings, step)
    assert folders(settings) == ["latest", "step_000004", "step_000008", "step_000010"]


def best_of(tmp_path: Path, values: list[float], *overrides: str) -> list[str]:
    settings = with_overrides(tmp_path, "keep_last=1", *overrides)
    for step, value in enumerate(values, 1):
        save(settings, step, heldout={"sft/loss": value, "other": 0.0})
    return [name for name in folders(settings) if name != "latest"]


def test_the_best_stays_until_a_better_one_comes(tmp_path):
    rule = "keep_best={metric: sft/loss}"
    assert best_of(tmp_path / "a", [3, 1, 2, 2], rule) == ["step_000002", "step_000004"]
    assert best_of(tmp_path / "b", [3, 1, 2, 0.5], rule) == ["step_000004"]
    assert best_of(tmp_path / "c", [1, 1, 2], rule) == ["step_000001", "step_000003"]  # the first of equals
    higher = "keep_best={metric: sft/loss, lower_is_better: false}"
    assert best_of(tmp_path / "d", [1, 3, 2, 2], higher) == ["step_000002", "step_000004"]


def test_the_best_is_known_to_the_run_that_goes_on(tmp_path):
    settings = with_overrides(tmp_path, "keep_last=1", "keep_best.metric=sft/loss")
    save(settings, 1, heldout={"sft/loss": 1.0})
    save(settings, 2, heldout={"sft/loss": 2.0})
    assert resume(settings) == (2, 0)  # all that is known is on the disk
    save(settings, 3, heldout={"sft/loss": 1.5})
    assert folders(settings) == ["latest", "step_000001", "step_000003"]
    assert resume(settings) == (3, 0)  # the newest, not the best


def test_a_measure_that_is_no_number_is_not_the_best(tmp_path):
    assert best_of(tmp_path, [2, float("nan"), float("-inf"), 3], "keep_best.metric=sft/loss") == [
        *("step_000001", "step_000004"),
    ]


def test_a_metric_that_is_not_measured_is_an_error_that_names_those_that_are(tmp_path):
    settings = with_overrides(tmp_path, "keep_best.metric=sft/lost")
    with pytest.raises(UserError, match="there is no held-out sft/lost; use one of sft/loss, other"):
        save(settings, 1, heldout={"sft/loss": 1.0, "other": 2.0})
    assert not list(root_of(settings).glob("step_*"))


def test_keep_best_wants_each_checkpoint_evaluated(tmp_path):
    rule = "keep_best.metric=sft/loss"
    for more in ([], ["save_every=4"], ["save_every=4", "evaluate_every=3"]):
        if more:
            with pytest.raises(UserError, match="set evaluate_every to the same"):
                with_overrides(tmp_path, rule, *more)
        else:
            with_overrides(tmp_path, rule)
    with_overrides(tmp_path, rule, "save_every=4", "evaluate_every=2")


def test_a_run_that_starts_again_keeps_its_own_checkpoint_not_the_higher_ones_it_found(tmp_path):
    settings = with_overrides(tmp_path, "resume=never")
    for step in (200, 400, 100):
        save(settings, step, value=step)
    assert folders(settings) == ["latest", "step_000100", "step_000400"]
    assert resume(with_overrides(tmp_path)) == (100, 100)


def test_a_damaged_checkpoint_does_not_count_among_those_kept(settings):
    save(settings, 1)
    save(settings, 2)
    (root_of(settings) / "step_000002" / "state.json").write_text("")
    save(settings, 3)
    assert folders(settings) == ["latest", "step_000001", "step_000003"]


# -- which is resumed --------------------------------------------------------------------------------------


def test_resume_never_looks_at_no_checkpoint(settings, tmp_path):
    save(settings, 1, value=10)
    assert resume(with_overrides(tmp_path, "resume=never")) == (0, -1)


def test_resume_takes_a_checkpoint_or_the_folder_of_a_run(settings, tmp_path):
    save(settings, 1, value=10)
    save(settings, 2, value=20)
    root = root_of(settings)
    for path, found in ((root / "step_000001", (1, 10)), (root, (2, 20)), (settings.output, (2, 20))):
        elsewhere = with_overrides(tmp_path, f"resume={path}", f"output={tmp_path / 'other'}")
        assert resume(elsewhere) == found
    before = with_overrides(tmp_path, f"resume={root / 'step_000001'}")
    assert resume(before) == (1, 10)
    save(before, 2, value=21)
    assert resume(settings) == resume(before) == (2, 21)  # a job that is queued again goes on
    save(before, 3, value=31)
    assert not (root / "step_000001").exists() and resume(before) == (3, 31)
    other = with_overrides(tmp_path, f"resume={root / 'step_000002'}", f"output={tmp_path / 'other'}")
    save(other, 9, value=91)
    assert resume(other) == (9, 91)
    (root_of(other) / "step_000009" / "random_rank0.json").unlink()
    assert resume(other) == (2, 21)


def test_a_path_without_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", "atuo"):
        with pytest.raises(UserError, match=f"key `resume`: there is no checkpoint in {path}"):
            find_checkpoint(with_overrides(tmp_path, f"resume={path}"))


def test_a_checkpoint_that_was_asked_for_by_name_has_no_substitute(settings, tmp_path):
    save(settings, 1)
    save(settings, 2)
    (root_of(settings) / "step_000002" / "state.json").write_text("")
    with pytest.raises(UserError, match="every checkpoint is damaged .*state.json has 0 bytes"):
        find_checkpoint(with_overrides(tmp_path, f"resume={root_of(settings) / 'step_000002'}"))


# -- changed settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["save_every=3", "keep_last=5", "evaluate_every=2", "micro_batch=4", "data.workers=2", "keep_best.metric=x"],
)
def test_what_the_result_does_not_depend_on_may_change_and_is_told(settings, tmp_path, capsys, change):
    save(settings, 1, value=10)
    assert resume(with_overrides(tmp_path, change)) == (1, 10)
    key, _, value = change.partition("=")
    said = [line for line in capsys.readouterr().out.split("\n") if "without effect on the result" in line]
    assert len(said) == 1 and f"{key}: " in said[0] and f"-> {value}" in said[0]


@pytest.mark.parametrize(
    "change", ["seed=1", "global_batch=16", "optimizer.learning_rate=0.5", "model=other", "data.train=more.jsonl",
               "max_tokens=32", "precision=bf16", "epochs=3", "packing=true", "lora.rank=4"],
)  # fmt: skip
def test_what_makes_another_run_stops_with_both_values(settings, tmp_path, capsys, change):
    save(settings, 1, value=10)
    key = {"data.train": r"data.train\[0\].path"}.get(key := change.partition("=")[0], key)
    with pytest.raises(UserError, match=f"other settings: .*{key}: .* -> .*resume_changed=true.*resume=never"):
        find_checkpoint(with_overrides(tmp_path, change))
    assert resume(with_overrides(tmp_path, change, "resume_changed=true")) == (1, 10)
    assert "resuming (resume_changed)" in capsys.readouterr().out
    assert resume(with_overrides(tmp_path, change, "resume=never")) == (0, -1)


def test_other_data_stop_as_other_settings_do(settings, tmp_path):
    Path(settings.output).mkdir(parents=True)
    (Path(settings.output) / "environment.json").write_text('{"data": "abc:20"}')
    save(settings, 1)
    assert find_checkpoint(settings, "abc:20") is not None
    with pytest.raises(UserError, match="other settings: the rows of `data`.*resume_changed=true"):
        find_checkpoint(settings, "abc:21")
    assert find_checkpoint(with_overrides(tmp_path, "resume_changed=true"), "abc:21") is not None


def test_another_model_under_the_same_name_stops_and_is_named(settings, tmp_path):
    Path(settings.output).mkdir(parents=True)
    (Path(settings.output) / "environment.json").write_text('{"data": "d", "models": {"model": "a", "x.model": "b"}}')
    save(settings, 1, value=10)
    assert find_checkpoint(settings, "d", {"model": "a", "x.model": "b"}) is not None
    assert find_checkpoint(settings, "d", {"model": "", "other.model": "c"}) is not None  # nothing is known of these
    with pytest.raises(UserError, match=r"other settings: model \(model\): its content is not the same; put them back"):
        find_checkpoint(settings, "d", {"model": "z", "x.model": "b"})
    allowed = with_overrides(tmp_path, "resume_changed=true")
    assert find_checkpoint(allowed, "d", {"model": "z", "x.model": "b"}) is not None


def test_a_checkpoint_that_knows_no_models_still_resumes(settings):
    save(settings, 1, value=10)
    folder = root_of(settings) / "step_000001"
    state = json.loads((folder / "state.json").read_text())
    del state["models"]  # as an earlier version wrote it
    files = durable.read_manifest(folder).files
    files["state.json"] = durable.write_text(folder / "state.json", json.dumps(state))
    durable.write_text(folder / "manifest.json", durable.manifest_text(files, 1))
    assert find_checkpoint(settings, "d", {"model": "z"}) is not None


def test_new_settings_win_over_the_checkpoints_when_asked_for(settings, tmp_path):
    save_checkpoint(settings, 3, {"model": StandInEngine(steps=3)})
    engine = StandInEngine()
    engine.lr_scheduler.base_lrs = [0.4]
    load_checkpoint(settings, find_checkpoint(settings), {"model": engine})
    assert engine.lr_scheduler.get_last_lr() == [0.4 / 4] and engine.optimizer.param_groups[0]["lr"] == 0.4 / 4
