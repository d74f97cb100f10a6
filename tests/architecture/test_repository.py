"""The repository itself: what has to be there, what its scripts may hold, and that its READMEs name what exists."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NOT_OURS = {".git", ".venv", ".torch_extensions", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
NOT_OURS |= {"__pycache__", "output", "build", "shared"}

REQUIRED = (
    *("README.md", "setup.cfg", "pyproject.toml", "constraints.txt", ".gitignore", ".ci/run"),
    *("configs/quickstart", "configs/deepspeed", "launch/common.sh", "launch/quickstart.sh", "launch/test.sh"),
    *("launch/pipeline.sh", "launch/step1_sft.sh", "launch/step2_reward_model.sh", "launch/step2_dpo.sh"),
    *("launch/step3_ppo.sh", "step1_sft/train.py", "step2_reward_model/train.py", "step2_dpo/train.py"),
    *("step3_ppo/train.py", "tristage", "tests"),
)


def repository_files(folder: Path = REPO) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in NOT_OURS or path.name.endswith(".egg-info") or path.is_symlink():
            continue
        if path.is_dir():
            yield from repository_files(path)
        else:
            yield path


FILES = list(repository_files())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".slurm", ".sbatch") or path == REPO / ".ci/run"]
READMES = [path for path in FILES if path.name == "README.md"]


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("entry", REQUIRED)
def test_a_required_entry_is_there(entry):
    assert (REPO / entry).exists()


# -- registries --------------------------------------------------------------------------------------------

# Where packages and images come from is a matter of the machine (its pip.conf), never of this repository.
REGISTRY = re.compile(
    r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_(?:EXTRA_)?INDEX_URL|pypi\.org|pythonhosted\.org"
    r"|download\.pytorch\.org|anaconda\.(?:org|com)|npmjs\.|docker\.io|ghcr\.io|quay\.io|nvcr\.io|proxy\.golang"
    r"|artifactory|/simple/?$",
    re.IGNORECASE | re.MULTILINE,
)


@pytest.mark.parametrize(
    "text",
    ["pip install --index-url X", "https://pypi.org/simple", "FROM nvcr.io/nvidia/pytorch", "https://mirror/simple\n"],
)
def test_a_registry_is_seen(text):
    assert REGISTRY.search(text)


def test_no_file_names_a_registry():
    found = [
        f"{name_of(path)}: {match[0]}"
        for path in FILES
        if path != Path(__file__) and b"\0" not in (content := path.read_bytes())
        for match in REGISTRY.finditer(content.decode("utf-8", "replace"))
    ]
    assert found == []


# -- scripts -----------------------------------------------------------------------------------------------


def commands_of(path: Path) -> list[str]:
    """The lines of a script that are neither empty nor comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def test_the_scripts_are_found():
    assert {"launch/common.sh", "launch/step3_ppo.sh", ".ci/run"} <= {name_of(path) for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_is_whole_bash(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_starts_in_strict_mode(path):
    """launch/common.sh sets it, a launcher sources that first; a script elsewhere sets it first itself."""
    first = commands_of(path)[0]
    if path.parent == REPO / "launch" and path.name != "common.sh":
        assert first == 'source "$(dirname "${BASH_SOURCE[0]}")/common.sh"'
    else:
        assert first == "set -euo pipefail" or first.endswith("/common.sh\"")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_holds_no_hyperparameter(path):
    # "sbatch" submits a job, it is no batch size.
    found = [line for line in commands_of(path) if re.search(r"learning_rate|epochs|(?<!s)batch", line)]
    assert found == []


def test_a_launcher_for_each_step_hands_all_its_words_on():
    for step in REPO.glob("step[0-9]_*/train.py"):
        launcher = REPO / "launch" / f"{step.parent.name}.sh"
        assert commands_of(launcher)[-1] == f'launch_step {step.parent.name}.train "$@"'


# -- READMEs -----------------------------------------------------------------------------------------------

SOURCE_SUFFIXES = (".py", ".sh")


def code_of(text: str) -> Iterator[str]:
    """What stands in fenced blocks and in backticks."""
    fence = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)
    for block in fence.findall(text):
        yield re.sub(r"^\s*```.*$", "", block, flags=re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", fence.sub("", text))


def named_paths(text: str, top_level: set[str]) -> Iterator[str]:
    """Words of the code that look like paths of this repository; placeholders (`OUT/`, `<name>`) do not.

    A path starts with a top-level entry, or is a bare name of a source file (`train.py`).
    """
    for word in re.split(r"[\s\"'=()\[\],;|]+", "\n".join(code_of(text))):
        word = word.removeprefix("./").rstrip(".:")
        parts = word.rstrip("/").split("/")
        placeholder = any(part.isupper() and "." not in part for part in parts)
        if placeholder or not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word):
            continue
        if parts[0] in top_level if "/" in word else word.endswith(SOURCE_SUFFIXES):
            yield word


def named_modules(text: str, top_level: set[str]) -> Iterator[str]:
    """Modules of this repository that commands in the code run: `-m step1_sft.train`, `--module step1_sft.train`."""
    for code in code_of(text):
        for module in re.findall(r"(?:-m|--module)[ =]([A-Za-z_][\w.]*)", code):
            if module.split(".")[0] in top_level:
                yield module


TOP_LEVEL = {path.name for path in REPO.iterdir() if path.name not in NOT_OURS}


def test_paths_and_modules_are_told_from_other_words():
    text = """
Run `launch/quickstart.sh` or `train.py`; `OUT/final` and `learning_rate` are no paths, `a/b` is not ours.
```bash
bash launch/step1_sft.sh configs/RECIPE/step1_sft.yaml model=OUT/final data.train=configs/datasets/x.md
deepspeed --module step1_sft.train --config "configs/quickstart/step1_sft.yaml"   # ./launch/
python -m pytest
```
"""
    assert list(named_paths(text, {"launch", "configs", "step1_sft"})) == [
        "launch/step1_sft.sh",
        "configs/datasets/x.md",
        "configs/quickstart/step1_sft.yaml",
        "launch/",
        "launch/quickstart.sh",
        "train.py",
    ]
    assert list(named_modules(text, {"step1_sft"})) == ["step1_sft.train"]


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_path_that_a_readme_names_exists(readme):
    anywhere = {path.name for path in FILES}

    def exists(path: str) -> bool:
        if "/" not in path:
            return path in anywhere
        return any(REPO.glob(path.rstrip("/"))) or any(readme.parent.glob(path.rstrip("/")))

    text = readme.read_text(encoding="utf-8")
    assert [path for path in named_paths(text, TOP_LEVEL) if not exists(path)] == []


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_module_that_a_readme_runs_exists(readme):
    modules = named_modules(readme.read_text(encoding="utf-8"), TOP_LEVEL)
    paths = [REPO / module.replace(".", "/") for module in modules]
    found = [path for path in paths if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())]
    assert found == []
