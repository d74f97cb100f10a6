"""Raw rows (local files, saved datasets, hub sets) to typed text.

A row is read by its columns, the richest layout first (see `LAYOUTS`; other columns are ignored), and serves
every simpler step: a ranking row gives a demonstration (its best answer) and a prompt. What a user can mend
(broken JSON, a missing column, an empty answer) is an error that names the row. What published sets are known
to contain and nobody can mend (see `_Unusable`) is dropped and counted, alike for every step, so that all
steps see the same rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tristage.errors import UserError

Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Kind = Literal["sft", "ranking", "prompt"]

ROLES = ("system", "user", "assistant")
DIALOGUE_START = "\n\nHuman:"
_DIALOGUE_MARKER = re.compile(r"\n\n(Human|Assistant):")
_DIALOGUE_ROLES = {"Human": "user", "Assistant": "assistant"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".arrow", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class PromptRow:
    """A dialogue that waits for the assistant's turn."""

    prompt: tuple[Turn, ...]
    where: str  # "file:line", or "id[split]:index" for a hub set


@dataclass(frozen=True)
class SFTRow:
    """A prompt and the answer to imitate."""

    prompt: tuple[Turn, ...]
    response: str
    where: str


@dataclass(frozen=True)
class RankingRow:
    """A prompt and two or more answers, ranks[i] of answers[i]; 0 is best."""

    prompt: tuple[Turn, ...]
    answers: tuple[str, ...]
    ranks: tuple[float, ...]  # one an answer, 0 is the best
    where: str


Row = PromptRow | SFTRow | RankingRow
RowType = TypeVar("RowType", PromptRow, SFTRow, RankingRow)


class _Unusable(Exception):
    """The row is well formed but teaches nothing or cannot be split; the message is the reason to count."""


def read_rows(
    source: str, kind: Kind, *, subset: str | None = None, split: str = "train", limit: int | None = None
) -> tuple[list[Any], Counter[str]]:
    """The first `limit` usable rows of `source`, and how many were dropped by reason.

    `source` is a .json, .jsonl or .jsonl.gz file, a folder written by `datasets.save_to_disk`, or a hub id
    such as "Anthropic/hh-rlhf" (`subset` is a folder inside it). `split` matters where the source has splits.
    The rows are PromptRow, SFTRow or RankingRow, as `kind` says.
    """
    rows: list[Any] = []
    dropped: Counter[str] = Counter()
    for where, raw in _read_raw(source, subset, split):
        if len(rows) == limit:
            break
        try:
            rows.append(_serve(_parse(raw, where), kind))
        except _Unusable as reason:
            dropped[str(reason)] += 1
    if not rows:
        raise UserError(f"{source}: no usable row (dropped: {dict(dropped)}); give a file that has some")
    return rows, dropped


