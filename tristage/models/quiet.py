"""Silence what libraries print and no user can act on."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Called where a program starts, never by an import: a notebook that imports tristage keeps its own settings.

    bitsandbytes prints while it is imported, so that tristage/__init__.py alone is early enough for it.
    """
    # A progress bar per file and rank, and a report that the new head is new, hide the lines that matter.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torch announces renamed collectives at every call of DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
