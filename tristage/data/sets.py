"""A step's training and held-out sets: opened, tokenised (or read from the cache), split by prompt, checked."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tristage import dist
from tristage.config import RunSettings, SourceSettings
from tristage.data.packing import Blocks
from tristage.data.sources import open_source, resolve_preset
from tristage.data.store import PreparedSet, Rows, cache_folder, concatenate, prepare
from tristage.data.template import Tokenizer
from tristage.data.tokenize import EncodingRules
from tristage.errors import UserError

NAMES_SHOWN = 8  # of columns, or of special tokens, in one sentence


@dataclass(frozen=True)
class Part:
    """What one source gave to the training or the held-out set."""

    source: SourceSettings
    prepared: PreparedSet
    rows: Rows  # those of `prepared` that this step and side get

    @property
    def name(self) -> str:
        return str(self.source.path)


def load_sets(settings: RunSettings, tokenizer: Tokenizer, check: bool = True) -> tuple[Rows, Rows]:
    """(training, held-out) rows of a step: ranked ones for the reward model, else one example each.

    Held-out rows come from `data.heldout`, or are split off `data.train` by a hash of the prompt, so that no prompt
    is on both sides. Call it before the process group exists: the first run with these data tokenises them.

    Raises:
        UserError: unreadable sources, malformed rows; if `check`, also an empty set, or a prompt on both sides.
    """
    train, heldout = load_parts(settings, tokenizer)
    data = settings.data
    for side, parts in (("training", train), ("held-out", heldout)):
        for part in parts:
            report(part, side, with_dropped=side == "training" or bool(data.heldout))
    whole = concatenate([_weighted(part.rows, part.source.weight, data.split_seed) for part in train])
    held = concatenate([part.rows for part in heldout])[: data.heldout_limit]
    shared = overlap(whole, held)
    if shared.any():
        first = int(shared.argmax())
        if data.heldout_overlap == "error" and check:
            raise UserError(
                f"{settings.file}: {int(shared.sum())} training rows have a prompt that is held out, the first is "
                f"{whole.where(first)}; set `data.heldout_overlap: drop` to leave them out, or `allow`"
            )
        if data.heldout_overlap == "drop":
            whole = whole.take(np.flatnonzero(~shared))
            dist.print0(f"dropped {int(shared.sum())} training rows whose prompt is held out")
    for side, rows in (("training", whole), ("held-out", held)):
        if check and not len(rows):
            raise UserError(f"{settings.file}: {why_empty(side, settings)}")
    return whole, held


def why_empty(side: str, settings: RunSettings) -> str:
    """A sentence that the "training" or "held-out" set is empty, with the setting to change."""
    data = settings.data
    if side == "held-out" and not data.heldout:
        return (
            f"the held-out set is empty: no prompt of `data.train` falls in its `data.heldout_fraction`, "
            f"{data.heldout_fraction:g}; raise it, give more rows, or give `data.heldout`"
        )
    if side == "training" and data.data_split is not None:
        return f"the training set is empty: no prompt falls in this step's share of `data.data_split` {data.data_split}"
    return f"the {side} set is empty; give more rows or a larger token limit"


def load_heldout(settings: RunSettings, tokenizer: Tokenizer) -> Rows:
    """The held-out rows alone, for evaluation; training rows are read only where these are split off them."""
    if not settings.data.heldout:
        return load_sets(settings, tokenizer)[1]
    parts = _heldout_parts(settings, tokenizer, skip_bad=False)
    for part in parts:
        report(part, "held-out")
    return concatenate([part.rows for part in parts])[: settings.data.heldout_limit]


def load_parts(settings: RunSettings, tokenizer: Tokenizer, skip_bad: bool = False) -> tuple[list[Part], list[Part]]:
    """(training, held-out) parts, one per source, before anything is joined, weighted or checked."""
    data = settings.data
    whole = [_prepare(source, settings, tokenizer, _rules(settings), skip_bad, data.limit) for source in data.train]
    train = [_share(part, _in_this_steps_share(part.rows, settings)) for part in whole]
    if data.heldout:
        return train, _heldout_parts(settings, tokenizer, skip_bad)
    return train, [_share(part, _held_out(part.rows, settings)) for part in whole]


def _heldout_parts(settings: RunSettings, tokenizer: Tokenizer, skip_bad: bool) -> list[Part]:
    tokens = _rules(settings)
    return [_prepare(source, settings, tokenizer, tokens, skip_bad, None) for source in settings.data.heldout]


def _rules(settings: RunSettings) -> EncodingRules:
    data = settings.data
    return EncodingRules(settings.kind, settings.row_tokens, data.too_long, data.train_on, settings.labels)


def load_text_blocks(
    sources: Sequence[SourceSettings], settings: RunSettings, tokenizer: Tokenizer, block_tokens: int
) -> Blocks:
    """The pretraining mix: plain text of `sources`, joined and cut into blocks. Raises UserError like load_sets."""
    rules = EncodingRules("text", 0)
    parts = [_prepare(source, settings, tokenizer, rules, skip_bad=False, limit=None) for source in sources]
    return Blocks(
        concatenate([_weighted(part.rows, part.source.weight, settings.data.split_seed) for part in parts]),
        block_tokens,
    )


def overlap(train: Rows, heldout: Rows) -> np.ndarray:
    """[training rows] bool, True where the prompt is held out."""
    return np.isin(train.column("prompt_hash"), heldout.column("prompt_hash"))


def report(part: Part, side: str, with_dropped: bool = True) -> None:
    """Print how many rows a source gave. Rows split off another set leave the dropped ones to that set's line."""
    counts = [f"{count} {reason}" for reason, count in part.prepared.dropped.items()]
    truncated = int((part.rows.column("full_length") > part.rows.lengths).sum())
    words = f"{part.name}: {side} rows: {len(part.rows)}"
    if truncated:
        words += f" ({truncated} truncated)"
    if counts and with_dropped:
        words += f" (dropped: {', '.join(counts)})"
    dist.print0(words)
    if not with_dropped:
        return
    if part.prepared.bad:
        dist.print0(f"{part.name}: {part.prepared.bad} malformed rows skipped, listed in {part.prepared.report}")
    for sentence in notes(part):
        dist.print0(sentence)


