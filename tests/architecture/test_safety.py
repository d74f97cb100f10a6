"""Nothing that comes from a file is executed: read from the syntax trees of every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FOLDERS = ["tristage", "benchmarks", "launch", *(path.name for path in REPO.glob("step[0-9]_*"))]
SOURCES = sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
FUNCTIONS = {"eval", "exec", "os.system", "os.popen", "__import__", "joblib.load", "yaml.load", "yaml.unsafe_load"}
KEYWORDS = {
    ("weights_only", False),
    ("allow_pickle", True),
    ("shell", True),
}
LOADERS = ("from_pretrained", "from_config")  # of transformers: without the keyword they ask on standard input
TRUST = "trust_remote_code"
# file -> what it may do
ALLOWED = {
    # These read one JSON file each.
    "tristage/models/lora.py": {"LoraConfig.from_pretrained without trust_remote_code"},
    "tristage/models/tokenizer.py": {"GenerationConfig.from_pretrained without trust_remote_code"},
}


def untold_trust(call: ast.Call, name: str) -> Iterator[str]:
    """A loader must be told not to run code from the folder, or the setting of that name, which is off by default."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == TRUST]
    if name.rpartition(".")[2] in LOADERS and not given:
        yield f"{name} without {TRUST}"
    for value in given:
        of_setting = ast.unparse(value).rpartition(".")[2] == TRUST or ".trusts(" in ast.unparse(value)
        if not of_setting and not (isinstance(value, ast.Constant) and value.value is False):
            yield f"{TRUST}={ast.unparse(value)}"


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What would execute, or might."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FUNCTIONS:
                yield name
            for keyword in node.keywords:
                value = keyword.value
                # What is no plain constant might be anything.
                known = value.value if isinstance(value, ast.Constant) else None
                if any(keyword.arg == key and known in (None, bad) for key, bad in KEYWORDS):
                    yield f"{keyword.arg}={ast.unparse(value)}"
            yield from untold_trust(node, name)
            if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                yield "torch.load without weights_only"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("from pickle import load", ["import pickle"]),
        ("eval(x)\nmodel.eval()\nyaml.safe_load(x)", ["eval"]),
        ("torch.load(f)", ["torch.load without weights_only"]),
        ("torch.load(f, weights_only=False)", ["weights_only=False"]),
        ("torch.load(f, weights_only=flag)", ["weights_only=flag"]),
        ("torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)", []),
        ("np.load(f, allow_pickle=True)", ["allow_pickle=True"]),
        ("subprocess.run(x, shell=True)", ["shell=True"]),
        ("f(trust_remote_code=True)", ["trust_remote_code=True"]),
        ("f(trust_remote_code=path == 'mine')", ["trust_remote_code=path == 'mine'"]),
        ("AutoConfig.from_pretrained(path)", ["AutoConfig.from_pretrained without trust_remote_code"]),
        ("cls.from_config(c, **more)", ["cls.from_config without trust_remote_code"]),
        ("A.from_pretrained(p, trust_remote_code=False)\nA.from_config(c, trust_remote_code=trust_remote_code)", []),
        ("A.from_pretrained(p, trust_remote_code=settings.trusts('reward'))", []),
    ],
)
def test_what_is_unsafe_is_seen(code: str, found: list[str]) -> None:
    assert list(unsafe(ast.parse(code))) == found


def test_the_sources_are_found() -> None:
    names = {path.relative_to(REPO).as_posix() for path in SOURCES}
    assert {"tristage/checkpoint/saving.py", "step3_ppo/train.py", "tristage/data/store.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_nothing_from_a_file_is_executed(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(REPO).as_posix(), set())
    assert set(unsafe(ast.parse(path.read_text(encoding="utf-8")))) <= allowed
