"""The Slurm jobs, under stand-ins for srun, sbatch and scontrol that run the tasks here, and in a real queue.

The stand-in sbatch runs a job at once, as Slurm would: a copy of its file, in the folder it was submitted from, again
for as long as it was put back into the queue; a job after one that failed does not run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import REPO, ppo_config, reward_model_config, sft_config, write_model, write_rows
from tristage.machine.arrival import free_port
from tristage.training.metrics import read_metrics

SBATCH = r"""#!/usr/bin/env bash
set -eu
id=$(($(cat "$SLURM/last" 2>/dev/null || echo 100) + 1)); echo "$id" >"$SLURM/last"
echo "$*" >>"$SLURM/submitted"
while [[ "$1" == -* ]]; do
    if [[ "$1" == --dependency=afterok:* && ! -e "$SLURM/${1##*:}.ok" ]]; then echo "$id"; exit; fi
    shift
done
cp "$1" "$SLURM/slurm_script"; shift
export SLURM_JOB_ID="$id" SLURM_SUBMIT_DIR="$PWD" SLURM_JOB_NODELIST="localhost"
while true; do
    rm -f "$SLURM/requeued"
    if bash "$SLURM/slurm_script" "$@" >>"$SLURM/$id.log" 2>&1; then touch "$SLURM/$id.ok"; fi
    [[ -e "$SLURM/requeued" ]] || break
done
echo "$id;here"
"""
SRUN = r"""#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE=2 "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
    while true; do
        code=0; wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    ((code > status)) && status=$code
done
exit "$status"
"""
SCONTROL = r"""#!/usr/bin/env bash
if [[ "$1" == requeue ]]; then echo "$2" >>"$SLURM/requeues"; touch "$SLURM/requeued"; else echo "${@: -1}"; fi
"""

# A queue of one node, this machine, for root alone and without authentication.
QUEUE = """ClusterName=tristage
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
DAEMONS = {name: shutil.which(name, path=f"/usr/sbin:{os.environ['PATH']}") for name in ("slurmctld", "slurmd")}
NO_QUEUE = "needs root" if os.geteuid() else "" if all(DAEMONS.values()) else "needs packages slurmctld and slurmd"

Submit = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(slurm: Path) -> dict[str, str]:
    path = f"{slurm}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "SLURM": str(slurm), "DS_ACCELERATOR": "cpu"}


