"""Silences library output that users cannot act on."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Called where a program starts, never by an import: a notebook that imports tristage keeps its own settings.

    bitsandbytes prints while it is imported, so that tristage/__init__.py alone is early enough for it.
    """
    # Progress bars (one per file and rank) and the report of a newly initialised head would bury useful lines.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torch announces renamed collectives at every call of DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
