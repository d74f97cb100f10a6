"""The repository itself: what has to be there, what its scripts may hold, and that README and docs name what exists."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NOT_OURS = {".git", ".venv", ".torch_extensions", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
NOT_OURS |= {"__pycache__", "output", "build", "shared"}

REQUIRED = (
    *("README.md", "setup.cfg", "pyproject.toml", "constraints.txt", ".gitignore", ".ci/run"),
    *("LICENSE", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md", "docs/pictures/iteration.svg"),
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
PAGES = [path for path in FILES if path.name == "README.md" or path.parent == REPO / "docs" and path.suffix == ".md"]
PAGES.append(REPO / "CONTRIBUTING.md")


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
        assert commands_of(launcher)[-1] == f'exec python -m tristage.launch {step.parent.name}.train "$@"'


# -- README and docs ---------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_that_a_page_names_exists(page):
    """Pages that map another project's files to ours name its files by their bare names."""
    anywhere = {path.name for path in FILES}

    def exists(path: str) -> bool:
        if "/" not in path:
            return path in anywhere or page.name.startswith("from-")
        path = path.rstrip("/").replace("configs/mine", "configs/opt-1.3b")  # a recipe that README.md copies
        return any(REPO.glob(path)) or any(page.parent.glob(path))

    text = page.read_text(encoding="utf-8")
    assert [path for path in named_paths(text, TOP_LEVEL) if not exists(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_module_that_a_page_runs_exists(page):
    modules = named_modules(page.read_text(encoding="utf-8"), TOP_LEVEL)
    paths = [REPO / module.replace(".", "/") for module in modules]
    found = [path for path in paths if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())]
    assert found == []


def anchors(page: Path) -> set[str]:
    """What `#...` in a link may name: the headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


def test_every_page_of_the_docs_is_in_the_readme():
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", (REPO / "README.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in (REPO / "docs").glob("*.md")}


def test_the_readme_is_one_page():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_picture_is_what_its_script_draws():
    draw = runpy.run_path(str(REPO / "docs/pictures/draw.py"))
    assert (REPO / "docs/pictures/iteration.svg").read_text(encoding="utf-8") == draw["picture"]()


# -- what docs say of the source ---------------------------------------------------------------------------

SOURCES = [path for path in FILES if path.suffix == ".py" and path.relative_to(REPO).parts[0] not in ("tests", "docs")]


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = (REPO / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("what, file, where", rows_of("docs/design.md", "Where is ..."), ids=lambda cell: cell[:30])
def test_the_design_page_says_in_which_file_a_function_is(what, file, where):
    text = (REPO / file.strip("`")).read_text(encoding="utf-8")
    (name,) = re.match(r"`(\w+)`", where).groups()
    assert re.search(rf"^(?:def|class) {name}\b", text, flags=re.MULTILINE), what


def texts(path: Path) -> Iterator[str]:
    """The strings of a source file, as they are printed; a `{...}` of an f-string is left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_that_is_explained_exists():
    scripts = [path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".sh"]
    said = "\n".join([*(text for path in SOURCES for text in texts(path)), *scripts])
    rows = rows_of("docs/troubleshooting.md", "By message")
    assert len(rows) > 20 and [row[0] for row in rows if row[0].strip("`") not in said] == []


def test_the_reading_order_of_step_3_counts_lines_about_right():
    page = (REPO / "step3_ppo/README.md").read_text(encoding="utf-8")
    counts = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", page, flags=re.MULTILINE)
    lines = {file: len((REPO / "step3_ppo" / file).read_text().splitlines()) for file, _ in counts}
    assert len(counts) > 5 and {file for file, count in counts if abs(lines[file] / int(count) - 1) > 0.15} == set()


def test_the_schedule_of_step_3_fits_on_a_screen():
    tree = ast.parse((REPO / "step3_ppo/train.py").read_text(encoding="utf-8"))
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno - train.lineno < 40