def split_heldout(rows: list[RowType], fraction: float, seed: int) -> tuple[list[RowType], list[RowType]]:
    """(train, heldout), decided row by row from a hash of its prompt.

    Rows with the same prompt fall on the same side, whatever their order and however the source grows; the
    held-out share is `fraction` only on average.
    """
    sides: tuple[list[RowType], list[RowType]] = ([], [])
    for row in rows:
        text = json.dumps([seed, row.prompt], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") < fraction * 2**64].append(row)
    return sides


# -- one raw row to typed text -----------------------------------------------------------------------------


def _parse(raw: object, where: str) -> Row:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row must be an object with named columns, found {_type_name(raw)}")
    for columns, parse in LAYOUTS:
        if all(column in raw for column in columns):
            return parse(raw, where)
    understood = "; ".join(" + ".join(columns) for columns, _ in LAYOUTS)
    raise UserError(
        f"{where}: the columns {sorted(raw)} are not understood, rename them to one of: {understood}"
    )


def _serve(row: Row, kind: Kind) -> Row:
    """`row` as the simpler type that `kind` needs."""
    if kind == "prompt":
        return PromptRow(row.prompt, row.where)
    if kind == "ranking" and isinstance(row, RankingRow):
        return row
    if kind == "sft" and isinstance(row, SFTRow):
        return row
    if kind == "sft" and isinstance(row, RankingRow):
        best = row.ranks.index(min(row.ranks))
        return SFTRow(row.prompt, row.answers[best], row.where)
    needed = {
        "ranking": "ranked answers (prompt + chosen + rejected)",
        "sft": "an answer (prompt + response)",
    }
    found = "a prompt and one answer" if isinstance(row, SFTRow) else "a prompt"
    raise UserError(f"{row.where}: this step needs {needed[kind]} in every row, found only {found}")


def _parse_pair(raw: dict[str, Any], where: str) -> RankingRow:
    answers = (_text(raw["chosen"], "chosen", where), _text(raw["rejected"], "rejected", where))
    return _ranking_row(_prompt(raw["prompt"], where), answers, (0.0, 1.0), where)


def _parse_ranked(raw: dict[str, Any], where: str) -> RankingRow:
    responses, ranks = raw["responses"], raw["ranks"]
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(responses) != len(ranks):
        raise UserError(f"{where}: `responses` and `ranks` must be two lists of the same length")
    if len(responses) < 2:
        raise UserError(f"{where}: `responses` has {len(responses)} answer, give 2 or remove the row")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
            raise UserError(f"{where}: `ranks` must be finite numbers (0 = best), found {rank!r}")
    answers = tuple(_text(answer, f"responses[{i}]", where) for i, answer in enumerate(responses))
    return _ranking_row(_prompt(raw["prompt"], where), answers, tuple(map(float, ranks)), where)


def _parse_dialogue_pair(raw: dict[str, Any], where: str) -> RankingRow:
    """Two whole dialogues in the layout of Anthropic's HH set; the turns they share are the prompt."""
    dialogues = []
    for column in ("chosen", "rejected"):
        text = _text(raw[column], column, where)
        if not text.startswith(DIALOGUE_START):
            raise UserError(
                f"{where}: `{column}` without a `prompt` column must be a whole dialogue "
                f"that starts with {DIALOGUE_START!r}, add a `prompt` column"
            )
        dialogues.append(_dialogue_turns(text))
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        raise _Unusable("dialogues differ before the last turn")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise _Unusable("dialogue does not end with an answer")
    if any(not turn["content"].strip() for turn in (*chosen, rejected[-1])):
        raise _Unusable("dialogue with an empty turn")
    return _ranking_row(chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"]), (0.0, 1.0), where)


def _parse_demonstration(raw: dict[str, Any], where: str) -> SFTRow:
    return SFTRow(_prompt(raw["prompt"], where), _text(raw["response"], "response", where), where)


def _parse_messages(raw: dict[str, Any], where: str) -> SFTRow:
    turns = _turns(raw["messages"], "messages", where)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: `messages` must hold a prompt and end with an assistant turn")
    return SFTRow(turns[:-1], turns[-1]["content"], where)


def _parse_prompt(raw: dict[str, Any], where: str) -> PromptRow:
    return PromptRow(_prompt(raw["prompt"], where), where)


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], Row]], ...] = (
    (("prompt", "chosen", "rejected"), _parse_pair),
    (("prompt", "responses", "ranks"), _parse_ranked),
    (("chosen", "rejected"), _parse_dialogue_pair),
    (("prompt", "response"), _parse_demonstration),
    (("messages",), _parse_messages),
    (("prompt",), _parse_prompt),
)


def _ranking_row(
    prompt: tuple[Turn, ...], answers: tuple[str, ...], ranks: tuple[float, ...], where: str
) -> RankingRow:
    if len(set(answers)) == 1:
        raise _Unusable("identical answers")
    if len(set(ranks)) == 1:
        raise _Unusable("all answers ranked equal")
    return RankingRow(prompt, answers, ranks, where)


