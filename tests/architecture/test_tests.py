"""The tests themselves: shared code is in tests/helpers, data in the repository, and each test checks something."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TESTS = sorted((REPO / "tests").rglob("test_*.py"))
HELPERS = sorted((REPO / "tests/helpers").glob("*.py"))
BENCHMARKS = sorted((REPO / "benchmarks").rglob("*.py"))
PRODUCT = sorted(path for folder in ("tristage", "step*_*") for path in REPO.glob(f"{folder}/**/*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# -- imports -----------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[str]:
    """"a.b" of `import a.b` and of `from a import b`; a relative one starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)


def is_test_file(module: str) -> bool:
    return module.startswith(".") or any(part.startswith("test_") for part in module.split(".")[:-1])


def test_imports_of_a_test_file_are_seen():
    text = "from tests.unit.test_a import b\nfrom tests.unit import test_a\nimport tests.unit.test_a, tests.helpers"
    assert [name for name in imported(ast.parse(text)) if is_test_file(f"{name}.")] == [
        "tests.unit.test_a.b",
        "tests.unit.test_a",
        "tests.unit.test_a",
    ]


@pytest.mark.parametrize("path", [*TESTS, *HELPERS], ids=name_of)
def test_nothing_imports_a_test_file(path):
    """What two test files need is a helper; a fixture there is a function that both wrap."""
    assert [name for name in imported(tree_of(path)) if is_test_file(f"{name}.")] == []


def test_benchmarks_and_the_package_do_not_import_tests():
    found = {name_of(path): [name for name in imported(tree_of(path)) if name.split(".")[0] == "tests"]
             for path in [*BENCHMARKS, *PRODUCT]}  # fmt: skip
    assert len(found) > 60 and {path: names for path, names in found.items() if names} == {}


# -- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in [*TESTS, *HELPERS] if path != Path(__file__)], ids=name_of)
def test_only_real_data_is_looked_for_outside_the_repository(path):
    """A folder above this one is what only its author has; real_data.py takes it from TRISTAGE_TEST_DATA."""
    text = path.read_text(encoding="utf-8")
    outside = re.findall(r"\bREPO\.parent\b|parents\[2\]\.parent\b|parents\[[3-9]\]", text)
    assert outside == (["REPO.parent"] if path.name == "real_data.py" else [])


# -- every test checks something ---------------------------------------------------------------------------


def checks(node: ast.AST, checkers: set[str]) -> bool:
    """Whether a function asserts, expects an error, or calls one that does."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            called = ast.unparse(inner.func)
            if called in ("pytest.raises", "pytest.fail") or called.rpartition(".")[2] in checkers:
                return True
    return False


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def checkers_of(functions: list[ast.FunctionDef], known: set[str]) -> set[str]:
    """Names of the functions that check something, by way of others too."""
    found = known | {each.name for each in functions if checks(each, known)}
    return found if found == known else checkers_of(functions, found)


KNOWN = {"assert_close", "assert_allclose", "assert_called_once", "assert_not_called"}  # of torch, numpy and mock
OF_HELPERS = checkers_of([each for path in HELPERS for each in functions_of(tree_of(path))], KNOWN)


def unchecked(tree: ast.Module) -> list[str]:
    functions = functions_of(tree)
    checkers = checkers_of([each for each in functions if not each.name.startswith("test_")], OF_HELPERS)
    return [each.name for each in functions if each.name.startswith("test_") and not checks(each, checkers)]


def test_a_test_that_checks_nothing_is_seen():
    text = """
def same(a): assert a
def both(a): same(a)
def test_a(): both(1)
def test_b():
    with pytest.raises(ValueError): f()
def test_c(): f()
def test_d(): assert_same_run(1, 2)
"""
    assert unchecked(ast.parse(text)) == ["test_c"]


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_checks_something(path):
    assert unchecked(tree_of(path)) == []
