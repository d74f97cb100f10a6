"""Why a model folder cannot be opened, in one sentence, before weights are read or rows tokenised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from tristage.data import hub
from tristage.errors import UserError
from tristage.models.scalar_head import register_scalar_head

INDEX = "model.safetensors.index.json"
# Causal masks and frequencies that versions of transformers saved, and those of today compute.
COMPUTED = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def cannot_open(path: str, what: str, error: Exception) -> UserError:
    """The error of a `from_pretrained` as a sentence; `what` could not be opened."""
    reason = str(error).split("\n")[0] or type(error).__name__
    if "trust_remote_code" in str(error):
        return UserError(
            f"{path}: its {what} needs Python code from that folder, which is not run; use a model that transformers "
            "has, or read the code and set `trust_remote_code: true` (for a reward model with `reward.own_tokenizer`: "
            "`reward.trust_remote_code`)"
        )
    if type(error).__name__ == "UnpicklingError":
        return UserError(
            f"{path}: its .bin weights hold more than tensors, and pickled objects are not loaded; convert to "
            "safetensors"
        )
    return UserError(hub.problem(path) or _file_problem(path) or f"{path}: cannot be opened as a {what} ({reason})")


def _file_problem(path: str) -> str | None:
    """A file that is missing or cut short, where that is the reason."""
    folder, index = Path(path), Path(path) / INDEX
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{index}: not an index of weights; copy the model folder again"
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return f"{path}: {INDEX} names {_listed(missing)}, not in the folder; copy the model folder again"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # safetensors' own has no public base
            return f"{file}: damaged or cut short ({error}); copy it again"
    return None


def check_weights(path: str, config: PretrainedConfig, scores: bool, new_head: bool, trust_remote_code: bool) -> None:
    """The folder's weights must be those of the model, by name and shape. Only their headers are read.

    Args:
        scores: the model has a scalar head, else it is a language model.
        new_head: `path` may be a language model, whose scalar head is yet to be made.

    Raises:
        UserError: lists the keys that are missing, unexpected or of another shape; or a file that cannot be read.
    """
    if scores:
        register_scalar_head(config)
    if getattr(config, "quantization_config", None) is not None:
        return  # packed weights have other names until they are read
    auto_class: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model, info = _read_headers(auto_class, path, config, trust_remote_code)
    if scores and not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"{path}: a {config.model_type} model has no sequence-classification head named `score`; use a "
            "decoder-only language model"
        )
    missing = info["missing_keys"]
    unexpected = {key for key in info["unexpected_keys"] if not COMPUTED.search(key)}
    if new_head:
        missing -= {"score.weight"}
    if new_head and unexpected:  # the output projection's, which the language model knows
        unexpected &= _read_headers(AutoModelForCausalLM, path, config, trust_remote_code)[1]["unexpected_keys"]
    shapes = [f"{key} ({list(here)}, not {list(wanted)})" for key, here, wanted in info["mismatched_keys"]]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape than config.json's": shapes}
    found = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise UserError(
            f"{path}: its weights are not those of a {type(model).__name__} ({'; '.join(found)}); give a complete "
            "model folder"
        )


def _read_headers(auto_class: Any, path: str, config: PretrainedConfig, trust_remote_code: bool) -> tuple[Any, Any]:
    """(the model without its weights, transformers' loading info). Nobody's random numbers change."""
    try:
        with torch.random.fork_rng(devices=[]):
            return auto_class.from_pretrained(  # type: ignore[no-any-return]
                path,
                config=config,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # each format of weights has its own
        if f"for this kind of AutoModel: {auto_class.__name__}." in str(error):
            raise UserError(
                f"{path}: transformers has no {auto_class.__name__} for models of type {config.model_type}; use a "
                "decoder-only language model"
            ) from None
        raise cannot_open(path, "model", error) from None


def _listed(keys: Iterable[str]) -> str:
    """The first three."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} tokens but the model only "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
