"""Signals, dead and hanging ranks, restarts: what the ranks do, and what the launcher makes of it.

Two gloo ranks and toy models. What is about the launcher runs under it, one fault after the other on one run, which
must end as the same run without faults, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import step1_sft.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.faults import (
    Launched,
    Ranks,
    assert_same_run,
    rank_pids,
    steps_done,
    trained_pids,
    wait_until,
)
from tests.helpers.interrupted import untimed
from tristage.dist.watchdog import EXIT_PREEMPTED, EXIT_STALLED
from tristage.machine.arrival import free_port
from tristage.rollout import padded

SFT = "launch/step1_sft.sh"
LONG = ["epochs=30", "save_every=25", "evaluate_every=70", "watchdog_seconds=60"]  # 192 steps
RULE = [
    *("critic=null", "ppo.advantage=rloo", "rollout.prompts=8", "rollout.samples=2", "ppo.adaptive_kl_target=0.5"),
    *("ppo.adaptive_kl_horizon=50", "ppo.scale_reward=true", "iterations=3", "save_every=0", "watchdog_seconds=60"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    rows = tiny.write_rows(folder / "rows")
    tiny.write_model(folder / "model", gain=2.0)
    tiny.sft_config(folder / "whole", str(folder / "model"), rows["sft"], 2)
    return folder


def sft(base: Path, folder: Path) -> list[str]:
    config = tiny.sft_config(folder, str(base / "model"), str(base / "rows/sft.jsonl"), 2)
    return ["--config", config.file, *LONG]


def ppo(base: Path, folder: Path, function: str = "faulty") -> list[str]:
    rule = [f"reward={{functions: [{{function: 'tests.helpers.rewards:{function}'}}]}}", "grader=null"]
    config = tiny.ppo_config(folder, str(base / "model"), "none", str(base / "rows/prompts.jsonl"), 0)
    return ["--config", config.file, *rule, *RULE]


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """The output of an SFT run to which nothing happened."""
    ranks = Ranks(2, step1_sft.train.main, sft(base, base / "whole"), base / "whole/log")
    assert ranks.codes() == [0, 0], ranks.log.read_text()
    return base / "whole/sft"


@pytest.fixture(scope="module")
def whole_ppo(base: Path) -> Path:
    (base / "never").touch()
    ranks = Ranks(2, step3_ppo.train.main, ppo(base, base / "ppo"), base / "ppo/log", FAULT=f"none:{base / 'never'}")
    assert ranks.codes() == [0, 0], ranks.log.read_text()
    return base / "ppo/ppo"


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_*"))


# -- signals to a rank -------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_ends_all_after_the_same_step_and_the_run_goes_on_from_there(base, whole, tmp_path):
    argv, output = sft(base, tmp_path), tmp_path / "sft"
    ranks = Ranks(2, step1_sft.train.main, argv, tmp_path / "log")
    wait_until(lambda: steps_done(output) >= 5)
    os.kill(rank_pids(output)[1], signal.SIGUSR1)
    assert ranks.codes() == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    step = steps_done(output)
    assert step < 192 and checkpoints(output)[-1] == f"step_{step:06d}"
    assert f"stopped by a signal after step {step}, its checkpoint written" in (tmp_path / "log").read_text()
    assert Ranks(2, step1_sft.train.main, argv, tmp_path / "log").codes() == [0, 0]
    assert_same_run(output, whole)


@pytest.mark.parametrize("name, step", [("SIGTERM", 1), ("SIGINT", 1)])
def test_a_signal_in_a_rollout_drops_it_and_saves_what_was_before(base, whole_ppo, tmp_path, name, step):
    """The KL coefficient and the reward's scale, which the rollout has moved, are saved as they were before it."""
    argv, output = ppo(base, tmp_path), tmp_path / "ppo"
    for code in (EXIT_PREEMPTED, 0):
        ranks = Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", FAULT=f"{name}:{tmp_path / 'happened'}")
        assert ranks.codes() == [code, code], (tmp_path / "log").read_text()
        if code:
            assert steps_done(output) == step and checkpoints(output) == [f"step_{step:06d}"]
    assert_same_run(output, whole_ppo)


def test_with_nothing_done_since_the_last_checkpoint_nothing_is_written(base, whole_ppo, tmp_path):
    argv, output = [*ppo(base, tmp_path), "save_every=1"], tmp_path / "ppo"
    fault = f"SIGTERM:{tmp_path / 'happened'}"
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", FAULT=fault).codes() == [EXIT_PREEMPTED] * 2
    saved = (output / "checkpoints/step_000001/state.json").stat()
    assert saved.st_mtime_ns < (tmp_path / "happened").stat().st_mtime_ns
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", FAULT=fault).codes() == [0, 0]
    assert_same_run(output, whole_ppo)


# -- ranks that hang or fail -------------------------------------------------------------------------------


