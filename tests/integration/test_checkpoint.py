"""Checkpoints of real runs: damaged, cut off while written, resumed by other ranks, refused for other settings."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import step1_sft.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.interrupted import Killed, kill_at, untimed
from tests.helpers.ranks import run_ranks
from tests.helpers.saves import before_each_operation, killed_at
from tristage.checkpoint import find_checkpoint
from tristage.errors import UserError
from tristage.training import run, setup

STEPS = {"sft": step1_sft.train, "ppo": step3_ppo.train}
SAVES = {"sft": ["max_steps=6", "save_every=2"], "ppo": ["iterations=3", "save_every=1"]}
CUT = {"sft": 4, "ppo": 2}  # the save that is cut off


def train(rank: int, step: str, argv: list[str], kill: int | None = None) -> None:
    main: Callable[[list[str]], None] = STEPS[step].main
    if kill is None:
        main(argv)
    else:
        with kill_at(kill), pytest.raises(Killed):
            main(argv)


def argv_of(folder: Path, step: str, stage: int = 2) -> list[str]:
    rows = folder / "rows"
    if step == "sft":
        tiny.sft_config(folder, str(folder / "actor"), str(rows / "sft.jsonl"), stage)
    else:
        tiny.ppo_config(folder, str(folder / "actor"), str(folder / "scorer"), str(rows / "prompts.jsonl"), stage)
    more = ["ema.decay=0.9", "ppo.adaptive_kl_target=0.5", "ppo.scale_reward=true"] if step == "ppo" else []
    return ["--config", str(folder / f"{step}.yaml"), *SAVES[step], *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks in one piece, and one that was killed with two checkpoints."""
    base = tmp_path_factory.mktemp("checkpoint")
    rows = tiny.write_rows(base / "rows")
    actor = tiny.write_model(base / "actor")
    tiny.write_reward_model(base / "scorer", actor)
    run_ranks(2, train, "sft", [*argv_of(base, "sft"), f"output={base}/whole"])
    run_ranks(2, train, "sft", [*argv_of(base, "sft"), f"output={base}/killed"], 5)
    assert rows and sorted(path.name for path in (base / "killed/checkpoints").iterdir()) == [
        *("latest", "step_000002", "step_000004"),
    ]
    return base


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder / "killed", folder / name))


def finals_equal(ours: Path, theirs: Path, *names: str) -> bool:
    for name in names or ("final",):
        a, b = (load_file(output / name / "model.safetensors") for output in (ours, theirs))
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


# -- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_flips_and_truncations_anywhere_are_seen_and_the_one_before_is_used(folder, capsys, each) -> None:
    rng = random.Random(each)
    settings = tiny.load_config(tiny.SFTConfig, [*argv_of(folder, "sft"), f"output={copied(folder, f'damaged{each}')}"])
    root = Path(settings.output) / "checkpoints"
    files = sorted(path for path in (root / "step_000004").rglob("*") if path.is_file())
    assert len(files) == 6  # of two ranks: tensors and random states; state and manifest
    with tiny.one_rank():
        assert find_checkpoint(settings).folder.name == "step_000004"
        for path in files:
            whole = path.read_bytes()
            for turn in range(each):
                data = bytearray(whole)
                if turn % 3:
                    place = rng.randrange(len(data))
                    data[place] ^= 1 << rng.randrange(8)
                else:
                    data = data[: rng.randrange(len(data))]
                path.write_bytes(data)
                capsys.readouterr()
                assert find_checkpoint(settings).folder.name == "step_000002"
                name = path.relative_to(root / "step_000004")
                assert f"warning: {root}/step_000004: {name}" in capsys.readouterr().out
            path.write_bytes(whole)
        assert find_checkpoint(settings).folder.name == "step_000004"


def test_a_run_that_fell_back_ends_as_one_that_was_never_killed(folder) -> None:
    output = copied(folder, "fell_back")
    (output / "checkpoints/step_000004/model/rank1.safetensors").write_bytes(b"")
    run_ranks(2, train, "sft", [*argv_of(folder, "sft"), f"output={output}"])
    assert finals_equal(output, folder / "whole")
    assert untimed(output / "metrics.jsonl") == untimed(folder / "whole/metrics.jsonl")


