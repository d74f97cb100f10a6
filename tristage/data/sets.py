"""A step's training and held-out sets: read, split by prompt, tokenised, with a count of what was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tristage import dist
from tristage.config import DataSettings
from tristage.data.rows import Kind, read_rows, split_heldout
from tristage.data.template import Tokenizer
from tristage.data.tokenize import encode_prompts, encode_ranking, encode_sft
from tristage.errors import UserError

ENCODERS: dict[str, Callable[..., tuple[list[Any], Counter[str]]]] = {
    "sft": encode_sft,
    "ranking": encode_ranking,
    "prompt": encode_prompts,
}


def load_sets(
    data: DataSettings, kind: Kind, tokenizer: Tokenizer, max_tokens: int, seed: int
) -> tuple[list[Any], list[Any]]:
    """(training, held-out) items of `kind`: Example for "sft" and "prompt", RankedExamples for "ranking".

    Held-out rows come from `data.heldout`, or are split off `data.train` by a hash of the prompt, so that no
    prompt is on both sides.

    Raises:
        UserError: unreadable or malformed rows, or a set that ends up empty.
    """
    train, dropped = read_rows(data.train, kind, subset=data.subset, split=data.split, limit=data.limit)
    if data.heldout is None:
        train, heldout = split_heldout(train, data.heldout_fraction, seed)
        source, heldout_dropped = data.train, Counter[str]()
    else:
        source = data.heldout
        heldout, heldout_dropped = read_rows(source, kind, subset=data.subset, split=data.heldout_split)
    heldout = heldout[: data.heldout_limit]
    return (
        _encode(train, dropped, kind, tokenizer, max_tokens, f"{data.train}: training"),
        _encode(heldout, heldout_dropped, kind, tokenizer, max_tokens, f"{source}: held-out"),
    )


def _encode(
    rows: list[Any], dropped: Counter[str], kind: Kind, tokenizer: Tokenizer, max_tokens: int, name: str
) -> list[Any]:
    items, too_long = ENCODERS[kind](rows, tokenizer, max_tokens)
    dropped = dropped + too_long
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    dist.print0(f"{name} rows: {len(items)}" + (f" (dropped: {counts})" if counts else ""))
    if not items:
        raise UserError(f"{name} set is empty ({counts or 'no rows'}); give more rows or a larger token limit")
    return items