def stacks(output: Path) -> list[str]:
    return [path.read_text() for path in sorted((output / "logs").glob("stacks_rank_*.txt"))]


def test_a_reward_function_that_hangs_on_one_rank_is_named_with_the_stacks_of_all(base, tmp_path):
    argv = [*ppo(base, tmp_path), "watchdog_seconds=8"]
    ranks = Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", FAULT=f"hang:{tmp_path / 'happened'}")
    assert ranks.codes() == [EXIT_STALLED, EXIT_STALLED]
    assert re.search(
        r"error: rank 1 on \S+ \(pid \d+, in reward function faulty after step 1\) made no progress for \d+ s and the "
        r"others wait for it \(rank 0: .*waiting for the others, rank 1: reward function faulty\)",
        (tmp_path / "log").read_text(),
    )
    of_rank_0, of_rank_1 = stacks(tmp_path / "ppo")
    assert "in hang" in of_rank_1 and "in hang" not in of_rank_0 and "all_gather" in of_rank_0


def test_a_stopped_rank_is_named_with_the_stacks_of_all(base, tmp_path):
    argv, output = [*sft(base, tmp_path), "epochs=500", "watchdog_seconds=6"], tmp_path / "sft"
    ranks = Ranks(2, step1_sft.train.main, argv, tmp_path / "log")
    wait_until(lambda: steps_done(output) >= 3)
    os.kill(trained_pids(output)[0], signal.SIGSTOP)
    assert ranks.codes() == [EXIT_STALLED, EXIT_STALLED]
    assert re.search(r"error: rank 0 on .* sent no heartbeat for \d+ s", (tmp_path / "log").read_text())
    assert all("step1_sft/train.py" in text for text in stacks(output))


def test_a_reward_function_that_raises_on_one_rank_ends_the_run_with_a_checkpoint_to_resume(base, tmp_path):
    argv = [*ppo(base, tmp_path), "watchdog_seconds=100000"]
    fault = {"FAULT": f"raise:{tmp_path / 'happened'}"}
    ranks = Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", **fault)
    assert ranks.codes()[0] == 2, (tmp_path / "log").read_text()  # and ends the other
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "error" in line.lower()]
    sentence = (
        "error: rank 1: reward function faulty failed on 8 responses (ZeroDivisionError: by a user); the checkpoint of "
        "step 1 is written: start again to resume"
    )
    assert {line.partition(" (rank 1 on ")[0] for line in said} == {sentence}
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log", **fault).codes() == [0, 0]
    assert "resum" in (tmp_path / "log").read_text() and steps_done(tmp_path / "ppo") == 3


def failing_rollout(argv: list[str]) -> None:
    """The padded backend; on rank 1 its third call (iteration 2) raises, after all ranks' weights are gathered."""
    decode, calls = padded.generate_padded, [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == 3:
            raise RuntimeError("out of memory\nwhile decoding")
        return decode(*arguments, **named)

    with mock.patch.object(padded, "generate_padded", failing):
        step3_ppo.train.main(argv)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rollout_that_fails_on_one_rank_ends_the_run_with_a_checkpoint_to_resume(base, tmp_path, stage):
    argv = [*ppo(base, tmp_path, "count_commas"), "rollout.backend=padded", "rollout.rows_at_once=64"]
    if stage == 3:
        argv += [f"{name}.deepspeed={tiny.deepspeed_json(3)}" for name in ("actor", "reference")]
    ranks = Ranks(2, failing_rollout, argv, tmp_path / "log")
    assert ranks.codes()[0] == 2, (tmp_path / "log").read_text()  # and ends the other
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "error" in line.lower()]
    sentence = (
        "error: rollout backend padded failed on rank 1: RuntimeError: out of memory; the checkpoint of step 1 is "
        "written: start again to resume"
    )
    assert {line.partition(" (rank 1 on ")[0] for line in said} == {sentence}
    assert checkpoints(tmp_path / "ppo") == ["step_000001"]
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log").codes() == [0, 0]
    assert "resum" in (tmp_path / "log").read_text() and steps_done(tmp_path / "ppo") == 3


def test_a_constant_reward_is_warned_of_once(base, tmp_path):
    argv = ppo(base, tmp_path, "constant")
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log").codes() == [0, 0]
    assert (tmp_path / "log").read_text().count("constant_score: every response of an iteration") == 1


def test_a_run_whose_phases_are_longer_than_the_interval_is_left_alone(base, whole_ppo, tmp_path):
    """10 s without progress would be too long, and a rank looks every second; a function takes 1.2 s here."""
    argv = [*ppo(base, tmp_path, "slow"), "watchdog_seconds=10"]
    assert Ranks(2, step3_ppo.train.main, argv, tmp_path / "log").codes() == [0, 0]
    assert_same_run(tmp_path / "ppo", whole_ppo)


# -- what a dead or another run left -----------------------------------------------------------------------


