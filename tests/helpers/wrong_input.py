"""What a user reads who gave a step something that it refuses."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from unittest import mock

import pytest

from tristage.errors import UserError
from tristage.models.kernels import Kernels
from tristage.training import run


def refusal_of(module: ModuleType, words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What `python -m MODULE WORDS` says on stderr, after checking that it is one sentence and code 2.

    Whatever reads weights ends there in another sentence. Checks that read their headers alone do not.
    """
    reading = mock.patch.object(Kernels, "loading_options", side_effect=UserError("weights are read now"))
    argv = mock.patch.object(sys, "argv", [module.__name__, *words])
    # patch.dict: a run that gets as far as joining a process group sets variables, which are taken back here.
    with reading, argv, mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"), pytest.raises(SystemExit) as stopped:
        run.entry_point(module.main)
    assert stopped.value.code == 2
    return one_sentence(capfd.readouterr().err)


def one_sentence(stderr: str) -> str:
    """The sentence after "error: ", which is all that stderr holds."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and "Traceback" not in stderr
    return lines[0].removeprefix("error: ")
