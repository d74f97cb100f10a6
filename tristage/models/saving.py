"""Final exports: an ordinary Hugging Face folder, tokenizer and chat template included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tristage import dist
from tristage.engine import full_state_dict


def save_model(engine: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an engine's model (a CausalLM or RewardModel wrapper) as safetensors with config and tokenizer.

    A collective under ZeRO-3; rank 0 writes. The folder appears whole or not at all: it is written beside and
    renamed.
    """
    state = full_state_dict(engine)
    if dist.is_main():
        model = engine.module.model
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        beside = folder.with_name(folder.name + ".partial")
        remove_tree(beside)
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        remove_tree(folder)
        beside.rename(folder)
    dist.barrier()


def remove_tree(folder: Path) -> None:
    """Delete a folder if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
