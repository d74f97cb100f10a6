"""Checkpoints to resume from: all state of a step in one folder, complete or absent, verified before it is used.

    OUT/checkpoints/step_000200/{actor/, critic/, own/, random_rank0.json, state.json, manifest.json}
    OUT/checkpoints/latest                  the newest folder's name, for people and scripts; nothing here reads it

A checkpoint is written as step_000200.partial and renamed once every file is on the disk. On resume the newest folder
with a valid manifest is used; sizes and checksums of all its files are compared first. Nothing is unpickled.
"""

from tristage.checkpoint.finding import Checkpoint, Models, find_checkpoint
from tristage.checkpoint.loading import load_checkpoint
from tristage.checkpoint.saving import NON_TENSOR_BYTES, save_checkpoint

__all__ = [
    "NON_TENSOR_BYTES",
    "Checkpoint",
    "Models",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
