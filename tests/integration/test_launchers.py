"""What the launchers hand to `deepspeed`, seen by stand-ins for `deepspeed` and `ssh` first on PATH.

The stand-in `deepspeed` writes its arguments down, one a line, a blank line after each call.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from step1_sft.config import SFTConfig
from tests.helpers.faults import wait_until
from tests.helpers.tiny import ppo_config, reward_model_config, sft_config
from tristage.config import RunSettings, load_config
from tristage.errors import UserError
from tristage.launch import cpu_op, leftovers, main, pipeline
from tristage.machine.arrival import decode
from tristage.machine.processes import process_id
from tristage.runs.finished import write_finished
from tristage.runs.inputs import model_fingerprints, source_fingerprints

REPO = Path(__file__).parents[2]
LAUNCHERS = {
    "launch/step1_sft.sh": "step1_sft.train",
    "launch/step2_reward_model.sh": "step2_reward_model.train",
    "launch/step2_dpo.sh": "step2_dpo.train",
    "launch/step3_ppo.sh": "step3_ppo.train",
}
SFT = "step1_sft.train"
OPTIONS = "[--hostfile F | --num-gpus N | --cpu N] [--dry-run] [--max-restarts N] [deepspeed launcher options]"

DEEPSPEED = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >>"$CALLS"
echo >>"$CALLS"
echo "$DS_ACCELERATOR $OMP_NUM_THREADS" >>"$CALLS.environment"
exit "${DEEPSPEED_EXIT:-0}"
"""
SSH = """#!/bin/sh
case "$*" in *worker-9*) echo "no route to worker-9" >&2; exit 255 ;; esac
"""

