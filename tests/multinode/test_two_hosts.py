"""Runs over two hosts with a hostfile: DeepSpeed's launcher, pdsh, ssh, gloo over a link, as users have them.

Needs root and iproute2, openssh-server and pdsh, which `launch/test.sh --all` installs where it can.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hosts import INTERFACE, Host, two_hosts, why_not
from tests.helpers.tiny import (
    REPO,
    dpo_config,
    ppo_config,
    reward_model_config,
    sft_config,
    write_model,
    write_reward_model,
    write_rows,
)

pytestmark = [pytest.mark.multinode, pytest.mark.skipif(bool(why_not()), reason=why_not() or "two hosts")]
PATIENCE = 400.0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Host, Host]]:
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as (first, second):
        yield folder, first, second


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, str]]:
    """(model, reward model, rows by kind)"""
    folder = tmp_path_factory.mktemp("files")
    model = write_model(folder / "model")
    return model, write_reward_model(folder / "reward", model), write_rows(folder / "rows")


def start(host: Host, log: Path, script: str, config: Path, *words: str, hostfile: Path | None = None) -> Any:
    """A launcher on `host`, with `hostfile` over both, else two ranks there."""
    where = ["--cpu", "2"] if hostfile is None else ["--hostfile", str(hostfile)]
    variables = {"TRISTAGE_CACHE": str(host.folder / "cache"), "DS_ACCELERATOR": "cpu"}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # where mpirun is asked for
    variables["GLOO_SOCKET_IFNAME"] = "lo" if hostfile is None else INTERFACE
    return host.start("bash", str(REPO / script), str(config), *words, *where, log=log, cwd=log.parent, **variables)


def wait_for(what: Any, process: subprocess.Popen[Any], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until and process.poll() is None, log.read_text()
        time.sleep(0.1)


def trained(output: Path) -> int:
    file = output / "metrics.jsonl"
    return sum(json.loads(line)["split"] == "train" for line in file.read_text().splitlines()) if file.is_file() else 0


def write_config(step: str, folder: Path, files: tuple[str, str, dict[str, str]]) -> Path:
    """The YAML of a step at ZeRO 2; its output is given at the launch."""
    model, reward, rows = files
    if step == "step1_sft":
        sft_config(folder, model, rows["sft"], 2)
        return folder / "sft.yaml"
    if step == "step2_reward_model":
        reward_model_config(folder, model, rows["preference"], 2)
        return folder / "reward.yaml"
    if step == "step2_dpo":
        dpo_config(folder, model, rows["preference"], 2)
        return folder / "dpo.yaml"
    ppo_config(folder, model, reward, rows["prompts"], 2)
    return folder / "ppo.yaml"


SLOW = [pytest.param(step, marks=pytest.mark.slow) for step in ("step2_reward_model", "step2_dpo", "step3_ppo")]


@pytest.mark.parametrize("step", ["step1_sft", *SLOW])
def test_two_hosts_train_what_one_does(step, hosts, files, tmp_path):
    folder, first, second = hosts
    config = write_config(step, tmp_path, files)
    for name, hostfile in (("one", None), ("two", folder / "hostfile")):
        log = tmp_path / f"{name}.log"
        run = start(first, log, f"launch/{step}.sh", config, f"output={tmp_path / name}", hostfile=hostfile)
        assert run.wait(timeout=PATIENCE) == 0, log.read_text()
    assert "2 ranks on 2 nodes: node-a, node-b" in (tmp_path / "two.log").read_text()
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert first.processes() == second.processes() == []
    assert (tmp_path / "two/logs/launch.log").read_text().count("node-b") > 0


def test_without_ssh_each_host_is_started_by_hand(hosts, files, tmp_path):
    folder, first, second = hosts
    config, output = write_config("step1_sft", tmp_path, files), tmp_path / "out"
    common = ["max_steps=2", f"output={output}", "--no_ssh", "--master_addr", first.address]
    runs = []
    for number, host in enumerate((first, second)):
        words, log = [*common, "--node_rank", str(number)], tmp_path / f"{host.name}.log"
        runs.append((start(host, log, "launch/step1_sft.sh", config, *words, hostfile=folder / "hostfile"), log))
    for run, log in runs:
        assert run.wait(timeout=PATIENCE) == 0, log.read_text()
    assert "2 ranks on 2 nodes: node-a, node-b" in runs[0][1].read_text()
    assert trained(output) == 2 and (output / "final/config.json").is_file()


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs the package openmpi-bin")
def test_mpirun_starts_the_ranks_and_ends_them_when_one_is_killed(hosts, files, tmp_path):
    folder, first, second = hosts
    config, hostfile = write_config("step1_sft", tmp_path, files), folder / "hostfile"
    words = ["--launcher", "openmpi", f"--launcher_args=--mca oob_tcp_if_include {INTERFACE}", "watchdog_seconds=20"]
    outputs = tmp_path / "whole", tmp_path / "killed"
    logs = tmp_path / "whole.log", tmp_path / "killed.log"
    run = start(first, logs[0], "launch/step1_sft.sh", config, *words, f"output={outputs[0]}", hostfile=hostfile)
    assert run.wait(timeout=PATIENCE) == 0, logs[0].read_text()
    assert "2 ranks on 2 nodes: node-a, node-b" in logs[0].read_text()
    assert (outputs[0] / "final/model.safetensors").is_file()
    words += ["epochs=60", f"output={outputs[1]}"]
    run = start(first, logs[1], "launch/step1_sft.sh", config, *words, hostfile=hostfile)
    wait_for(lambda: trained(outputs[1]) > 2, run, logs[1])
    second.do("pkill", "-KILL", "-f", " -u -m step1_sft.train")
    assert run.wait(timeout=60) not in (0, 2, 75), logs[1].read_text()
    assert first.processes() == second.processes() == []


def test_values_that_shells_would_change_reach_the_other_host_whole(hosts, files, tmp_path):
    folder, first, _ = hosts
    odd = tmp_path / "it's $(touch executed) `touch executed`; \"ü\" %h\\\nx"
    config = write_config("step1_sft", odd, files)
    log = tmp_path / "log"
    words = [f"output={json.dumps(str(odd / 'out'))}", "max_steps=1"]
    run = start(first, log, "launch/step1_sft.sh", config, *words, hostfile=folder / "hostfile")
    assert run.wait(timeout=PATIENCE) == 0, log.read_text()
    assert (odd / "out/final/config.json").is_file()
    assert not list(tmp_path.rglob("executed")) and not (Path.home() / "executed").exists()


def test_a_host_that_ssh_does_not_reach_is_named(hosts, files, tmp_path):
    _, first, _ = hosts
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-c slots=1\n")
    config = write_config("step1_sft", tmp_path, files)
    run = start(first, tmp_path / "log", "launch/step1_sft.sh", config, hostfile=tmp_path / "hostfile")
    assert run.wait(timeout=PATIENCE) == 2
    assert "node node-c does not answer to ssh" in (tmp_path / "log").read_text()


def test_a_model_that_one_host_lacks_is_said_by_that_host(hosts, files, tmp_path):
    folder, first, second = hosts
    config = write_config("step1_sft", tmp_path, files)
    (tmp_path / "model").mkdir()
    first.do("cp", "-r", f"{files[0]}/.", str(tmp_path / "model"))
    second.do("mount", "-t", "tmpfs", "none", str(tmp_path / "model"))
    words = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}"]
    run = start(first, tmp_path / "log", "launch/step1_sft.sh", config, *words, hostfile=folder / "hostfile")
    code = run.wait(timeout=PATIENCE)
    second.do("umount", str(tmp_path / "model"))
    text = (tmp_path / "log").read_text()
    assert code == 2 and "has no config.json" in text and "on node-b" in text, text


def test_a_cut_link_ends_the_run_and_a_restart_finishes_it(hosts, files, tmp_path):
    folder, first, second = hosts
    config, log, output = write_config("step1_sft", tmp_path, files), tmp_path / "log", tmp_path / "out"
    words = [f"output={output}", "epochs=60", "save_every=5", "watchdog_seconds=10", "--max-restarts", "3"]
    run = start(first, log, "launch/step1_sft.sh", config, *words, hostfile=folder / "hostfile")
    wait_for(lambda: trained(output) > 6, run, log)
    second.link("down")
    began = time.monotonic()
    wait_for(lambda: "error: rank " in log.read_text(), run, log)
    assert time.monotonic() - began < 60
    second.link("up")
    assert run.wait(timeout=PATIENCE) == 0, log.read_text()
    assert "restart 1 of at most 3" in log.read_text() and " on node-" in log.read_text()
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert (output / "final/config.json").is_file() and sorted(set(steps)) == list(range(steps[-1] + 1))
    assert first.processes() == second.processes() == []


def test_a_host_that_dies_ends_the_run_on_the_other(files, tmp_path):
    folder = tmp_path / "hosts"
    folder.mkdir()
    with two_hosts(folder) as (first, second):
        config, log, output = write_config("step1_sft", tmp_path, files), tmp_path / "log", tmp_path / "out"
        words = [f"output={output}", "epochs=60", "watchdog_seconds=20"]
        run = start(first, log, "launch/step1_sft.sh", config, *words, hostfile=folder / "hostfile")
        wait_for(lambda: trained(output) > 2, run, log)
        second.kill()
        assert run.wait(timeout=PATIENCE) not in (0, 2, 75), log.read_text()
        assert first.processes() == []
    until = time.monotonic() + 30
    while not ended(first.init):
        assert time.monotonic() < until
        time.sleep(0.1)


def ended(process: psutil.Process) -> bool:
    """Gone, or a zombie that nobody has asked yet how it ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
