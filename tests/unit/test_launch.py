"""What a launcher works out: nodes, what travels to them, what it would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.tiny import ppo_config, sft_config
from tristage.errors import UserError
from tristage.launch import dry_run, nodes, prepare, remote
from tristage.launch import options as options_of
from tristage.machine import arrival

HOSTS = "# two of us\nnode-a slots=2\n\nnode-b slots=4 # bigger\n"
ODD = ["two words", "it's", '"q"', "a;touch x", "$(touch x)", "`x`", "$HOME", "back\\slash", "line\nbreak", "ü", "%h"]
ODD += [""]


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    (tmp_path / "hosts").write_text(HOSTS)
    return str(tmp_path / "hosts")


# -- nodes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {"node-a": [0, 1], "node-b": [0, 1, 2, 3]}),
        (["--include", "node-b:0,2"], {"node-b": [0, 2]}),
        (["--include=node-b@node-a:1"], {"node-a": [1], "node-b": [0, 1, 2, 3]}),
        (["-e", "node-a"], {"node-b": [0, 1, 2, 3]}),
        (["--exclude=node-b:0,1,2"], {"node-a": [0, 1], "node-b": [3]}),
        (["--num_nodes", "1"], {"node-a": [0, 1]}),
        (["--num_gpus=1"], {"node-a": [0], "node-b": [0]}),
    ],
)
def test_the_nodes_are_those_that_deepspeed_would_take(hostfile, options, expected):
    assert nodes.read_nodes(["--hostfile", hostfile, *options]) == expected


def test_without_a_hostfile_there_are_no_nodes():
    assert nodes.read_nodes(["--num_gpus", "2"]) == {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("node-a slots=2\nnode-b\n", ":2: 'node-b' is not `HOST slots=N`"),
        ("node-a slots=2\nnode-a slots=2\n", ":2: "),
        ("$(touch,x) slots=1\n", ":1: "),
        ("-oProxyCommand=x slots=1\n", ":1: "),
        ("# nothing\n", "no nodes selected"),
    ],
)
def test_a_bad_hostfile_is_one_sentence(tmp_path, text, words):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        nodes.read_nodes(["-H", str(tmp_path / "hosts")])
    assert words in str(caught.value) and str(tmp_path / "hosts") in str(caught.value)


def test_a_missing_hostfile_does_not_mean_this_machine_alone(tmp_path):
    with pytest.raises(UserError, match="no such hostfile"):
        nodes.read_nodes([f"--hostfile={tmp_path}/none"])


@pytest.mark.parametrize("choice", ["node-c", "node-a:7", "node-a:x"])
def test_a_choice_of_what_is_not_there_is_refused(hostfile, choice):
    with pytest.raises(UserError, match=choice):
        nodes.read_nodes(["--hostfile", hostfile, "--include", choice])


def test_every_node_is_asked_and_the_one_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\ncase "$*" in *node-b*) echo "no route" >&2; exit 255;; esac\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nodes.check_reachable(["node-a", "node-c"], "hosts", "2222")
    with pytest.raises(UserError, match=r"hosts: node node-b does not answer to ssh \(no route\).*--exclude"):
        nodes.check_reachable(["node-a", "node-b", "node-c"], "hosts", None)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 5 and all("BatchMode=yes" in line for line in asked)
    assert sum("-p 2222" in line for line in asked) == 2


def test_ranks_meet_at_the_address_of_the_hostfile_where_the_first_node_has_it(tmp_path, monkeypatch):
    """Not at the first one that the node lists, which may be in a network of others."""
    (tmp_path / "ssh").write_text('#!/bin/sh\ncase "$*" in *"hostname -I") echo 203.0.113.1 10.0.0.7 fd00::1; esac\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cases = {"10.0.0.7": "10.0.0.7", "198.51.100.1": None, "only-in-ssh-config": None}
    for node, address in cases.items():
        (tmp_path / "hosts").write_text(f"{node} slots=1\n10.0.0.8 slots=1\n")
        words = ["step1_sft.train", "--config", "a.yaml"]
        start = prepare.prepare(words, ["--hostfile", str(tmp_path / "hosts")], os.environ)
        assert options_of.option(start.arguments, "--master_addr") == address
    start = prepare.prepare(words, ["--hostfile", str(tmp_path / "hosts"), "--master_addr=10.9.9.9"], os.environ)
    assert " ".join(start.arguments).count("--master_addr") == 1


# -- what travels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*ODD, "--config", "seed=1", "a/b-c.yaml", "base64:seed", "betas=[0.9, 0.95]"])
def test_a_word_comes_back_and_no_shell_reads_it_otherwise(word):
    sent = arrival.encode(word)
    assert arrival.decode(sent) == word
    echoed = subprocess.run(["sh", "-c", f"printf %s {sent}"], capture_output=True, text=True, cwd="/")
    assert echoed.stdout == sent and "%h" not in sent


def test_plain_words_stay_readable():
    for word in ("--config", "my/step1.yaml", "optimizer.learning_rate=1e-5", "step1_sft.train"):
        assert arrival.encode(word) == word


def add_export(value: str) -> str:
    """As DeepSpeed's MultiNodeRunner.add_export, with what pdsh does to a percent sign."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    runner.add_export("X", value)
    return runner.exports["X"].replace("%%", "%")