def test_a_port_in_use_is_one_sentence(base, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = Ranks(2, step1_sft.train.main, sft(base, tmp_path), tmp_path / "log", port=port)
        assert ranks.codes()[0] == 2
    text = (tmp_path / "log").read_text()
    assert text.count("error: ") == 1 and "Traceback" not in text
    assert f"error: port {port} of " in text and "give another as --master_port" in text


def test_shared_memory_of_a_dead_run_does_no_harm(base, tmp_path):
    port = free_port()
    for rank in range(2):
        left = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}")
        left.write_bytes(b"\xff" * 2**20)
    ranks = Ranks(2, step1_sft.train.main, [*sft(base, tmp_path), "epochs=1"], tmp_path / "log", port=port)
    assert ranks.codes() == [0, 0], (tmp_path / "log").read_text()
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


# -- under the launcher ------------------------------------------------------------------------------------

SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$QUEUE"
"""


def batch_job(folder: Path, words: list[str]) -> Path:
    """The job script of the docs with these words, and a stand-in for Slurm's `scontrol` in `folder`/bin."""
    page = (tiny.REPO / "docs/signals-and-restarts.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/usr/bin/env bash\n#SBATCH.*?)```", page, re.DOTALL)
    command = "launch/step1_sft.sh my/step1_sft.yaml"
    assert command in script
    (folder / "bin").mkdir()
    (folder / "bin/scontrol").write_text(SCONTROL)
    (folder / "bin/scontrol").chmod(0o755)
    (folder / "job.sh").write_text(script.replace(command, " ".join([f"{tiny.REPO}/{SFT}", *words])))
    return folder / "job.sh"


@pytest.mark.slow
def test_a_run_survives_requeue_sigterm_ctrl_c_and_a_killed_rank(base, whole, tmp_path):
    words, output = sft(base, tmp_path)[1:], tmp_path / "sft"
    log = tmp_path / "log"

    # A scheduler warns the batch shell, which asks to be queued again.
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    slurm = {"PATH": path, "QUEUE": str(tmp_path / "queue"), "SLURM_JOB_ID": "17"}
    job = Launched(str(batch_job(tmp_path, words)), [], output, log, **slurm)
    job.reach(3)
    os.kill(job.process.pid, signal.SIGUSR1)
    assert job.code() == EXIT_PREEMPTED and job.left() == [], log.read_text()
    assert (tmp_path / "queue").read_text() == "requeue 17\n"
    assert "sigkill_handler" not in log.read_text()  # DeepSpeed's error line
    assert checkpoints(output)[-1] == f"step_{steps_done(output):06d}"

    run = Launched(SFT, words, output, log)
    run.reach(steps_done(output) + 3)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.code() == EXIT_PREEMPTED and run.left() == [], log.read_text()
    assert checkpoints(output)[-1] == f"step_{steps_done(output):06d}"

    # Ctrl-C in a terminal goes to the whole process group.
    run = Launched(SFT, words, output, log)
    run.reach(steps_done(output) + 3)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.code() == EXIT_PREEMPTED and run.left() == [], log.read_text()
    assert "SIGINT: ending after this step" in log.read_text()

    # A rank dies, the launcher starts again.
    run = Launched(SFT, [*words, "--max-restarts", "1"], output, log)
    run.reach(steps_done(output) + 3)
    os.kill(rank_pids(output)[1], signal.SIGKILL)
    assert run.code() == 0 and run.left() == [], log.read_text()
    assert "exit code 247: restart 1 of at most 1" in log.read_text()
    assert re.search(r"error: rank 1 on \S+ \(pid \d+, in [^)]*\) is gone", log.read_text())
    assert_same_run(output, whole)
    steps = [line["step"] for line in untimed(output / "metrics.jsonl") if line["split"] == "train"]
    assert steps == list(range(1, 193))


def test_a_second_signal_ends_everything_at_once(base, tmp_path):
    output = tmp_path / "sft"
    run = Launched(SFT, [*sft(base, tmp_path)[1:], "epochs=500", "--max-restarts", "3"], output, tmp_path / "log")
    run.reach(2)
    os.kill(rank_pids(output)[1], signal.SIGSTOP)  # it never ends its step
    os.kill(run.process.pid, signal.SIGTERM)
    wait_until(lambda: "SIGTERM: ending after this step" in (tmp_path / "log").read_text())
    os.kill(run.process.pid, signal.SIGINT)
    assert run.code() == 137
    assert run.left() == [] and "restart" not in (tmp_path / "log").read_text()
    assert not (output / "final").exists()


def test_a_stopped_rank_is_not_left_behind(base, tmp_path):
    output = tmp_path / "sft"
    words = [*sft(base, tmp_path)[1:], "epochs=500", "watchdog_seconds=5"]
    run = Launched(SFT, words, output, tmp_path / "log")
    run.reach(2)
    os.kill(trained_pids(output)[1], signal.SIGSTOP)
    assert run.code() == EXIT_STALLED, (tmp_path / "log").read_text()
    assert run.left() == []
