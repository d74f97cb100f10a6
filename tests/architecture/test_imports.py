"""Who may import whom, and what is documented: read from the syntax trees, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
STEPS = sorted(folder.name for folder in REPO.glob("step[0-9]_*") if (folder / "__init__.py").is_file())
LIBRARY = sorted((REPO / "tristage").rglob("*.py"))
SOURCES = LIBRARY + sorted(path for step in STEPS for path in (REPO / step).rglob("*.py"))

# Which files may import a library whose name must not spread, as prefixes of paths.
HOMES = {
    "deepspeed": ("tristage/engine/", "tristage/rollout/"),
    "torch.distributed": ("tristage/dist/",),
    "peft": ("tristage/models/",),
    "vllm": ("tristage/rollout/",),
    "transformers": (
        "tristage/models/",
        "tristage/rollout/",
        "tristage/quickstart/",
        "tristage/data/template.py",
        "tristage/data/trial.py",
    ),
}
# Package of tristage (or a module beside the packages) -> what of tristage it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "algo": set(),
    "errors": set(),
    "machine": set(),
    "batches": set(),
    "intervals": set(),
    "config": {"errors"},
    "storage": {"errors", "machine"},
    "dist": {"errors", "machine", "storage"},
    "data": {"batches", "config", "dist", "errors"},
    "runs": {"config", "data", "errors", "storage"},
    "engine": {"config", "dist", "errors", "storage"},
    "checkpoint": {"config", "dist", "engine", "errors", "runs", "storage"},
    "models": {"algo", "config", "data", "dist", "engine", "errors", "storage"},
    "rollout": {"algo", "batches", "dist", "engine", "errors", "models"},
    "answering": {"algo", "config", "data", "dist", "errors", "intervals", "models", "reporting"}
    | {"rollout", "runs", "storage"},
    "planning": {"algo", "config", "data", "errors", "models"},
    "reporting": {"errors", "intervals", "runs", "storage"},
    "training": {"checkpoint", "config", "data", "dist", "engine", "errors", "machine"}
    | {"models", "planning", "reporting", "runs", "storage"},
    "launch": {"config", "data", "errors", "machine", "reporting", "runs"},
    "quickstart": {"launch", "models", "reporting", "runs", "storage"},
    "cli": {"answering", "rollout"}
    | {"config", "data", "dist", "errors", "launch", "models", "planning", "reporting", "storage", "training"},
}
WITHOUT_TORCH = ("config", "launch", "reporting", "runs")  # they are imported in the first second of a launch
# Imports inside functions, each with its reason beside it in the source.
INSIDE_FUNCTIONS = {
    ("tristage/data/sources.py", "datasets"),
    ("tristage/data/sources.py", "huggingface_hub"),
    ("tristage/cli/main.py", "tristage"),
    ("tristage/cli/answers.py", "tristage"),
    ("tristage/models/lora.py", "peft"),  # a second to import, with bitsandbytes
    ("tristage/training/board.py", "torch"),  # TensorBoard, on rank 0 alone
    ("tristage/rollout/vllm.py", "vllm"),
    ("tristage/training/trackers.py", "wandb"),  # extras
    ("tristage/training/trackers.py", "mlflow"),
    ("tristage/training/trackers.py", "trackio"),
    ("tristage/reporting/report.py", "plotly"),
    ("tristage/answering/web.py", "fastapi"),  # an extra
    ("tristage/answering/web.py", "uvicorn"),
    ("tristage/launch/pipeline.py", "tristage"),  # jinja2, at the end of a pipeline
}


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Full names of what a tree imports: `import a.b`, `from a import b` (which may be the module a.b) give "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPO).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(paths: list[Path], is_offence) -> list[str]:
    return [f"{name_of(path)}: {name}" for path in paths for name in imported(tree_of(path), path) if is_offence(name)]


def test_the_sources_are_found():
    assert STEPS[0] == "step1_sft" and len(STEPS) >= 3
    names = {name_of(path) for path in SOURCES}
    assert {"tristage/engine/engines.py", "tristage/algo/ppo.py", "step3_ppo/update.py"} <= names


def test_every_form_of_import_is_seen():
    text = "import a.b\nimport c as d\nfrom e import f\nfrom . import g\nfrom ..h import i\ndef j():\n    import k\n"
    found = list(imported(ast.parse(text), REPO / "tristage" / "data" / "x.py"))
    assert found == ["a.b", "c", "e.f", "tristage.data.g", "tristage.h.i", "k"]


def test_tristage_never_imports_a_step():
    assert offences(LIBRARY, lambda name: name.split(".")[0] in STEPS) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_step_never_imports_another(step):
    others = set(STEPS) - {step}
    assert offences(sorted((REPO / step).rglob("*.py")), lambda name: name.split(".")[0] in others) == []


@pytest.mark.parametrize("step", STEPS)
def test_evaluate_is_an_entry_point_that_nothing_imports(step):
    """What training and evaluation share is in modules that both import (heldout.py, loss.py)."""
    others = [path for path in sorted((REPO / step).rglob("*.py")) if path.name != "evaluate.py"]
    assert (REPO / step / "evaluate.py").is_file() and (REPO / step / "train.py") in others
    assert offences(others, lambda name: is_in(name, f"{step}.evaluate")) == []


def package_of(name: str) -> str:
    """tristage.config.settings -> config; the package itself, for its version -> nothing."""
    parts = name.split(".")
    known = len(parts) > 1 and ((REPO / "tristage" / parts[1]).is_dir() or (REPO / f"tristage/{parts[1]}.py").is_file())
    return parts[1] if known else ""


def test_every_package_has_a_row_and_no_row_is_left_over():
    names = {path.name.removesuffix(".py") for path in (REPO / "tristage").iterdir() if path.name[0] not in "_."}
    assert names - {"configs"} == MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_its_row_names(package):
    folder = REPO / "tristage" / package
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    imports = {package_of(name) for path in paths for name in imported(tree_of(path), path) if is_in(name, "tristage")}
    assert imports - {package, ""} <= MAY_IMPORT[package]


def test_packages_form_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        floor = [package for package, below in left.items() if not below & left.keys()]
        assert floor, f"a circle among {sorted(left)}"
        left = {package: below for package, below in left.items() if package not in floor}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_what_runs_before_the_ranks_never_imports_torch(package):
    files = [path for path in (REPO / "tristage" / package).rglob("*.py") if path.stem != "__main__"]
    modules = [".".join(path.relative_to(REPO).with_suffix("").parts) for path in files]
    code = f"import sys; sys.modules['torch'] = None\nfor name in {modules}: __import__(name)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True).stderr == ""


def test_the_algorithms_import_torch_and_the_standard_library_only():
    def is_foreign(name: str) -> bool:
        return not (name.split(".")[0] in sys.stdlib_module_names | {"torch"} or is_in(name, "tristage.algo"))

    assert offences(sorted((REPO / "tristage/algo").rglob("*.py")), is_foreign) == []


def test_pure_data_has_no_side_effects_on_the_heartbeat():
    """Engines mark progress (engine/engines.py); batch types, collation and sampling know nothing of ranks."""
    pure = [REPO / f"tristage/{name}.py" for name in ("batches", "data/collate", "rollout/sampling")]
    assert offences(pure, lambda name: is_in(name, "tristage.dist")) == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_where_it_lives(library):
    away = [path for path in SOURCES if not name_of(path).startswith(HOMES[library])]
    assert offences(away, lambda name: is_in(name, library)) == []
    assert len(away) < len(SOURCES)  # its home exists


def test_nothing_reaches_torch_distributed_through_torch():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        if not name_of(path).startswith(HOMES["torch.distributed"])
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    assert found == []


def test_imports_stand_at_the_top_of_a_file():
    found = {
        (name_of(path), name.split(".")[0])
        for path in SOURCES
        for function in ast.walk(tree_of(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for name in imported(function, path)
    }
    assert found <= INSIDE_FUNCTIONS


# -- docstrings --------------------------------------------------------------------------------------------


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes and module-level functions without a docstring, and "module".

    Left out: `main`, and functions of at most two statements, whose name and signature say it all (`rank()`).
    """
    missing = [] if ast.get_docstring(tree) else ["module"]
    for node in tree.body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if not public or ast.get_docstring(node):
            continue
        if isinstance(node, ast.ClassDef) or (node.name != "main" and len(node.body) > 2):
            missing.append(node.name)
    return missing


def test_what_is_undocumented_is_found():
    long_body = "\n    1\n    2\n    3\n"
    text = f"class A: pass\nclass _B: pass\ndef c():{long_body}def rank():\n    return 1\ndef main():{long_body}"
    assert undocumented(ast.parse(text)) == ["module", "A", "c"]
    assert undocumented(ast.parse('"""M."""\nclass A:\n    """A."""\n')) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_classes_and_functions_are_documented(path):
    assert undocumented(tree_of(path)) == []