@pytest.mark.parametrize("value", [value for value in ODD if "\n" not in value])
def test_a_variable_survives_deepspeed_and_a_shell(value, tmp_path):
    (line,) = (
        line for line in remote.environment_file({"NCCL_ODD": value}).splitlines() if line.startswith("NCCL_ODD=")
    )
    exported = add_export(line.partition("=")[2] + "\n")
    shell = ["sh", "-c", f'export X={exported}; printf %s "$X"']
    assert subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path).stdout == value
    assert list(tmp_path.iterdir()) == []  # nothing was executed


@pytest.mark.parametrize("value", ["two\nlines", " blank before", "after "])
def test_a_variable_that_cannot_travel_is_named(value):
    with pytest.raises(UserError, match="NCCL_ODD"):
        remote.environment_file({"NCCL_ODD": value})


def test_only_allowlisted_variables_are_forwarded():
    given = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "WARN",
        "https_proxy": "http://proxy:1",
        "HF_HOME": "/hf",
        "TRISTAGE_CACHE": "/cache",
        "TORCH_EXTENSIONS_DIR": "/ops",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    lines = remote.environment_file(given | {"CUDA_VISIBLE_DEVICES": "0", "EDITOR": "x", "RANK": "0"}).splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert names == {*given, "PATH", "PYTHONPATH"}
    assert [line for line in lines if line.startswith("PATH=")][0].endswith(":$PATH")


def test_secrets_stay_unless_the_users_own_file_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    secrets = {"HF_TOKEN": "hf_1", "https_proxy": "http://me:word@proxy:1", "TRISTAGE_API_KEY": "key_3"}
    text = remote.environment_file(secrets)
    assert not any(value in text for value in secrets.values())
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nHF_TOKEN=hf_1\n")
    assert remote.environment_file(secrets).splitlines()[-1] == "HF_TOKEN=hf_1"
    (tmp_path / ".deepspeed_env").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:1: not NAME=VALUE"):
        remote.environment_file({})


def test_words_for_other_nodes_are_encoded(hostfile, monkeypatch):
    monkeypatch.setattr(prepare, "check_reachable", lambda *_: None)
    words = ["step1_sft.train", "--config", "my a.yaml", "seed=1"]
    start = prepare.prepare(words, ["--hostfile", hostfile], os.environ)
    assert start.arguments[:3] == ["--hostfile", hostfile, "--module"]
    assert start.arguments[3] == "step1_sft.train" and list(map(arrival.decode, start.arguments[3:])) == words
    assert start.nodes == ("node-a", "node-b") and start.port is None


