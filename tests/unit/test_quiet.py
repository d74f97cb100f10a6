"""Programs silence the libraries beneath them; importing tristage leaves them as they are."""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from transformers.utils import logging as transformers_logging

from tristage.cli import main as cli
from tristage.errors import UserError
from tristage.models.quiet import quiet_libraries
from tristage.training import run

REPO = Path(__file__).parents[2]
SILENCERS = {"setLevel", "set_verbosity_error", "disable_progress_bar", "filterwarnings", "simplefilter"}


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Libraries as they are without tristage, and quiet again afterwards, for the tests that follow."""
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    quiet_libraries()


def assert_quiet() -> None:
    assert transformers_logging.get_verbosity() == logging.ERROR
    assert not transformers_logging.is_progress_bar_enabled()
    assert ("ignore", FutureWarning) in [(action, category) for action, _, category, *_ in warnings.filters]


def test_an_entry_point_silences_them_before_a_step_runs() -> None:
    def main(argv: list[str]) -> None:
        assert_quiet()
        raise UserError("reached")

    with mock.patch.object(sys, "argv", ["train"]), pytest.raises(SystemExit):
        run.entry_point(main)


def test_the_command_silences_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tristage.models.saving.merge_adapter", lambda *folders: assert_quiet())
    assert cli.main(["merge", "base", "adapter", "out"]) == 0


def test_no_import_silences_a_library_but_bitsandbytes_which_prints_while_it_is_imported() -> None:
    found = [
        (path.relative_to(REPO).as_posix(), ast.unparse(node.func))
        for path in sorted(REPO.glob("tristage/**/*.py")) + sorted(REPO.glob("step[0-9]_*/*.py"))
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Expr)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in SILENCERS
    ]
    assert found == [("tristage/__init__.py", "logging.getLogger('bitsandbytes').setLevel")]