def notes(part: Part) -> list[str]:
    """Sentences on content of a source that is not trained on, or not in the way one may expect."""
    unused = sorted(part.prepared.unused.items(), key=lambda column: -column[1])
    sentences = []
    if unused:
        shown = ", ".join(f"`{name}` ({count} rows)" for name, count in unused[:NAMES_SHOWN])
        more = f" and {len(unused) - NAMES_SHOWN} more" if len(unused) > NAMES_SHOWN else ""
        sentences.append(f"{part.name}: columns that are not read: {shown}{more}")
    spelled = sorted(part.prepared.spelled.items(), key=lambda token: -token[1][0])
    if spelled:
        shown = ", ".join(f"{token} ({count} rows, first {first})" for token, (count, first) in spelled[:NAMES_SHOWN])
        sentences.append(f"{part.name}: special tokens spelled out in contents, kept as plain text: {shown}")
    return sentences


def _prepare(
    source: SourceSettings,
    settings: RunSettings,
    tokenizer: Tokenizer,
    rules: EncodingRules,
    skip_bad: bool,
    limit: int | None,
) -> Part:
    data = settings.data
    source = resolve_preset(source, settings)
    source = source.model_copy(update={"limit": source.limit or limit})
    skip = skip_bad or (source.on_bad_row or data.on_bad_row) == "skip"
    cache = cache_folder(data.cache)
    opened = open_source(source, data.max_row_bytes)
    prepared = prepare(opened, tokenizer, rules, skip_bad=skip, cache=cache, workers=data.workers)
    if not len(prepared.rows) and not skip_bad:
        reasons = prepared.dropped + Counter({"malformed": prepared.bad})
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "it is empty"
        bad = next((line["reason"] for line in prepared.left_out() if line["bad"]), None)
        if bad is not None:
            raise UserError(f"{source.path}: no usable row ({counts}); the first malformed one is {bad}")
        raise UserError(f"{source.path}: no usable row ({counts}); give other rows or a larger token limit")
    return Part(source, prepared, prepared.rows)


def _share(part: Part, mine: np.ndarray) -> Part:
    return dataclasses.replace(part, rows=part.rows.take(np.flatnonzero(mine)))


def _held_out(rows: Rows, settings: RunSettings) -> np.ndarray:
    return _position(rows, "held out", settings.data.split_seed) < settings.data.heldout_fraction


def _in_this_steps_share(rows: Rows, settings: RunSettings) -> np.ndarray:
    """[rows] bool, True on rows that are not held out and are in this step's share."""
    data = settings.data
    mine = np.full(len(rows), True)
    if not data.heldout:
        mine &= ~_held_out(rows, settings)
    if data.data_split is not None:
        bounds = np.cumsum([0.0, *data.data_split]) / sum(data.data_split)
        place = _position(rows, "data_split", data.split_seed)
        mine &= (place >= bounds[settings.step - 1]) & (place < bounds[settings.step])
    return mine


def _weighted(rows: Rows, weight: float, seed: int) -> Rows:
    """int(weight) copies of all rows, and one more of a fixed share of them."""
    if weight == 1:
        return rows
    more = np.flatnonzero(_position(rows, "weight", seed) < weight % 1)
    return rows.take(np.concatenate([np.tile(np.arange(len(rows)), int(weight)), more]))


def _position(rows: Rows, purpose: str, seed: int) -> np.ndarray:
    """[rows] in [0, 1), a uniform number per prompt: it depends on neither its position nor the other rows."""
    salt = int.from_bytes(hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        z = rows.column("prompt_hash").astype(np.uint64) ^ np.uint64(salt)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


def fingerprint(sets: Sequence[Rows]) -> str:
    """A fingerprint of the tokenised data of a run, to compare between nodes."""
    taken = (hashlib.sha256(rows.column("row_hash").tobytes()).hexdigest()[:12] for rows in sets)
    return " ".join(f"{rows.fingerprint}:{len(rows)}:{which}" for rows, which in zip(sets, taken, strict=True))