Launch = Callable[..., SimpleNamespace]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """launch(module or "pipeline", *words, gpus=0, check=False, **environment) runs a launcher in this process.

    Configs are checked where `check` says so; calls(tmp_path) has what it called.
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("deepspeed", DEEPSPEED), ("ssh", SSH)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / "hosts").write_text("worker-0 slots=4\nworker-1 slots=4\n")
    monkeypatch.chdir(tmp_path)
    check = main.check_config

    def run(launcher: str, *words: str, gpus: int = 0, real_check: bool = False, **variables: str) -> SimpleNamespace:
        checks = check if real_check else lambda *_, **__: None
        for module in (main, pipeline):
            monkeypatch.setattr(module, "check_config", checks)
        monkeypatch.setattr(cpu_op, "num_gpus", lambda: 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else gpus)
        monkeypatch.setattr(cpu_op, "build_cpu_op", lambda: None)
        variables = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")} | variables
        with mock.patch.dict(os.environ, variables):
            for name in {"DS_ACCELERATOR", "OMP_NUM_THREADS"} - set(variables):
                os.environ.pop(name, None)
            code = pipeline.main([*words]) if launcher == "pipeline" else main.main([launcher, *words])
        return SimpleNamespace(returncode=code, stdout=(told := capfd.readouterr()).out, stderr=told.err)

    yield run


def calls(folder: Path) -> list[list[str]]:
    """The arguments of every call of the stand-in deepspeed."""
    file = folder / "calls"
    return [call.split("\n") for call in file.read_text().removesuffix("\n\n").split("\n\n")] if file.exists() else []


def split_call(folder: Path) -> tuple[list[str], list[str]]:
    """(launcher options, the step's words) of the one call: what stands before and after --module."""
    (call,) = calls(folder)
    place = call.index("--module")
    return call[:place], call[place:]


# -- one step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", LAUNCHERS.values())
def test_a_launcher_starts_its_step_with_the_config_and_the_settings(launch, tmp_path, module):
    assert launch(module, "a.yaml", "seed=1", "optimizer.learning_rate=1e-5").returncode == 0
    _, words = split_call(tmp_path)
    assert words == ["--module", module, "--config", "a.yaml", "seed=1", "optimizer.learning_rate=1e-5"]


def test_without_a_gpu_two_ranks_run_on_the_cpu(launch, tmp_path):
    launch(SFT, "a.yaml")
    options, words = split_call(tmp_path)
    assert options[options.index("--num_gpus") + 1] == "2"
    assert options[options.index("--master_port") + 1].isdigit()
    assert "--no_local_rank" in options
    assert words == ["--module", "step1_sft.train", "--config", "a.yaml"]
    assert (tmp_path / "calls.environment").read_text() == "cpu 1\n"


def test_with_gpus_deepspeed_takes_all_of_them(launch, tmp_path):
    launch(SFT, "a.yaml", gpus=8)
    options, _ = split_call(tmp_path)
    assert "--num_gpus" not in options
    assert (tmp_path / "calls.environment").read_text() == " \n"  # nothing forced


def test_the_cpu_can_be_forced_and_the_threads_of_a_rank_set(launch, tmp_path):
    launch(SFT, "a.yaml", gpus=8, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="3")
    options, _ = split_call(tmp_path)
    assert options[options.index("--num_gpus") + 1] == "2"
    assert (tmp_path / "calls.environment").read_text() == "cpu 3\n"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num_gpus", "1"], ["--num_gpus", "1"]),
        (["--num_gpus=1"], ["--num_gpus=1"]),
        (["--num-gpus", "1"], ["--num_gpus", "1"]),
        (["--num-gpus=1"], ["--num_gpus=1"]),
        (["--cpu", "3"], ["--num_gpus", "3"]),
        (["--cpu=3"], ["--num_gpus=3"]),
        (["--include=localhost:0,1"], ["--include=localhost:0,1"]),
        (["--include", "worker-0@worker-1:0,2"], ["--include", "worker-0@worker-1:0,2"]),
        (["--exclude", "worker-1"], ["--exclude", "worker-1"]),
        (["--hostfile", "hosts"], ["--hostfile", "hosts"]),
        (["--hostfile", "hosts", "--force_multi"], ["--hostfile", "hosts", "--force_multi"]),
        (["-H", "hosts"], ["-H", "hosts"]),
        (["-i", "localhost:1", "--force_multi"], ["-i", "localhost:1", "--force_multi"]),
    ],
)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_launcher_options_go_before_the_module_wherever_they_stand(launch, tmp_path, words, expected, place):
    cut = {"before": 0, "between": 1, "after": 2}[place]
    settings = ["seed=1", "epochs=2"]
    launch(SFT, "a.yaml", *settings[:cut], *words, *settings[cut:])
    options, step_words = split_call(tmp_path)
    assert step_words == ["--module", "step1_sft.train", "--config", "a.yaml", *settings]
    start = options.index(expected[0])
    assert options[start : start + len(expected)] == expected
    num_gpus = [option for option in options if option.startswith("--num_gpus")]
    assert num_gpus == [option for option in expected if option.startswith("--num_gpus")]  # none that nobody asked for


def test_a_stray_word_goes_to_the_step_which_refuses_it(launch, tmp_path):
    launch(SFT, "a.yaml", "--num_gpus=1", "stray", "--force_multi", "seed=1", "other")
    assert split_call(tmp_path)[1][-3:] == ["stray", "seed=1", "other"]


@pytest.mark.parametrize("text", ["--master_port 1234", "--master_port=1234", "--hostfile hosts", "-H hosts"])
def test_a_port_is_chosen_only_when_none_is_given_and_all_ranks_are_here(launch, tmp_path, text):
    words = text.split()
    launch(SFT, "a.yaml", *words)
    options, _ = split_call(tmp_path)
    ports = [word for word in options if word.startswith("--master_port")]
    assert ports == [word for word in words if word.startswith("--master_port")]


@pytest.mark.parametrize(
    "value",
    [
        "two words",
        "  spaces   around  ",
        "it's",
        'a "quoted" word',
        "$(touch executed)",
        "`touch executed`",
        "$HOME",
        "a;touch executed",
        "*",
        "back\\slash",
        "a=b --num_gpus 7",
        "",
    ],
)
def test_values_arrive_whole_and_unexecuted(launch, tmp_path, value):
    launch(SFT, "a.yaml", f"data.train={value}", "seed=1")
    _, words = split_call(tmp_path)
    assert words[-2:] == [f"data.train={value}", "seed=1"]
    assert not (tmp_path / "executed").exists()