def _prompt(value: object, where: str) -> tuple[Turn, ...]:
    """Messages, a dialogue in the HH layout (an open "Assistant:" at its end is cut), or one user turn."""
    if isinstance(value, list):
        turns = _turns(value, "prompt", where)
        if not turns or turns[-1]["role"] != "user":
            raise UserError(f"{where}: `prompt` as a list of messages must end with a user turn")
        return turns
    text = _text(value, "prompt", where)
    if not text.startswith(DIALOGUE_START):
        return ({"role": "user", "content": text},)
    turns = _dialogue_turns(text)
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    if any(not turn["content"].strip() for turn in turns):
        raise _Unusable("dialogue with an empty turn")
    return turns


def _dialogue_turns(text: str) -> tuple[Turn, ...]:
    """Exactly one space after each marker belongs to the layout, all other whitespace to the turn."""
    _, *parts = _DIALOGUE_MARKER.split(text)
    return tuple(
        {"role": _DIALOGUE_ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _turns(value: object, column: str, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: `{column}` must be a list of messages, found {_type_name(value)}")
    turns = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: `{column}[{i}]` must be an object with a role of {', '.join(ROLES)}")
        content = _text(message.get("content"), f"{column}[{i}].content", where)
        turns.append({"role": message["role"], "content": content})
    return tuple(turns)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` must be text, found {_type_name(value)}")
    if not value.strip():
        raise UserError(f"{where}: `{name}` is empty, fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `{name}` has half a surrogate pair at {error.start}, remove it") from error
    return value


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


# -- a source to raw rows ----------------------------------------------------------------------------------


def _read_raw(source: str, subset: str | None, split: str) -> Iterator[tuple[str, object]]:
    """(where, raw row) pairs of a source of any form."""
    path = Path(source)
    if not path.exists():
        if not _HUB_ID.fullmatch(source) or path.suffix in _FILE_SUFFIXES:
            raise UserError(f"{source}: there is no such file or folder, correct the path")
        return _hub_rows(source, subset, split)
    if subset is not None:
        raise UserError(f"{source}: `subset` = {subset!r} is for hub sets only, point at the file itself")
    if path.is_dir():
        return _saved_rows(source, split)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_rows(path)
    if path.suffix == ".json":
        return _json_rows(path)
    raise UserError(f"{source}: cannot read {path.suffix or 'such'} files, give .json, .jsonl or .jsonl.gz")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if text := line.rstrip():
                    yield f"{path}:{number}", _load_json(text, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}:{number + 1}: the gzip stream breaks here ({error}), copy it again"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = _load_json(path.read_bytes(), path, first_line=1)
    if not isinstance(rows, list):
        raise UserError(
            f"{path}:1: a .json file must hold one list of rows, found {_type_name(rows)}; "
            "name it .jsonl if it has one row a line"
        )
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row


def _load_json(data: bytes, path: Path, first_line: int) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8, convert it") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        problem = f"{error.msg} at column {error.colno}"
        raise UserError(f"{path}:{line}: not JSON ({problem}), mend the line") from error


def _saved_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets  # here and below: it takes a second to import, and plain files do not need it

    try:
        saved = datasets.load_from_disk(source)
    except FileNotFoundError as error:
        raise UserError(f"{source}: not a folder of datasets.save_to_disk, give a data file") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{source}: there is no split {split!r}, choose one of {', '.join(saved)}")
        saved = saved[split]
    for i, row in enumerate(saved):
        yield f"{source}:{i}", row


def _hub_rows(source: str, subset: str | None, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, data_dir=subset, split=split)
    except Exception as error:  # no network, login, set or split: each library has its own
        raise UserError(
            f"{source}: no such path here, and as a hub set it failed (subset {subset!r}, split "
            f"{split!r}): {error}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source}[{split}]:{i}", row
