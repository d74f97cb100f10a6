"""Whether torch can use a GPU of this machine; launchers call `python -m tristage.dist.gpu`, which prints how many.

Where there is an NVIDIA GPU and torch cannot use it, one line on standard error reports why: otherwise a run would go
to the CPU unnoticed.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from tristage.machine.devices import has_nvidia_gpu


def problem(root: Path = Path("/")) -> str:
    """Why torch cannot use the NVIDIA GPU of this machine; empty if it can, there is none, or the user hid it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning would repeat it, in several lines
        if torch.cuda.is_available():
            return ""
        if not has_nvidia_gpu(root) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return ""
        return f"this machine has an NVIDIA GPU that torch cannot use: {_reason()}"


def _reason() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{first}; see `nvidia-smi`" + (f" and CUDA_VISIBLE_DEVICES={visible}" if visible else "")
    return "no reason given; see `nvidia-smi`"


if __name__ == "__main__":
    if reason := problem():
        print(f"warning: {reason}; ranks run on the CPU (--cpu N if that is intended)", file=sys.stderr)
    print(torch.cuda.device_count())
