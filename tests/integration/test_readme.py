"""Every command of README.md is run: as it stands where it is small, with its sizes cut where it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.published import write_config
from tests.helpers.tiny import REPO
from tristage.cli import main as cli
from tristage.quickstart import prepare

BLOCKS = re.findall(r"```bash\n(?!#!)(.*?)```", (REPO / "README.md").read_text(), flags=re.S)  # not a job's script
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PLANNED = {"actor.model": "opt-6.7b", "reward.model": "opt-350m"}  # the models of the recipe that README.md plans
# Run at length by a test of their own; the test command would run itself.
ELSEWHERE = {
    "bash launch/quickstart.sh": "test_quickstart.py",
    "bash launch/test.sh": "this very run",
}


def test_the_readme_has_its_two_commands():
    assert set(ELSEWHERE) <= set(COMMANDS)


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the quickstart leaves it: its data, and a model in the place of step 1's."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(REPO / "configs")
    prepare.main([str(folder / "output/quickstart"), "--size", "tiny"])
    (folder / "output/quickstart/step1_sft").mkdir()
    (folder / "output/quickstart/step1_sft/final").symlink_to(folder / "output/quickstart/model")
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("tristage data ")])
def test_a_data_command_runs_on_the_quickstart(command, quickstart_folder):
    words = [sys.executable, "-m", "tristage.cli", *command.split()[1:]]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(words, cwd=quickstart_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("<eos>⟧" if "show" in command else "nothing to fix") in done.stdout


def test_the_plan_is_what_the_readme_prints(tmp_path, capsys):
    """With folders that hold the config.json of the models alone."""
    (command,) = [command for command in COMMANDS if command.startswith("tristage plan ")]
    models = {key: write_config(tmp_path / name, f"facebook/{name}") for key, name in PLANNED.items()}
    assert cli.main([*command.split()[1:], *(f"{key}={folder}" for key, folder in models.items())]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"```\n(a GPU's context.*?)\n```", (REPO / "README.md").read_text(), flags=re.S)
    assert printed[-len(shown.splitlines()) :] == shown.splitlines()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("tristage doctor")])
def test_the_doctor_looks_at_what_it_is_given(command, capsys):
    """Whether this machine is well is not for this test to say: its exit code is what it printed."""
    code = cli.main([word if "/" not in word else str(REPO / word) for word in command.split()[1:]])
    told = capsys.readouterr().out
    assert code == ("\nstop" in told) and told.startswith("ok    python") and ("16 ranks" in told) == ("16" in command)


# What the next step of a pipeline starts from.
EXPORT = """for word in "$@"; do
    case "$word" in output=*) mkdir -p "${word#*=}/final" && echo "{}" >"${word#*=}/final/config.json" ;; esac
done"""
LAUNCHED = [command for command in COMMANDS if command not in ELSEWHERE and not command.startswith("tristage ")]


@pytest.mark.parametrize("command", LAUNCHED)
def test_a_command_reaches_its_step_with_its_settings(command, tmp_path):
    """With stand-ins for the launcher and torch's view of GPUs: the command as printed gives a run of that config."""
    seen = tmp_path / "seen"
    for name in ("deepspeed", "sbatch"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{seen}"\n{EXPORT}\necho 1\n')
    (tmp_path / "ssh").write_text("#!/bin/sh\n")
    for name in ("deepspeed", "sbatch", "ssh"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node-a slots=8\nnode-b slots=8\n")
    command = command.replace("my/hostfile", str(tmp_path / "hosts"))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HAS_GPU": "yes"}
    (tmp_path / "clone").mkdir()  # logs go to output/, which is not to be this clone's
    for path in REPO.iterdir():
        if path.name != "output":
            (tmp_path / "clone" / path.name).symlink_to(path)
    for step in ("step1_sft", "step2_reward_model") if "pipeline" not in command else ():  # were run before
        final = tmp_path / "clone/output/opt-1.3b" / step / "final"
        final.mkdir(parents=True)
        (final / "config.json").write_text("{}")
    words = ["bash", "-c", command]
    done = subprocess.run(words, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "--dry-run" in command:
        assert "node node-b: 8 ranks" in done.stdout and not seen.exists()
        return
    words = seen.read_text().splitlines()
    if "slurm" in command:
        files = [word for word in words if word.endswith((".sbatch", ".yaml"))]
        assert len(files) in (2, 6) and all((REPO / file).is_file() for file in files)
        return
    assert "--hostfile" in words or words[words.index("--num_gpus") + 1] == "8"
    for position in [place for place, word in enumerate(words) if word == "--config"]:
        assert (REPO / words[position + 1]).is_file()
    modules = [words[place + 1] for place, word in enumerate(words) if word == "--module"]
    assert modules and all((REPO / (module.replace(".", "/") + ".py")).is_file() for module in modules)