def start(slurm: Path, *words: str) -> subprocess.Popen[Any]:
    return subprocess.Popen(
        words, cwd=REPO, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def text_of(slurm: Path) -> str:
    return "".join(path.read_text() for path in sorted(slurm.glob("*.log")))


def test_a_rank_gets_what_deepspeeds_launcher_would_set(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$RANK $LOCAL_RANK $LOCAL_SIZE $WORLD_SIZE" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    tasks = {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NTASKS": "7", "SLURM_NODEID": "3"}
    tasks["SLURM_STEP_TASKS_PER_NODE"] = "2(x3),1"
    done = subprocess.run(
        ["bash", REPO / "launch/slurm/rank.sh", "step1_sft.train", "a b", "$(x)"],
        env=os.environ | tasks | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "6 0 1 7 -u -m step1_sft.train a b $(x)\n"


def test_every_step_has_a_job_that_comes_back_after_its_time():
    for step in REPO.glob("step[0-9]_*/train.py"):
        text = (REPO / f"launch/slurm/{step.parent.name}.sbatch").read_text()
        directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
        assert {"signal", "requeue", "open-mode"} <= set(directives)
        assert not {"partition", "account", "qos", "constraint"} & set(directives)
        assert text.endswith(f'slurm_step {step.parent.name}.train "$@"\n')


@pytest.mark.slow
def test_a_signal_puts_the_job_back_and_it_goes_on(slurm, tmp_path):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows")
    sft_config(tmp_path, model, rows["sft"])
    job = start(slurm, "sbatch", "launch/slurm/step1_sft.sbatch", str(tmp_path / "sft.yaml"), "epochs=30")
    metrics = tmp_path / "sft/metrics.jsonl"
    until = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < until and job.poll() is None, text_of(slurm)
        time.sleep(0.1)
    batch_shell = subprocess.run(["pgrep", "-f", f"bash {slurm}/slurm_script"], capture_output=True, text=True)
    os.kill(int(batch_shell.stdout.split()[0]), signal.SIGUSR1)
    assert job.wait(timeout=300) == 0, text_of(slurm)
    assert (slurm / "requeues").read_text() == "101\n" and (slurm / "101.ok").exists(), text_of(slurm)
    steps = [row["step"] for row in read_metrics(metrics) if row["split"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)) and (tmp_path / "sft/final/config.json").is_file()


def write_recipe(folder: Path) -> Path:
    """The configs of three steps on tiny data, which start from FOLDER/model."""
    model, rows = write_model(folder / "model"), write_rows(folder / "rows")
    configs = folder / "my configs"
    configs.mkdir()
    for name, path in {
        "step1_sft": sft_config(folder, model, rows["sft"]).file,
        "step2_reward_model": reward_model_config(folder, model, rows["preference"]).file,
        "step3_ppo": ppo_config(folder, model, model, rows["prompts"]).file,
    }.items():
        (configs / f"{name}.yaml").write_text(Path(path).read_text())
    return configs


@pytest.mark.slow
def test_the_pipeline_is_three_jobs_one_after_the_other(slurm, tmp_path):
    configs = write_recipe(tmp_path)
    words = ["bash", "launch/slurm/pipeline.sh", str(configs), str(tmp_path / "out"), "--nodes=1", "save_every=0"]
    job = start(slurm, *words)
    output, _ = job.communicate(timeout=550)
    assert output == "step1_sft: job 101\nstep2_reward_model: job 102\nstep3_ppo: job 103\n", text_of(slurm)
    submitted = (slurm / "submitted").read_text().splitlines()
    assert ["afterok:101" in line for line in submitted] == [False, True, False]
    assert "afterok:102" in submitted[2] and all("--nodes=1" in line for line in submitted)
    for step in ("step1_sft", "step2_reward_model", "step3_ppo"):
        assert (tmp_path / "out" / step / "final/config.json").is_file(), text_of(slurm)
    again, _ = start(slurm, *words).communicate(timeout=60)
    assert again.count("already finished") == 3


def test_a_job_that_fails_holds_the_next_ones(slurm, tmp_path):
    configs = write_recipe(tmp_path)
    (tmp_path / "model/model.safetensors").unlink()  # which the ranks see, and the check before the queue does not
    job = start(slurm, "bash", "launch/slurm/pipeline.sh", str(configs), str(tmp_path / "out"))
    job.communicate(timeout=120)
    assert [path.name for path in slurm.glob("*.log")] == ["101.log"]
    assert f"{tmp_path}/model: " in text_of(slurm)


def test_a_wrong_config_of_a_later_step_is_reported_before_the_first_job(slurm, tmp_path):
    configs = write_recipe(tmp_path)
    with (configs / "step3_ppo.yaml").open("a") as file:
        file.write("iteratons: 3\n")
    job = start(slurm, "bash", "launch/slurm/pipeline.sh", str(configs), str(tmp_path / "out"))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "step3_ppo.yaml: unknown key `iteratons`; did you mean `iterations`?" in output
    assert not (slurm / "submitted").exists()


# -- a real queue ------------------------------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch submits to Slurm's own daemons."""
    folder, host = tmp_path / "queue", platform.node().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    text = QUEUE.format(host=host, folder=folder, ports=[free_port(), free_port()])
    (folder / "slurm.conf").write_text(text)
    variables = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "DS_ACCELERATOR": "cpu"}
    daemons = []
    for name, program in DAEMONS.items():
        with (folder / f"{name}.log").open("w") as log:
            daemons.append(subprocess.Popen([str(program), "-D"], env=variables, stdout=log, stderr=log))
    try:
        wait_for(lambda: " idle " in asked(variables, "sinfo", "--noheader"), 60)
        yield variables
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=variables, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def asked(variables: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=variables, cwd=REPO, capture_output=True, text=True, timeout=60).stdout


def wait_for(true: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, log.read_text() if log and log.is_file() else "it did not happen"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_QUEUE), reason=NO_QUEUE or "a queue")
def test_a_real_queue_takes_a_job_back_after_its_signal_and_finishes_it(queue, tmp_path):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows")
    sft_config(tmp_path, model, rows["sft"])
    log, metrics = tmp_path / "job.log", tmp_path / "sft/metrics.jsonl"
    options = ["--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={log}"]
    job = asked(queue, "sbatch", *options, "launch/slurm/step1_sft.sbatch", f"{tmp_path}/sft.yaml", "epochs=30").strip()
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, 200, log)
    asked(queue, "scancel", "--batch", "--signal=USR1", job)  # as before the end of its time
    wait_for(lambda: "JobState=COMPLETED" in asked(queue, "scontrol", "show", "job", job), 300, log)
    assert " Restarts=1 " in asked(queue, "scontrol", "show", "job", job), log.read_text()
    steps = [row["step"] for row in read_metrics(metrics) if row["split"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)) and (tmp_path / "sft/final/config.json").is_file()