def test_mpirun_gets_whole_values_or_none(tmp_path, hostfile, monkeypatch):
    monkeypatch.setattr(prepare, "check_reachable", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    options, words = ["--hostfile", hostfile, "--launcher", "openmpi"], ["step1_sft.train", "--config", "a.yaml"]
    lines = str(prepare.prepare(words, options, {"PATH": "/bin"}).environment).splitlines()
    node = next(iter(nodes.read_nodes(options)))
    assert lines[:3] == [f"MASTER_ADDR={node}", "MASTER_PORT=29500", f"PATH={Path(sys.executable).parent}:/bin"]
    assert f"PYTHONPATH={tmp_path}" in lines
    with pytest.raises(UserError, match="variable NCCL_ODD is 'two words': over mpirun"):
        prepare.prepare(words, options, {"PATH": "/bin", "NCCL_ODD": "two words"})


@pytest.mark.parametrize("words, why", [(["slurm"], "launch/slurm/"), (["openmpi", "--num_nodes", "1"], "--num_nodes")])
def test_a_way_to_other_nodes_that_deepspeed_cannot_go_is_refused(words, why):
    with pytest.raises(UserError, match=why):
        remote.check_launcher(["--launcher", *words])


def test_a_rank_of_mpirun_takes_its_place(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "SIZE": "4", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with mock.patch.dict(os.environ):
        arrival.adopt_rank_of_mpirun()
        assert "RANK" not in os.environ  # a shell that some mpirun started, and no run of several ranks
        os.environ["MASTER_ADDR"] = "node-a"
        arrival.adopt_rank_of_mpirun()
        assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")] == ["3", "1", "4", "2"]


def test_a_working_folder_that_shells_would_change_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    with pytest.raises(UserError, match="working folder is .*my runs"):
        remote.check_paths([])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--master_addr"):
        remote.check_paths(["--master_addr", "$(touch x)"])


def test_on_this_machine_words_stay_as_they_are_and_a_port_is_chosen():
    words = ["step1_sft.train", "--config", "a.yaml", *(f"data.train={value}" for value in ODD)]
    start = prepare.prepare(words, ["--num_gpus", "2"], os.environ)
    command = start.arguments
    assert command[:2] == ["--num_gpus", "2"] and command[command.index("--module") + 1 :] == words
    assert start.port == command[command.index("--master_port") + 1]
    assert start.environment is None and start.nodes == ()


# -- folders -----------------------------------------------------------------------------------------------


def test_the_log_lies_in_the_output_folder(tmp_path):
    (tmp_path / "a.yaml").write_text("output: here\n")
    config = str(tmp_path / "a.yaml")
    assert prepare.output_of([config]) == Path("here")
    assert prepare.output_of([config, "seed=1", "output=a b"]) == Path("a b")
    for words in ([str(tmp_path / "none.yaml")], [config, "output=[1"], [config, "output=1"]):
        assert prepare.output_of(words) is None


def test_a_dry_run_says_what_would_run(tmp_path, hostfile, capsys):
    settings = sft_config(tmp_path, "m", "r", 0, "global_batch=24")
    words = ["step1_sft.train", "--config", str(tmp_path / "sft.yaml"), "global_batch=24"]
    dry_run.show(settings, words, ["--hostfile", hostfile])
    told = capsys.readouterr().out
    assert "node node-b: 4 ranks" in told and "(new run)" in told and "global_batch=24" in told
    assert " ".join(told.splitlines()[4].split()) == "2 x 2 x 6 = 24"
    (tmp_path / "sft/checkpoints/step_000004").mkdir(parents=True)
    dry_run.show(settings, words, ["--num_gpus=2"])
    assert "resumes from step_000004" in capsys.readouterr().out
    with pytest.raises(UserError, match="24 rows don't divide"):
        dry_run.show(settings, words, ["--num_gpus=5"])


def test_the_batches_of_ppo_are_those_of_its_updates(tmp_path):
    settings = ppo_config(tmp_path, "a", "b", "c")
    assert " ".join(settings.plan(2).table().splitlines()[1].split()) == "2 x 2 x 2 = 8"


@pytest.mark.parametrize("options", [["--num_nodes=two"], ["--num_gpus", "-1"]])
def test_a_count_that_is_not_a_number_is_refused(hostfile, options):
    with pytest.raises(UserError, match="is not a number of nodes or ranks"):
        nodes.read_nodes(["--hostfile", hostfile, *options])
