"""Tokenised sets of tests go to a folder of this run, never to the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("TRISTAGE_CACHE")
    os.environ["TRISTAGE_CACHE"] = str(tmp_path_factory.mktemp("tristage_cache"))
    yield
    if before is None:
        del os.environ["TRISTAGE_CACHE"]
    else:
        os.environ["TRISTAGE_CACHE"] = before
