"""Every command of README.md and docs is run: as it is where it is small, with its sizes cut where it is not."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.published import write_config
from tests.helpers.runs import write_ppo
from tests.helpers.tiny import REPO
from tristage.cli.main import main as tristage_command
from tristage.config import load_config, settings_class
from tristage.quickstart import prepare

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```bash\n(?!#!)(.*?)```", TEXT, flags=re.S)  # not a job's script, which test_faults.py runs
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
RECIPES = re.findall(r"```yaml\n(# my/step1_sft.yaml\n.*?)```", TEXT, flags=re.S)
COMMANDS = list(dict.fromkeys(line for line in LINES if line))
PLANNED = {"actor.model": "opt-6.7b", "reward.model": "opt-350m"}  # the models of the recipe that docs/memory.md plans
RECIPE = "cp -r configs/opt-1.3b configs/mine"  # makes the folder that later commands of README.md name
# Run at length by a test of their own; the test command would run itself.
ELSEWHERE = {
    "bash launch/quickstart.sh": "test_quickstart.py",
    "bash launch/test.sh": "this very run",
    'bash launch/test.sh -k "not integration"': "a part of this very run",
    "source .venv/bin/activate": "what launch/quickstart.sh made",
    RECIPE: "the fixture `clone`",
    "pip install 'tristage[web]'": "launch/test.sh, which installs its packages",
}


def commands_of(*starts: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(starts) and command not in ELSEWHERE]


DATA, PLANS, DOCTORS = commands_of("tristage data "), commands_of("tristage plan "), commands_of("tristage doctor")
SETTINGS = commands_of("tristage config ", "tristage settings ")
EVALUATIONS = commands_of("python -m step")
LAUNCHED = commands_of("bash launch/", "sbatch ", "deepspeed ")
# unit/test_benchmarks.py runs each at its smallest, but for the environment of a peer.
BENCHMARKS = commands_of("python -m benchmarks.", "python -m venv trl-ppo", "trl-ppo/bin/pip ")
# unit/test_results.py calls each, without its runs.
RESULTS = commands_of("python -m results.", "bash results/install.sh")

REPORTS, TALKS = commands_of("tristage report "), commands_of("tristage chat ", "tristage compare ")


def test_every_command_has_a_test():
    tested = [*REPORTS, *TALKS, *DATA, *PLANS, *DOCTORS, *SETTINGS, *EVALUATIONS, *LAUNCHED, *BENCHMARKS, *RESULTS]
    tested += ELSEWHERE
    assert sorted(tested) == sorted(COMMANDS)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This repository with an output folder of its own, and the recipe that README.md copies."""
    (tmp_path / "clone").mkdir()
    for path in REPO.iterdir():
        if path.name not in ("output", "configs"):
            (tmp_path / "clone" / path.name).symlink_to(path)
    shutil.copytree(REPO / "configs", tmp_path / "clone/configs")
    subprocess.run(shlex.split(RECIPE), cwd=tmp_path / "clone", check=True)
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the quickstart leaves it: its data, and a model in the place of step 1's."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(REPO / "configs")
    prepare.main([str(folder / "output/quickstart"), "--size", "tiny"])
    (folder / "output/quickstart/step1_sft").mkdir()
    (folder / "output/quickstart/step1_sft/final").symlink_to(folder / "output/quickstart/model")
    return folder


@pytest.mark.parametrize("command", DATA)
def test_a_data_command_runs_on_the_quickstart(command, quickstart_folder, monkeypatch, capsys):
    """A recipe of the user's own is given the quickstart's model and rows."""
    words = command.replace("configs/mine", "configs/opt-1.3b").split()[1:]
    if "configs/mine" in command:
        rows, model = "output/quickstart/data/sft", "output/quickstart/model"
        words += [f"model={model}", f"data.train={rows}.train.jsonl", f"data.heldout={rows}.heldout.jsonl"]
    monkeypatch.chdir(quickstart_folder)
    code, printed = tristage_command(words), capsys.readouterr().out
    assert code == 0, printed
    assert ("<eos>⟧" if "show" in command else "nothing to fix") in printed


def test_the_plan_is_what_the_docs_print(tmp_path, capsys):
    """With folders that hold the config.json of the models alone."""
    (command,) = PLANS
    models = {key: write_config(tmp_path / name, f"facebook/{name}") for key, name in PLANNED.items()}
    assert tristage_command([*command.split()[1:], *(f"{key}={folder}" for key, folder in models.items())]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"```\n(a GPU's context.*?)\n```", TEXT, flags=re.S)
    assert printed[-len(shown.splitlines()) :] == shown.splitlines()


@pytest.mark.parametrize("command", DOCTORS)
def test_the_doctor_checks_what_it_is_given(command, capsys):
    """Whether this machine is well is not for this test to say: its exit code is what it printed."""
    code = tristage_command([word if "/" not in word else str(REPO / word) for word in command.split()[1:]])
    printed = capsys.readouterr().out
    assert code == ("\nstop" in printed) and printed.startswith("ok    python")
    assert ("ranks 16" in printed) == ("16" in command)


