"""Final exports: an ordinary Hugging Face folder, tokenizer and chat template included; next to it the adapter alone.

Rank 0 holds the weights once: its copy from the engine is merged and written without another.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from tristage import dist
from tristage.dist import progress
from tristage.engine import full_state_dict, gathered_to_read
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.kernels import is_quantized
from tristage.models.loading import load_config_without_dropout
from tristage.models.lora import (
    base_path,
    has_adapters,
    load_adapter,
    merge_state,
    read_adapter_config,
    save_adapter,
    stream_merged,
)
from tristage.models.reward_model import load_reward_model
from tristage.models.scalar_head import register_scalar_head
from tristage.models.tokenizer import load_tokenizer
from tristage.storage.durable import remove_tree, sync

SHARD_SIZE = "5GB"  # of one file of weights; a larger model has several, and an index


def save_model(
    engine: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, shard_size: str = SHARD_SIZE
) -> list[Path]:
    """Write an engine's model (a CausalLM or RewardModel wrapper) as safetensors with config and tokenizer.

    A collective under ZeRO-3; rank 0 writes. Adapters are merged, and written alone as well, in FOLDER_adapter; those
    of quantised weights are merged into the base model that they were quantised from. With a value head, trunk
    and head are also written as a critic, in FOLDER_critic. Each folder appears complete and synced, or not at all.

    Returns:
        The folders that were written, on rank 0; [] on other ranks.

    Raises:
        UserError: on rank 0, the disk is full; existing folders are unchanged.
    """
    with progress.phase("save"), progress.telling(f"writing {folder}"):
        state, written = full_state_dict(engine), []
        if dist.is_main():
            written = _write(engine.module.model, state, tokenizer, folder, shard_size)
        dist.barrier()
    return written


def stream_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that `save_model` writes, by its names, adapters merged: copies, one after the other.

    A collective under ZeRO-3, where each weight is gathered in its turn: every rank must take all of them.
    """
    model = engine.module.model
    for name, weight in stream_merged(model, gathered_to_read):
        yield from revert_weight_conversion(model, {name: weight}).items()


def _write(
    model: Any, wrapped: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path, shard_size: str
) -> list[Path]:
    """Write the folders of save_model from the wrapper's state `wrapped`, which is emptied; returns the folders."""
    written = [folder]
    value_head = wrapped.pop("value_head.weight", None)
    state = {name.removeprefix("model."): wrapped.pop(name) for name in list(wrapped)}
    adapter = folder.with_name(folder.name + "_adapter")
    if has_adapters(model):
        with _atomic_folder(adapter) as partial:
            save_adapter(model, state, partial)
            tokenizer.save_pretrained(partial)
        written.append(adapter)
    if is_quantized(model):
        trust_remote_code = type(model).__module__.startswith("transformers_modules")  # it was loaded with it
        _write_merged(base_path(model), str(adapter), folder, model.dtype, shard_size, trust_remote_code)
    else:
        merge_state(model, state)
        with _atomic_folder(folder) as partial:  # transformers empties the dict that it is given
            model.save_pretrained(partial, state_dict=dict(state), max_shard_size=shard_size)
            tokenizer.save_pretrained(partial)
    if value_head is not None:
        critic = folder.with_name(folder.name + "_critic")
        with _atomic_folder(critic) as partial:
            _save_critic(model, state, value_head, partial, shard_size)
            tokenizer.save_pretrained(partial)
        written.append(critic)
    return written


def _save_critic(
    model: PreTrainedModel, state: dict[str, torch.Tensor], value_head: torch.Tensor, folder: Path, shard_size: str
) -> None:
    """A language model's trunk under a scalar head, as the reward models and critics that others open are kept."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    register_scalar_head(config)
    with torch.device("meta"):
        critic = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    trunk = {name: tensor for name, tensor in state.items() if name.startswith(f"{model.base_model_prefix}.")}
    critic.save_pretrained(folder, state_dict=trunk | {"score.weight": value_head}, max_shard_size=shard_size)


def merge_adapter(base: str, adapter: str, out: str) -> None:
    """Write the model of `base` with the LoRA adapter in the folder `adapter` merged, as the folder `out`.

    Raises:
        UserError: no such adapter or base, they don't belong together, or `out` exists.
    """
    if Path(out).exists():
        raise UserError(f"{out}: already exists; name a new folder")
    read_adapter_config(adapter)  # a better sentence than that of a missing base
    _write_merged(base, adapter, Path(out), load_config_without_dropout(base).dtype, SHARD_SIZE)


def _write_merged(
    base: str, adapter: str, out: Path, dtype: torch.dtype, shard_size: str, trust_remote_code: bool = False
) -> None:
    scores = read_adapter_config(adapter).task_type == "SEQ_CLS"
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{adapter}: holds no {weights.name}; give a folder such as OUT/final_adapter")
    # The tokenizer that it was trained with, if it is there: its template may differ from the base's.
    source = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    options: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if scores:
        model: Any = load_reward_model(base, tokenizer, new_head_seed=0, **options).model  # the adapter has its head
    else:
        model = load_causal_lm(base, tokenizer, **options).model
    load_adapter(model, adapter, load_file(weights))
    state = model.state_dict()
    merge_state(model, state)
    with _atomic_folder(out) as partial:
        model.save_pretrained(partial, state_dict=state, max_shard_size=shard_size)
        tokenizer.save_pretrained(partial)


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` at the end, so that `folder` is always either absent or complete.

    Raises:
        UserError: the disk is full; what was written is removed.
    """
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    remove_tree(partial)
    remove_tree(old)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    except Exception as error:
        if not _is_full(error):
            raise
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        remove_tree(partial)
        raise UserError(
            f"{folder}: the disk is full after {written} bytes of the model; make room and start again: "
            "training is not repeated"
        ) from None
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    remove_tree(old)


def _is_full(error: Exception) -> bool:
    """Whether the disk is full; safetensors' own exception only has the system's message."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)
