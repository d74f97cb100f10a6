"""Shows what a step will train on: `tristage data show` and `tristage data check`."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tristage.config import RunSettings
from tristage.data.collate import collate_sft
from tristage.data.sets import Part, load_parts, load_sets, notes, overlap, why_empty
from tristage.data.store import Rows, concatenate
from tristage.data.template import Tokenizer
from tristage.data.tokenize import Example

STYLES = {"special": "bold magenta", "trained": "green", "prompt": "cyan"}
KINDS_SHOWN = 20  # of malformed rows
PLACES_SHOWN = 3  # rows named for each reason; the file has the rest


def show(settings: RunSettings, tokenizer: Tokenizer, num_rows: int, heldout: bool, console: Console) -> None:
    """Print rows as the step sees them: what it reads in one colour, what it learns or scores in another.

    Without colours, learned text is in ⟦ ⟧. Special tokens are shown as written.
    """
    rows = load_sets(settings, tokenizer, check=False)[int(heldout)]
    if not len(rows):
        console.print(why_empty("held-out" if heldout else "training", settings))
    learned = {"sft": "learned", "ranking": "scored", "prompt": "(none: answers are sampled)"}[settings.kind]
    legend = Text.assemble(("read", STYLES["prompt"]), "  ", (learned, STYLES["trained"]), "  ")
    console.print(legend.append("special token", STYLES["special"]))
    for i in range(min(num_rows, len(rows))):
        console.rule(f"{rows.where(i)}   {rows.lengths[i]} tokens", align="left")
        for heading, example in _examples(rows[i]):
            if heading:
                console.print(heading, style="bold")
            console.print(_colour(example, tokenizer, not console.color_system), soft_wrap=True)


def _examples(item: Any) -> Iterator[tuple[str, Example]]:
    if isinstance(item, Example):
        yield "", item
        return
    examples, ranks = item
    for rank, example in sorted(zip(ranks, examples, strict=True), key=lambda pair: pair[0]):
        yield f"rank {rank:g}", example


def _colour(example: Example, tokenizer: Tokenizer, plain: bool) -> Text:
    trained = collate_sft([example], 0).loss_mask[0].tolist()
    special = set(tokenizer.all_special_ids)
    text = Text()
    for learned, tokens in itertools.groupby(zip(example.ids, trained, strict=True), key=lambda pair: pair[1]):
        text.append("⟦" if plain and learned else "")
        for is_special, run in itertools.groupby((token for token, _ in tokens), key=special.__contains__):
            style = STYLES["special" if is_special else "trained" if learned else "prompt"]
            text.append(tokenizer.decode(list(run), skip_special_tokens=False), style)
        text.append("⟧" if plain and learned else "")
    return text


def check(settings: RunSettings, tokenizer: Tokenizer, console: Console) -> list[str]:
    """Read all rows, print statistics, and return what must be fixed before training, one sentence each.

    It does not stop at malformed rows, whatever `on_bad_row` is: it reports all of them.
    """
    sides = dict(zip(("training", "held-out"), load_parts(settings, tokenizer, skip_bad=True), strict=True))
    joined = {side: concatenate([part.rows for part in parts]) for side, parts in sides.items()}
    problems = []
    console.print(_lengths_table(sides, settings))
    seen: set[str] = set()
    for part in itertools.chain(*sides.values()):
        if str(part.prepared.report) not in seen:  # held-out rows may be split off the same source
            seen.add(str(part.prepared.report))
            problems += _left_out(part, settings, console)
    for side, rows in joined.items():
        if not len(rows) and not problems:  # malformed rows are the reason that was already given
            problems.append(why_empty(side, settings))
        _duplicates(side, rows, settings, console)
    shared = np.flatnonzero(overlap(joined["training"], joined["held-out"]))
    if len(shared):
        places = ", ".join(joined["training"].where(int(i)) for i in shared[:PLACES_SHOWN])
        sentence = f"{len(shared)} training rows have a prompt that is held out ({places})"
        console.print(sentence)
        if settings.data.heldout_overlap == "error":
            problems.append(f"{sentence}; set `data.heldout_overlap: drop` to leave them out, or `allow`")
    return problems


def _lengths_table(sides: dict[str, list[Part]], settings: RunSettings) -> Table:
    table = Table(title=f"rows and their tokens; the limit is {settings.row_tokens} ({settings.data.too_long})")
    for heading in ("set", "source"):
        table.add_column(heading)
    for heading in ("rows", "5 %", "50 %", "95 %", "99 %", "longest", "truncated"):
        table.add_column(heading, justify="right")
    for side, parts in sides.items():
        for part in parts:
            full = part.rows.column("full_length")
            points = [f"{p:.0f}" for p in np.percentile(full, [5, 50, 95, 99, 100])] if len(full) else ["-"] * 5
            truncated = int((full > part.rows.lengths).sum())
            table.add_row(side, Path(part.name).name, str(len(part.rows)), *points, str(truncated))
    return table


def _left_out(part: Part, settings: RunSettings, console: Console) -> list[str]:
    """Print the unused rows of a source, by reason; returns what must be fixed (malformed rows)."""
    places: dict[str, list[str]] = defaultdict(list)
    bad: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in part.prepared.left_out():
        if line["bad"]:
            bad[re.sub(r"\d+", "#", _sentence(line))].append(line)
        else:
            places[line["reason"]].append(line["where"].removeprefix(part.name))
    for reason, rows in places.items():
        more = ", ..." if len(rows) > PLACES_SHOWN else ""
        console.print(f"{part.name}: {len(rows)} dropped: {reason} ({', '.join(rows[:PLACES_SHOWN])}{more})")
    all_alike = len(bad) == 1 and not len(part.prepared.rows) and not places
    for alike in list(bad.values())[: 0 if all_alike else KINDS_SHOWN]:
        console.print(f"malformed: {_place(alike, part)}: {_sentence(alike[0])}")
    for sentence in notes(part):
        console.print(sentence)
    if bad or places:
        console.print(f"every row that is not used: {part.prepared.report}")
    if all_alike:
        (alike,) = bad.values()
        return [f"{part.name}: no row can be read, {_place(alike, part)}: {_sentence(alike[0])}"]
    if bad and (part.source.on_bad_row or settings.data.on_bad_row) == "error":
        count = sum(map(len, bad.values()))
        return [f"{part.name}: {count} malformed rows; fix them, or set `data.on_bad_row: skip`"]
    return []


def _sentence(line: dict[str, str]) -> str:
    return line["reason"].removeprefix(f"{line['where']}: ")


def _place(lines: list[dict[str, str]], part: Part) -> str:
    """The place of one malformed row, or the number of rows that fail alike and the first places."""
    if len(lines) == 1:
        return lines[0]["where"]
    first = ", ".join(line["where"].removeprefix(part.name) for line in lines[:PLACES_SHOWN])
    return f"{len(lines)} rows ({first}{', ...' if len(lines) > PLACES_SHOWN else ''})"


def _duplicates(side: str, rows: Rows, settings: RunSettings, console: Console) -> None:
    for name, column in (("row", "row_hash"), ("prompt", "prompt_hash")):
        if settings.kind == "prompt" and name == "row":
            continue  # a row is its prompt
        values = rows.column(column)
        _, first = np.unique(values, return_index=True)
        again = np.setdiff1d(np.arange(len(values)), first)
        if len(again):
            places = ", ".join(rows.where(int(i)) for i in again[:PLACES_SHOWN])
            console.print(f"{side}: {len(again)} rows repeat an earlier {name} ({places})")


__all__ = ["check", "show"]
