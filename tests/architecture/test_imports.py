"""Who may import whom, and what is documented: read from the syntax trees, nothing is imported."""

from __future__ import annotations

import ast
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
    "deepspeed": ("tristage/engine.py", "tristage/rollout/"),
    "torch.distributed": ("tristage/dist.py",),
    "peft": ("tristage/models/",),
    "transformers": (
        "tristage/models/",
        "tristage/rollout/",
        "tristage/quickstart/",
        "tristage/data/template.py",
        "tristage/data/trial.py",
    ),
}
# Imports inside functions, each with its reason beside it in the source.
INSIDE_FUNCTIONS = {
    ("tristage/data/sources.py", "datasets"),
    ("tristage/data/sources.py", "huggingface_hub"),
    ("tristage/cli.py", "tristage"),
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
    assert {"tristage/engine.py", "tristage/algo/ppo.py", "step3_ppo/update.py"} <= {name_of(path) for path in SOURCES}


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
