"""For all tests: tokenised sets go to a folder of this run, never to the user's cache; Ctrl-C reaches launchers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# A shell without job control starts what it puts in the background with SIGINT ignored, and no shell below can trap it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("TRISTAGE_CACHE")
    os.environ["TRISTAGE_CACHE"] = str(tmp_path_factory.mktemp("tristage_cache"))
    yield
    if before is None:
        del os.environ["TRISTAGE_CACHE"]
    else:
        os.environ["TRISTAGE_CACHE"] = before