def test_arguments_reach_other_nodes_unchanged_by_the_shell(launch, tmp_path):
    settings = ["seed=1", "output=$(touch executed)"]
    assert launch(SFT, "my configs/a b.yaml", "--hostfile", "hosts", *settings).returncode == 0
    _, words = split_call(tmp_path)
    assert words[1] == "step1_sft.train" and words[4] == "seed=1"
    assert list(map(decode, words[3:])) == ["my configs/a b.yaml", *settings]
    assert all(re.fullmatch(r"[\w:=.-]+", word) for word in words)


def test_other_nodes_get_the_variables_of_this_one(launch, tmp_path):
    (tmp_path / "bin/deepspeed").write_text(
        '#!/bin/sh\ncat "$DS_ENV_FILE" >env; echo "$DS_ENV_FILE" >where\n'
        'echo "$PDSH_SSH_ARGS_APPEND $MLFLOW_TOKEN" >ssh\n'
    )
    secrets = {"HF_TOKEN": "hf_1", "MLFLOW_TOKEN": "ml_1"}
    launch(SFT, "a.yaml", "--hostfile", "hosts", GLOO_SOCKET_IFNAME="eth7", TMPDIR=str(tmp_path), **secrets)
    lines = (tmp_path / "env").read_text().splitlines()
    assert {"GLOO_SOCKET_IFNAME=eth7", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"} <= set(lines)
    assert f"PYTHONPATH={tmp_path}:{REPO}" in "\n".join(lines)
    assert "ServerAliveInterval" in (tmp_path / "ssh").read_text()
    assert not any(secret in (tmp_path / name).read_text() for secret in secrets.values() for name in ("env", "ssh"))
    assert not Path((tmp_path / "where").read_text().strip()).exists()  # removed


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--hostfile", "nowhere"], "nowhere: no such hostfile"),
        (["--hostfile", "bad"], "bad:1: 'worker-0' is not `HOST slots=N`"),
        (["--hostfile", "lost"], "lost: node worker-9 does not answer to ssh (no route to worker-9)"),
        (["--hostfile", "hosts", "--include", "worker-7"], "worker-7: hosts has no such node"),
    ],
)
def test_a_wrong_host_is_one_sentence_and_nothing_starts(launch, tmp_path, words, sentence):
    (tmp_path / "bad").write_text("worker-0\n")
    (tmp_path / "lost").write_text("worker-0 slots=1\nworker-9 slots=1\n")
    ended = launch(SFT, "a.yaml", *words)
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert ended.stderr.startswith(f"error: {sentence}") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["sft.yaml", "sede=1"], "sft.yaml: unknown key `sede`; did you mean `seed`?"),
        (["sft.yaml"], "sft.yaml: key `model`: there is no folder ./m;"),
        (["sft.yaml", "model=a/b", "--cpu", "3"], "sft.yaml: global_batch, micro_batch: 8 rows don't divide"),
        (["sft.yaml", "model=a/b", "deepspeed=none.json"], "sft.yaml: key `deepspeed`: no file none.json"),
        (["sft.yaml", "model=a/b", "data.train=no/rows.jsonl"], "no/rows.jsonl: there is no such file or folder"),
        (["sft.yaml", "stray"], "argument 'stray' is not understood"),
    ],
)
def test_a_wrong_config_is_one_sentence_and_nothing_starts(launch, tmp_path, words, sentence):
    sft_config(tmp_path, "./m", "r")
    (tmp_path / "r").touch()
    ended = launch(SFT, *words, real_check=True)
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert ended.stderr.startswith("error: ") and sentence in ended.stderr and ended.stderr.count("\n") == 1


def test_models_and_data_need_not_be_on_the_node_that_launches_others(launch, tmp_path):
    sft_config(tmp_path, "./m", "r")
    assert launch(SFT, "sft.yaml", "global_batch=16", "--hostfile", "hosts", real_check=True).returncode == 0


def test_a_dry_run_makes_the_checks_of_a_start(launch, tmp_path):
    sft_config(tmp_path, "./m", "r")
    ended = launch(SFT, "sft.yaml", "--dry-run", real_check=True)
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert ended.stderr.startswith("error: sft.yaml: key `model`: there is no folder ./m;")