@pytest.mark.parametrize("command", SETTINGS)
def test_a_command_about_settings_prints_the_key_that_it_is_about(command, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    assert tristage_command(command.split()[1:]) == 0
    assert ("ppo.kl_coef" if "settings" in command else "configs/bases/step1_sft.yaml:") in capsys.readouterr().out


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_of_a_few_lines_is_one(text, tmp_path):
    (tmp_path / "step1_sft.yaml").write_text(text)
    settings = load_config(settings_class("step1_sft", None), ["--config", str(tmp_path / "step1_sft.yaml")])
    assert settings.data.train[0].path == "my/rows.jsonl" and settings.data.heldout == ()


@pytest.mark.parametrize("command", EVALUATIONS)
def test_an_evaluation_command_names_a_module_and_settings_of_its_step(command):
    _, _, module, *words = command.split()
    step = module.removesuffix(".evaluate")
    assert module == f"{step}.evaluate" and (REPO / step / "evaluate.py").is_file()
    settings = load_config(settings_class(words[1], step), [word for word in words if word != "--interactive"])
    assert settings.folder.is_dir()


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after the quickstart and a run of the user's own, with tiny models."""
    folder = tmp_path_factory.mktemp("finished")
    prepare.main([str(folder / "output/quickstart"), "--size", "tiny"])
    scores = [[0.1 * i for i in range(9)], [0.1 * i + 1 for i in range(9)]]
    for name in ("quickstart", "mine"):
        write_ppo(folder / f"output/{name}/step3_ppo", scores)
    model = folder / "output/quickstart/model"
    for step in ("step1_sft", "step3_ppo"):
        shutil.copytree(model, folder / f"output/quickstart/{step}/final")
    tiny.write_reward_model(folder / "output/quickstart/step2_reward_model/final", str(model))
    return folder


@pytest.mark.parametrize("command", REPORTS)
def test_a_report_command_writes_a_page_and_says_where(command, finished_folder, monkeypatch, capsys):
    monkeypatch.chdir(finished_folder)
    assert tristage_command(command.split()[1:]) == 0
    printed = capsys.readouterr().out
    assert "Step 3: PPO: Better by the reward" in printed
    page = re.search(r"(\S*report.html)", printed)
    assert page is not None and (finished_folder / page[1]).is_file()


@pytest.mark.parametrize("command", TALKS)
def test_models_answer_as_the_docs_say(command, finished_folder, monkeypatch, capsys):
    """The page in a browser has tests of its own; here it is asked for once it listens."""
    served = []
    monkeypatch.setattr("tristage.answering.web.serve", lambda chat, *rest: served.append(len(chat.all)))
    monkeypatch.chdir(finished_folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Name two fruits.\n/quit\n"))
    assert tristage_command(command.split()[1:]) == 0
    printed = capsys.readouterr().out
    if "compare" in command:
        assert "wins by grade" in printed and (finished_folder / "comparison/compare.html").is_file()
    elif "--web" in command:
        assert served == [2]
    else:
        assert ("step1_sft/final: score " in printed) == ("--reward-model" in command)


# What the next step of a pipeline starts from.
EXPORT = """for word in "$@"; do
    case "$word" in output=*) mkdir -p "${word#*=}/final" && echo "{}" >"${word#*=}/final/config.json" ;; esac
done"""


@pytest.mark.parametrize("command", LAUNCHED)
def test_a_command_reaches_its_step_with_its_settings(command, clone, tmp_path):
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
    for step in ("step1_sft", "step2_reward_model") if "pipeline" not in command else ():  # were run before
        for recipe in re.findall(r"configs/([\w.-]+)/step3", command) or ["opt-1.3b"]:
            export(clone / "output" / recipe / step / "final")
    export(clone / "my/model")
    (clone / "my/rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    if "quickstart" in command:
        prepare.main([str(clone / "output/quickstart"), "--size", "tiny"])
    words = ["bash", "-c", command]
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "--dry-run" in command:
        assert ("node node-b: 8 ranks" if "hosts" in command else "would run: ") in done.stdout and not seen.exists()
        return
    words = seen.read_text().splitlines()
    if "slurm" in command:
        files = [word for word in words if word.endswith((".sbatch", ".yaml"))]
        assert len(files) in (2, 6) and all((clone / file).is_file() for file in files)
        return
    assert "--hostfile" in words or words[words.index("--num_gpus") + 1] == "8"
    for position in [place for place, word in enumerate(words) if word == "--config"]:
        assert (clone / words[position + 1]).is_file()
    modules = [words[place + 1] for place, word in enumerate(words) if word == "--module"]
    assert modules and all((REPO / (module.replace(".", "/") + ".py")).is_file() for module in modules)


def export(folder: Path) -> None:
    """A folder that launchers take for a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