# -- other ranks and stages --------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks_and_another_stage(folder, ranks, stage) -> None:
    output = copied(folder, f"on_{ranks}")
    more = [f"output={output}", f"deepspeed={tiny.deepspeed_json(stage)}"]
    run_ranks(ranks, train, "sft", [*argv_of(folder, "sft"), *more])
    ours, theirs = (untimed(path / "metrics.jsonl") for path in (output, folder / "whole"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["sft/loss"] == pytest.approx(its["sft/loss"], abs=1e-5)


@pytest.mark.slow
def test_ppo_goes_on_with_other_ranks_and_another_stage(folder) -> None:
    """Actor, critic, average, KL controller and reward scale; the sampled tokens are the same ones."""
    run_ranks(2, train, "ppo", [*argv_of(folder, "ppo", stage=3), f"output={folder}/ppo_whole"])
    run_ranks(2, train, "ppo", [*argv_of(folder, "ppo", stage=3), f"output={folder}/ppo_on"], 3)
    run_ranks(1, train, "ppo", [*argv_of(folder, "ppo", stage=2), f"output={folder}/ppo_on"])
    ours, theirs = (untimed(folder / name / "metrics.jsonl")[-1] for name in ("ppo_on", "ppo_whole"))
    assert ours["rollout/length"] == theirs["rollout/length"] and ours["step"] == theirs["step"] == 3
    for name in ("objective/score", "objective/kl", "ema/objective/score"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


# -- killed while saving -----------------------------------------------------------------------------------


def cut_off(rank: int, step: str, argv: list[str], base: str, share: int) -> list[tuple[int, bool, str]]:
    """Runs that are killed at operations of one save, each then run again: (operation, killed, resumed from).

    At every `share`-th operation; the processes are forked, so that the imports are paid for once.
    """
    save, main = run.save_checkpoint, STEPS[step].main

    def counted(operation: int) -> Any:
        def saving(settings: Any, now: int, *arguments: Any, **options: Any) -> None:
            if now != CUT[step]:
                return save(settings, now, *arguments, **options)
            with before_each_operation(lambda at: os._exit(9) if at == operation else None):
                return save(settings, now, *arguments, **options)

        return mock.patch.object(run, "save_checkpoint", saving)

    def first(operation: int, output: str) -> None:
        with counted(operation):
            main([*argv, f"output={output}"])

    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_0")
    done = []
    for operation in range(0, 10_000, share):
        output = f"{base}/cut_{step}{operation}"
        killed = killed_at(-1, lambda op=operation, to=output: first(op, to))
        left = sorted(path.name for path in Path(output, "checkpoints").glob("step_*"))
        newest = [name for name in left if "." not in name][-1]
        if killed:
            killed_at(-1, lambda to=output: main([*argv, f"output={to}"]))
        buffer.unlink(missing_ok=True)
        done.append((operation, killed, newest))
        if not killed:
            break
    return done


def check_cut_off(folder: Path, step: str, share: int, *finals: str) -> None:
    done = run_ranks(1, cut_off, step, argv_of(folder, step, stage=0), str(folder), share, timeout=3000)[0]
    *cut, (_, killed, _) = done
    assert not killed and len(cut) >= 3 and all(was_killed for _, was_killed, _ in cut)
    before, new = (f"step_{CUT[step] - back:06d}" for back in ({"sft": 2, "ppo": 1}[step], 0))
    found = [newest for _, _, newest in cut]
    assert found == [before] * found.count(before) + [new] * found.count(new) and found.count(before)
    whole = folder / f"cut_{step}{done[-1][0]}"
    for operation, _, _ in cut:
        output = folder / f"cut_{step}{operation}"
        assert finals_equal(output, whole, *finals)
        assert untimed(output / "metrics.jsonl") == untimed(whole / "metrics.jsonl")
        shutil.rmtree(output)
    shutil.rmtree(whole)
    print(f"{step}: killed at {len(cut)} operations of a save, all resumed and ended alike")


def test_a_run_that_is_killed_in_a_save_ends_as_one_that_was_not(folder) -> None:
    check_cut_off(folder, "sft", 23)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "share", "finals"), [
    pytest.param("sft", 1, ["final"], marks=pytest.mark.long),
    ("ppo", 37, ["final", "final_critic", "final_ema"]),
])  # fmt: skip
def test_a_run_that_is_killed_at_any_operation_of_a_save_ends_as_one_that_was_not(folder, step, share, finals) -> None:
    check_cut_off(folder, step, share, *finals)


# -- other settings ----------------------------------------------------------------------------------------


def test_another_run_is_refused_before_a_model_loads_and_leaves_the_folder_as_it_is(folder) -> None:
    output = copied(folder, "refused")
    before = (output / "config.yaml").read_text()
    for change in ("seed=1", "optimizer.learning_rate=0.5", "data.limit=20"):
        argv = [*argv_of(folder, "sft"), f"output={output}", change]
        no_model = mock.patch.object(setup, "load_trained", side_effect=AssertionError("a model was loaded"))
        with tiny.one_rank(), no_model, pytest.raises(UserError) as caught:
            step1_sft.train.main(argv)
        assert "step_000004: was written by a run with other settings" in str(caught.value)
    assert (output / "config.yaml").read_text() == before