def test_the_pipeline_looks_at_all_configs_before_its_first_step(launch, tmp_path):
    sft_config(tmp_path, "a/b", "r")
    reward_model_config(tmp_path, "a/b", "r")
    ppo_config(tmp_path, "a/b", "a/b", "r")
    (tmp_path / "r").touch()
    (tmp_path / "recipe").mkdir()
    for name, step in {"sft": "step1_sft", "reward": "step2_reward_model", "ppo": "step3_ppo"}.items():
        (tmp_path / f"{name}.yaml").rename(tmp_path / f"recipe/{step}.yaml")
    with (tmp_path / "recipe/step3_ppo.yaml").open("a") as file:
        file.write("iteratons: 3\n")
    ended = launch("pipeline", "recipe", "out", real_check=True)
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert ended.stderr.startswith("error: recipe/step3_ppo.yaml: unknown key `iteratons`; did you mean `iterations`?")


def test_a_wrong_port_is_one_sentence_and_nothing_starts(launch, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for words, why in ([f"--master_port={port}"], "this machine cannot be used"), (["--master_port", "x"], ": not"):
            ended = launch(SFT, "a.yaml", *words)
            assert (ended.returncode, calls(tmp_path)) == (2, [])
            assert ended.stderr.startswith("error: --master_port") and why in ended.stderr
            assert ended.stderr.count("\n") == 1


TAKEN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$CALLS"
echo >>"$CALLS"
[[ -e "$PYTHON_TRISTAGE_RUN/port_picked" ]] || exit 2
[[ ! -e taken ]] || exit 0
touch taken
mv "$PYTHON_TRISTAGE_RUN/port_picked" "$PYTHON_TRISTAGE_RUN/port_taken"
exit 2
"""


def test_a_port_that_was_taken_before_the_ranks_met_is_picked_again_but_not_the_users(launch, tmp_path):
    (tmp_path / "bin/deepspeed").write_text(TAKEN)
    assert launch(SFT, "a.yaml").returncode == 0
    ports = [call[call.index("--master_port") + 1] for call in calls(tmp_path)]
    assert len(set(ports)) == 2
    assert launch(SFT, "a.yaml", "--master_port", ports[0]).returncode == 2
    assert len(calls(tmp_path)) == 3


def test_a_dry_run_starts_nothing(launch, tmp_path):
    sft_config(tmp_path, "a/b", "r")
    (tmp_path / "r").touch()
    ended = launch(SFT, "sft.yaml", "--dry-run", "--cpu", "4", "seed=1", real_check=True)
    assert (ended.returncode, ended.stderr, calls(tmp_path)) == (0, "", [])
    assert "--num_gpus 4" in ended.stdout and " ".join(ended.stdout.split("\n")[2].split()) == "2 x 1 x 4 = 8"
    assert not (tmp_path / "sft").exists()


def test_ranks_on_the_cpu_of_a_machine_with_gpus(launch, tmp_path):
    launch(SFT, "a.yaml", "--cpu", "3", gpus=8)
    options, _ = split_call(tmp_path)
    assert options[options.index("--num_gpus") + 1] == "3"
    assert (tmp_path / "calls.environment").read_text() == "cpu 1\n"


def test_what_ranks_say_goes_to_the_terminal_and_to_the_log(launch, tmp_path):
    (tmp_path / "bin/deepspeed").write_text("#!/bin/sh\necho said\necho wrong >&2\nexit 9\n")
    (tmp_path / "a.yaml").write_text("output: my runs/out\n")
    for _ in range(2):
        ended = launch(SFT, "a.yaml", "seed=a b", gpus=8)
        assert (ended.returncode, ended.stdout, ended.stderr) == (9, "said\n", "wrong\n")
    lines = (tmp_path / "my runs/out/logs/launch.log").read_text().splitlines()
    assert sorted(line.partition(" ")[0][:2] for line in lines) == ["20", "20", "sa", "sa", "wr", "wr"]
    assert "'seed=a b'" in lines[0]


@pytest.mark.parametrize("code, shown", [(75, False), (2, False), (-9, True), (1, True), (175, True)])
def test_deepspeed_reports_an_exit_code_only_where_the_ranks_have_not_explained_it(launch, tmp_path, code, shown):
    line = f"[2026-11-24 10:00:00,123] [ERROR] [launch.py:290:sigkill_handler] ['x'] exits with return code = {code}"
    script = f'#!/bin/sh\nprintf "caf\\351\\n"\ncat <<E\n{line}\nE\nprintf end\nexit 3\n'
    (tmp_path / "bin/deepspeed").write_text(script)
    (tmp_path / "a.yaml").write_text("output: out\n")
    ended = launch(SFT, "a.yaml")
    assert ended.returncode == 3
    assert ended.stdout == "caf\N{REPLACEMENT CHARACTER}\n" + f"{line}\n" * shown + "end"
    assert ("sigkill_handler" in (tmp_path / "out/logs/launch.log").read_text(errors="replace")) == shown


def test_the_config_path_may_hold_spaces(launch, tmp_path):
    launch(SFT, "my configs/a b.yaml")
    assert split_call(tmp_path)[1][-2:] == ["--config", "my configs/a b.yaml"]


@pytest.mark.parametrize("script, module", LAUNCHERS.items())
@pytest.mark.parametrize("words", [[], ["--num_gpus", "1"]])
def test_without_a_config_a_launcher_says_its_usage_and_starts_nothing(launch, tmp_path, script, module, words):
    ended = launch(module, *words)
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert ended.stderr == f"usage: bash {script} CONFIG [key=value ...] {OPTIONS}\n"


@pytest.mark.parametrize("script, module", LAUNCHERS.items())
def test_a_shell_launcher_calls_its_module_with_the_words_as_they_are(tmp_path, script, module):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "/theirs"}
    command = ["bash", str(REPO / script), "a b.yaml", "seed=$HOME"]
    told = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True).stdout
    assert told.splitlines() == [f"{REPO}:/theirs", "-m", "tristage.launch", module, "a b.yaml", "seed=$HOME"]


def test_the_exit_code_is_that_of_deepspeed(launch):
    assert launch(SFT, "a.yaml", DEEPSPEED_EXIT="2").returncode == 2


@pytest.mark.parametrize("words", [["--max-restarts", "2"], ["--max-restarts=2"]])
@pytest.mark.parametrize("code, starts", [(1, 3), (70, 3), (247, 3), (0, 1), (2, 1), (75, 1)])
def test_restarts_follow_failures_that_another_start_may_fix(launch, tmp_path, words, code, starts):
    ended = launch(SFT, "a.yaml", *words, "seed=1", DEEPSPEED_EXIT=str(code))
    assert ended.returncode == code
    assert len(calls(tmp_path)) == starts
    told = [f"exit code {code}: restart {i} of at most 2" for i in range(1, starts)]
    assert ended.stderr.splitlines() == told
    assert not any("restarts" in word for call in calls(tmp_path) for word in call)
    assert all(call[-1] == "seed=1" for call in calls(tmp_path))


@pytest.mark.parametrize("words", [["--max-restarts"], ["--max-restarts", "seed=1"], ["--max-restarts=often"]])
def test_restarts_need_a_number(launch, tmp_path, words):
    ended = launch(SFT, "a.yaml", *words)
    assert (ended.returncode, ended.stderr) == (2, "error: --max-restarts needs a number\n")
    assert calls(tmp_path) == []


# -- what killed runs left -----------------------------------------------------------------------------------

HANGS = """#!/usr/bin/env bash
port="$(cat "$PYTHON_TRISTAGE_RUN/port")"
touch "/dev/shm/deepspeed_allreduce_buffer_$(id -u)_127.0.0.1_${port}_0"
# In braces: bash reads all of it before the test writes another script here.
{ echo "$$" >rank.new; mv rank.new rank; exec sleep 600; }
"""


def test_a_start_removes_what_a_killed_run_left_but_not_while_a_rank_lives(launch, tmp_path):
    (tmp_path / "bin/deepspeed").write_text(HANGS)
    (tmp_path / "temporary").mkdir()
    variables = {"TMPDIR": str(tmp_path / "temporary"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    start = "from tristage.launch.supervise import Supervisor; Supervisor().run(['m.train', '--config', 'a.yaml'], [])"
    launcher = subprocess.Popen([sys.executable, "-c", start], env=os.environ | variables, cwd=tmp_path)
    wait_until(lambda: (tmp_path / "rank").exists() or launcher.poll() is not None)
    (folder,) = (tmp_path / "temporary").iterdir()
    (buffer,) = Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{(folder / 'port').read_text()}_0")
    launcher.kill()
    launcher.wait()
    leftovers.remove(tmp_path / "temporary")
    assert folder.exists() and buffer.exists()
    rank = int((tmp_path / "rank").read_text())
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: process_id(rank) is None)
    (tmp_path / "bin/deepspeed").write_text(DEEPSPEED)
    assert subprocess.run([sys.executable, "-c", start], env=os.environ | variables | {"CALLS": "c"}, cwd=tmp_path)
    assert not folder.exists() and not buffer.exists()


# -- the CPU op --------------------------------------------------------------------------------------------


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled ops; a build is done at once, without an op."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(cpu_op, "BUILD", "")
    (tmp_path / "extensions/torch/op").mkdir(parents=True)
    return tmp_path / "extensions"


def test_a_killed_first_build_leaves_no_lock(extensions):
    lock = extensions / "torch/op/lock"
    lock.touch()
    cpu_op.build_cpu_op()
    assert not lock.exists()


def test_only_an_old_lock_of_a_finished_op_is_removed(extensions):
    folder = extensions / "torch/op"
    (folder / "deepspeed_shm_comm.so").touch()
    for age in (60, 600):
        (folder / "lock").touch()
        then = time.time() - age
        os.utime(folder / "lock", (then, then))
        cpu_op.build_cpu_op()
        assert (folder / "lock").exists() == (age == 60)


def test_a_folder_for_the_op_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file/extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", folder)
    with pytest.raises(UserError, match=f"^{folder} cannot be written; set TORCH_EXTENSIONS_DIR to a writable folder$"):
        cpu_op.build_cpu_op()


def test_an_op_that_does_not_compile_names_the_compiler(extensions, monkeypatch, capfd):
    monkeypatch.setattr(cpu_op, "BUILD", "raise SystemExit('no g++')")
    with pytest.raises(UserError, match="install a C\\+\\+ compiler"):
        cpu_op.build_cpu_op()
    assert "no g++" in capfd.readouterr().err


def test_torch_is_asked_for_gpus_only_where_a_machine_may_have_one(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        return SimpleNamespace(stdout="4\n")

    monkeypatch.setattr(cpu_op.subprocess, "run", run)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for may_have, expected in ((False, 0), (True, 4)):
        monkeypatch.setattr(cpu_op, "may_have_gpu", lambda may_have=may_have: may_have)
        assert cpu_op.num_gpus() == expected
    assert asked == ["tristage.dist.gpu"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cpu_op.num_gpus() == 0


# -- the pipeline ------------------------------------------------------------------------------------------


def write_recipe(folder: Path, recipe: str = "recipe") -> dict[str, RunSettings]:
    """The configs of a recipe, and their settings, by step."""
    write = {"step1_sft": sft_config, "step2_reward_model": reward_model_config}
    settings: dict[str, RunSettings] = {name: make(folder / name, "m/m", "r/r") for name, make in write.items()}
    settings["step3_ppo"] = ppo_config(folder / "step3_ppo", "m/m", "m/m", "r/r")
    (folder / recipe).mkdir(exist_ok=True)
    for name, values in settings.items():
        (folder / recipe / f"{name}.yaml").write_text(Path(values.file).read_text())
    return settings


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def finish(folder: Path, step: str, *overrides: str) -> None:
    """As a run of the pipeline leaves out/STEP, with a folder that stands for its model."""
    settings = write_recipe(folder)[step]
    words = [f"output=out/{step}", *overrides]
    if step == "step3_ppo":
        words += ["actor.model=out/step1_sft/final", "reward.model=out/step2_reward_model/final"]
    settings = load_config(type(settings), ["--config", f"{folder}/recipe/{step}.yaml", *words])
    final = folder / settings.output / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    with inside(folder):
        inputs = {"models": model_fingerprints(settings), "sources": source_fingerprints(settings)}
        write_finished(settings, inputs, [final])


def test_the_pipeline_hands_each_step_the_folders_of_those_before(launch, tmp_path):
    assert launch("pipeline", "recipe", "out", "seed=5", "--num_gpus", "4").returncode == 0
    step1, step2, step3 = calls(tmp_path)
    modules = [call[call.index("--module") + 1] for call in (step1, step2, step3)]
    configs = [call[call.index("--config") + 1] for call in (step1, step2, step3)]
    assert modules == ["step1_sft.train", "step2_reward_model.train", "step3_ppo.train"]
    assert configs == [f"recipe/{module.removesuffix('.train')}.yaml" for module in modules]
    assert {"output=out/step1_sft", "seed=5"} <= set(step1)
    assert {"output=out/step2_reward_model", "seed=5"} <= set(step2)
    assert {"output=out/step3_ppo", "seed=5"} <= set(step3)
    assert {"actor.model=out/step1_sft/final", "reward.model=out/step2_reward_model/final"} <= set(step3)
    assert all(call[call.index("--num_gpus") + 1] == "4" for call in (step1, step2, step3))


@pytest.mark.parametrize(
    "finished, left",
    [
        (["step1_sft"], ["step2_reward_model.train", "step3_ppo.train"]),
        (["step1_sft", "step2_reward_model"], ["step3_ppo.train"]),
        (["step1_sft", "step2_reward_model", "step3_ppo"], []),
    ],
)
def test_the_pipeline_skips_a_finished_step_and_says_so(launch, tmp_path, finished, left):
    write_recipe(tmp_path)
    for step in finished:
        finish(tmp_path, step)
    ended = launch("pipeline", "recipe", "out")
    assert [call[call.index("--module") + 1] for call in calls(tmp_path)] == left
    assert [line for line in ended.stdout.splitlines() if "already finished" in line] == [
        f"step {number}: already finished (out/{step}/final)" for number, step in enumerate(finished, start=1)
    ]


def test_the_pipeline_runs_a_step_that_was_killed_while_it_exported(launch, tmp_path):
    """Of step 3 it has final/, and no final_critic/ yet."""
    for step in ("step1_sft", "step2_reward_model", "step3_ppo"):
        finish(tmp_path, step)
    (tmp_path / "out/step3_ppo/finished.json").unlink()
    launch("pipeline", "recipe", "out")
    assert [call[call.index("--module") + 1] for call in calls(tmp_path)] == ["step3_ppo.train"]


def test_the_pipeline_does_not_take_another_run_for_this_one(launch, tmp_path):
    finish(tmp_path, "step1_sft")
    finish(tmp_path, "step2_reward_model", "seed=3")
    ended = launch("pipeline", "recipe", "out")
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    told = "error: out/step2_reward_model: has finished as another run: seed: 3 -> 0; put that back, train again with "
    assert ended.stderr.startswith(told) and ended.stderr.count("\n") == 1
    assert launch("pipeline", "recipe", "out", "resume=never", "--num_gpus", "2").returncode == 0
    assert len(calls(tmp_path)) == 3  # all train again


def test_the_pipeline_sees_that_a_step_was_trained_again_under_a_later_one(launch, tmp_path):
    for step in ("step1_sft", "step2_reward_model", "step3_ppo"):
        finish(tmp_path, step)
    (tmp_path / "out/step1_sft/final/config.json").write_text('{"other": 1}')
    settings = load_config(SFTConfig, ["--config", f"{tmp_path}/recipe/step1_sft.yaml", "output=out/step1_sft"])
    with inside(tmp_path):
        write_finished(settings, {"models": {}, "sources": {}}, [Path("out/step1_sft/final")])
    ended = launch("pipeline", "recipe", "out")
    assert (ended.returncode, calls(tmp_path)) == (2, [])
    assert "run: actor.model (out/step1_sft/final): its content is not the same; put that back" in ended.stderr


def test_the_pipeline_stops_at_a_step_that_fails(launch, tmp_path):
    assert launch("pipeline", "recipe", "out", DEEPSPEED_EXIT="2").returncode == 2
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("words", [[], ["recipe"]])
def test_the_pipeline_without_its_folders_says_its_usage(launch, tmp_path, words):
    ended = launch("pipeline", *words)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: bash ") and "CONFIG_DIR OUT" in ended.stderr
    assert calls(tmp_path) == []
