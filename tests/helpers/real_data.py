"""Real data sets, which are not part of the repository: TRISTAGE_TEST_DATA names their folder (tests/README.md)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.recipes import REPO

VARIABLE = "TRISTAGE_TEST_DATA"
DATA = Path(os.environ.get(VARIABLE) or REPO.parent / "shared/data")  # a checkout beside a folder "shared" has them
HH = DATA / "hh_helpful/helpful-base-test.jsonl.gz"


def real_file(name: str) -> str:
    """The path of a file of DATA; skips the test that asks where it is missing."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no real data at {path}; {VARIABLE} may name another folder")
    return str(path)


def needs(path: Path) -> pytest.MarkDecorator:
    """The mark of a test module that skips it where `path` is missing."""
    return pytest.mark.skipif(not path.exists(), reason=f"no real data at {path}; {VARIABLE} may name another folder")
