"""Fingerprints of what a run reads, model folders and data files: cheap, and without torch.

run.start writes them to environment.json. Checkpoints and finished.json hold them, so that another model or other rows
under the same name are detected.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from pydantic import BaseModel

from tristage.config import RunSettings, SourceSettings, find_file
from tristage.data.sources import content_on_disk, resolve_preset
from tristage.storage.durable import checksum

HEAD = 1 << 16  # bytes of each tensor that are read
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Files of a model folder that a run may read. Others, such as a README, may change.
MODEL_FILES = (
    *("config.json", "adapter_config.json", "score_scale.json", "*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
)


def named_models(settings: RunSettings) -> dict[str, str]:
    """Key -> folder or id of each model that the settings name."""
    return {spec.path_key: spec.path for spec in settings.engine_specs()}


def model_fingerprints(settings: RunSettings) -> dict[str, str]:
    """Key -> fingerprint of each model that the settings name."""
    return {key: model_fingerprint(path) for key, path in named_models(settings).items()}


def source_fingerprints(settings: RunSettings) -> dict[str, str]:
    """Key -> fingerprint of each source of rows and of the chat template: settings and every byte of the files.

    "" for what is not on this machine, such as a data set on the hub. Raises UserError as resolve_preset does.
    """
    fingerprints = {}
    for key, source in _named_sources(settings):
        source = resolve_preset(source, settings)
        content = content_on_disk(source)
        fingerprints[key] = _digest([source.model_dump_json(), content]) if content else ""
    if settings.data.template is not None:
        fingerprints["data.template"] = checksum(find_file(settings.data.template, settings, "data.template"))
    return fingerprints


def _named_sources(group: BaseModel, prefix: str = "") -> Iterator[tuple[str, SourceSettings]]:
    for name in type(group).model_fields:
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _named_sources(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            several = [item for item in value if isinstance(item, SourceSettings)]
            yield from ((f"{prefix}{name}[{place}]", source) for place, source in enumerate(several))


def model_fingerprint(path: str | Path) -> str:
    """Of a folder: its config, tokenizer, and of each tensor its name, shape and first 64 KiB.

    Training changes every tensor, so this tells two models apart at a fraction of the time that reading them takes;
    an edit deep inside one large tensor is not detected. Of a hub id: the commit that is in the local cache, else "".
    """
    folder = Path(path)
    if not folder.is_dir():
        with contextlib.suppress(HFValidationError):  # of a path that does not exist
            cached = try_to_load_from_cache(str(path), "config.json")
            return Path(cached).parent.name if isinstance(cached, str) else ""
        return ""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    return _digest([[file.name, _weights(file) if file.suffix == ".safetensors" else checksum(file)] for file in files])


def _weights(file: Path) -> str:
    """Of a safetensors file: its size, its header and the head of each tensor; all of it when it has no such header."""
    try:
        with file.open("rb") as stream:
            return _digest([file.stat().st_size, *_heads(stream)])
    except (ValueError, KeyError, TypeError, AttributeError):
        return checksum(file)


def _heads(stream: BinaryIO) -> Iterator[str]:
    size = int.from_bytes(stream.read(8), "little")
    if size > LONGEST_HEADER:
        raise ValueError(size)
    header = stream.read(size)
    yield xxhash.xxh3_128_hexdigest(header)
    spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    for start, end in sorted(spans):
        stream.seek(8 + size + start)
        yield xxhash.xxh3_128_hexdigest(stream.read(min(end - start, HEAD)))


def _digest(parts: list[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
