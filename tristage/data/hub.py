"""The hub that ids of models and data sets come from: queried once, so that no library retries for a minute without it.

Code that opens an id calls `prepare` first, and puts `problem` into its error message.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

TIMEOUT = 5.0  # seconds


def prepare(path: str) -> None:
    """Call before opening the id `path`: if the hub does not answer, this process uses its cache only."""
    if not Path(path).exists() and not constants.is_offline_mode() and not answers(constants.ENDPOINT):
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has a copy
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def problem(path: str) -> str | None:
    """Why an id could not be opened, and the fix; None if it is a folder, or the hub has answered."""
    if Path(path).exists() or not constants.is_offline_mode():
        return None
    return (
        f"{path}: not a local folder and not in the cache {constants.HF_HUB_CACHE}, and the hub {constants.ENDPOINT} "
        "does not answer or HF_HUB_OFFLINE is set; give a local folder, or set HF_HOME to a cache that has it"
    )


@functools.cache
def answers(endpoint: str) -> bool:
    """Whether a server answers at all, within TIMEOUT."""
    answered = []

    def ask() -> None:
        try:
            answered.append(get_session().head(endpoint, timeout=TIMEOUT).status_code < 500)
        except Exception:  # each version of the HTTP library has its own
            answered.append(False)

    # A thread, since looking up a name heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT + 1)
    return answered == [True]
