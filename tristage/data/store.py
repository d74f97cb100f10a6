"""Tokenised once, then memory-mapped: every rank of a node reads the same pages of one Arrow file.

A set is in CACHE/<key>/, where the key is a hash of everything that its tokens depend on: the bytes of the source, how
it is read, the tokenizer, its template, the encoding rules (token limit among them), and the versions of the code that
made it. It is written as <key>.partial-*, synced and renamed, so a folder with the final name is complete; a checksum
shows later damage. Sets are prepared before ranks join a process group: no rank can time out in a collective while
another tokenises.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from filelock import FileLock

import tristage
from tristage import dist
from tristage.config import SourceSettings
from tristage.data.rows import PromptRow, Row, Turn, Unusable, prompt_hash, read_row, row_hash
from tristage.data.sources import OpenSource, SourceRow, row_bytes
from tristage.data.special import spelled_in
from tristage.data.template import Tokenizer, template_fingerprint
from tristage.data.tokenize import EncodingRules, Example, Item, encode
from tristage.dist import progress
from tristage.errors import UserError

FORMAT = 5  # raise it when the schema or the meaning of a column changes
CHUNK = 512  # rows that one call of the tokenizer and one task of a worker hold
CHUNK_BYTES = 2**20  # of rows in a chunk of more than one: tokenising takes 140 to 220 times as much memory
CHUNKS_PER_BATCH = 32  # chunks that one batch of the Arrow file holds
ROWS_BEFORE_WORKERS = 16 * CHUNK  # starting processes takes seconds; a smaller set is done by then

SCHEMA = pyarrow.schema(
    {
        "ids": pyarrow.list_(pyarrow.int32()),  # of all answers, one after the other
        "lengths": pyarrow.list_(pyarrow.int32()),  # tokens of each, prompt included
        "prompt_length": pyarrow.int32(),
        "also_trained": pyarrow.list_(pyarrow.int32()),  # start, stop, start, stop, ...
        "ranks": pyarrow.list_(pyarrow.float64()),  # one per answer; empty unless ranked
        "length": pyarrow.int32(),  # of the longest answer, prompt included
        "full_length": pyarrow.int32(),  # before it was cut to the limit
        "prompt_hash": pyarrow.int64(),
        "row_hash": pyarrow.int64(),
        "where": pyarrow.string(),
        "turns": pyarrow.string(),  # JSON of a prompt's roles and texts, for models that read other tokens; else null
        "labels": pyarrow.string(),  # JSON of a prompt's other columns, for reward functions; else null
    }
)


def numbers(values: pyarrow.Array) -> np.ndarray:
    """The values of an Arrow array without nulls; pyarrow's own `to_numpy` imports pandas (0.5 CPU seconds)."""
    return np.from_dlpack(values) if len(values) else np.zeros(0, values.type.to_pandas_dtype())


class Rows(Sequence[Any]):
    """Tokenised rows, memory-mapped: an item is read from the file when it is accessed."""

    def __init__(self, table: pyarrow.Table, fingerprint: str, index: np.ndarray | None = None) -> None:
        self._table, self.fingerprint = table, fingerprint
        self._index = np.arange(table.num_rows) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Any:
        """An Example, or RankedExamples of a ranked set; of a slice, Rows."""
        if isinstance(i, slice):
            return Rows(self._table, self.fingerprint, self._index[i])
        row = int(self._index[i])
        ids, lengths, ranks, spans = (self._list(name, row) for name in ("ids", "lengths", "ranks", "also_trained"))
        prompt_length = self._table["prompt_length"][row].as_py()
        also_trained = tuple(zip(spans[::2], spans[1::2], strict=True))
        ends = list(itertools.accumulate(lengths))
        examples = [
            Example(ids[end - length : end], prompt_length, also_trained)
            for length, end in zip(lengths, ends, strict=True)
        ]
        return (examples, tuple(ranks)) if ranks else examples[0]

    def _list(self, column: str, row: int) -> list[Any]:
        return numbers(self._table[column][row].values).tolist()

    def column(self, name: str) -> np.ndarray:
        """A numeric column of SCHEMA, one number per row."""
        return numbers(self._table[name].combine_chunks())[self._index]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[rows] int32, tokens of each row's longest answer; cached: used on every access."""
        return self.column("length")

    def tokens(self, i: int, start: int, stop: int) -> list[int]:
        """ids[start:stop] of a row, without reading the rest of a long one."""
        return numbers(self._table["ids"][int(self._index[i])].values[start:stop]).tolist()

    def where(self, i: int) -> str:
        return str(self._table["where"][int(self._index[i])])

    def turns(self, i: int) -> tuple[Turn, ...]:
        """The whole prompt of a row of kind "prompt", before it was tokenised and cut to the limit."""
        return tuple(json.loads(self._table["turns"][int(self._index[i])].as_py()))

    def labels(self, i: int) -> dict[str, Any]:
        """The columns of a row of kind "prompt" that `reward.labels` names."""
        return dict(json.loads(self._table["labels"][int(self._index[i])].as_py() or "{}"))

    def take(self, index: np.ndarray) -> Rows:
        """Some of the rows, in that order; nothing is copied."""
        return Rows(self._table, self.fingerprint, self._index[index])


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Several sets as one, still mapped."""
    offsets = np.cumsum([0, *(part._table.num_rows for part in parts)])
    index = np.concatenate([part._index + offset for part, offset in zip(parts, offsets, strict=False)])
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:32]
    return Rows(pyarrow.concat_tables([part._table for part in parts]), fingerprint, index)


class PreparedSet:
    """A finished folder of the cache: its rows, and counts of those left out."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.dropped: Counter[str] = Counter(meta["dropped"])  # by reason; not the user's fault
        self.bad: int = meta["bad"]  # malformed and skipped
        self.unused: dict[str, int] = meta["unused"]  # column that no layout reads -> rows that have it
        self.spelled: dict[str, tuple[int, str]] = meta["spelled"]  # special token -> rows with its text, the first one
        self.report = folder / "left_out.jsonl"  # see left_out
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()
        self.rows = Rows(table, folder.name)

    def left_out(self) -> Iterator[dict[str, Any]]:
        """{"where", "reason", "bad"} of every row of the source that is not among `rows`, in its order."""
        with self.report.open() as lines:
            yield from map(json.loads, lines)


def cache_folder(setting: str | None) -> Path:
    """Where tokenised sets live: the setting, else $TRISTAGE_CACHE, else ~/.cache/tristage."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tristage"
    return Path(setting or os.environ.get("TRISTAGE_CACHE") or default).expanduser()


def prepare(
    source: OpenSource, tokenizer: Tokenizer, rules: EncodingRules, *, skip_bad: bool, cache: Path, workers: int = 0
) -> PreparedSet:
    """The tokenised rows of a source, from the cache, or made now by local rank 0 while other ranks wait.

    Raises:
        UserError: a malformed row (unless `skip_bad`), an unreadable source, a cache that can't be written.
    """
    key = _key(source, tokenizer, rules)
    folder = cache / key
    if dist.local_rank() != 0:
        while not _is_whole(folder):  # the launcher ends us when local rank 0 fails
            time.sleep(0.2)
        return PreparedSet(folder)
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds text; an existing folder keeps its mode
        with FileLock(cache / f"{key}.lock"):  # held by another run that prepares the same set
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                for partial in cache.glob(f"{key}.partial-*"):  # left by a killed run: this one holds the lock
                    shutil.rmtree(partial, ignore_errors=True)
                partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=cache))
                try:
                    with progress.telling(f"tokenising {source.name}"):
                        _write(partial, source, tokenizer, rules, skip_bad, workers)
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{cache}: tokenised data can't be kept here ({error}); set `data.cache`") from error
    prepared = PreparedSet(folder)
    if prepared.bad and not skip_bad:  # made by a run that skipped them
        raise UserError(next(line["reason"] for line in prepared.left_out() if line["bad"]))
    return prepared


def _is_whole(folder: Path) -> bool:
    """Whether the rows match their checksum: the folder was complete when renamed, but may have been damaged since.

    Every rank checks for itself: no rank may map rows that local rank 0 is about to make again.
    """
    try:
        meta, rows = json.loads((folder / "meta.json").read_text()), folder / "rows.arrow"
        return bool(rows.stat().st_size == meta["bytes"] and _checksum(rows) == meta["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _key(source: OpenSource, tokenizer: Tokenizer, rules: EncodingRules) -> str:
    read_by = source.settings.model_dump(exclude={"preset", "weight", "on_bad_row"}, mode="json")
    read_by["max_row_bytes"] = source.max_row_bytes
    made_by = [FORMAT, tristage.__version__, version("transformers"), version("tokenizers")]
    tokens = [template_fingerprint(tokenizer), tokenizer.bos_token, vars(rules)]
    parts = [made_by, source.content(), read_by, tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of one raw row: its columns of SCHEMA, or the reason why it has none."""

    where: str
    columns: dict[str, Any] | None
    reason: str = ""
    at_fault: bool = False  # malformed, so the user must fix it
    unused: tuple[str, ...] = ()  # columns of the raw row that no layout reads
    spelled: tuple[str, ...] = ()  # special tokens whose text is in its contents


def _write(
    folder: Path, source: OpenSource, tokenizer: Tokenizer, rules: EncodingRules, skip_bad: bool, workers: int
) -> None:
    dropped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    spelled: dict[str, tuple[int, str]] = {}
    kept = bad = 0
    limit, printed_at = source.settings.limit, time.monotonic()
    with (
        (folder / "rows.arrow").open("wb") as arrow,
        (folder / "left_out.jsonl").open("w") as left_out,
        pyarrow.ipc.new_stream(arrow, SCHEMA) as stream,
    ):
        waiting: list[pyarrow.RecordBatch] = []

        def flush() -> None:
            """Many small batches would cost memory and time when the file is mapped."""
            if waiting:
                stream.write_table(pyarrow.Table.from_batches(waiting).combine_chunks())
                waiting.clear()

        for outcomes in _outcomes(source, tokenizer, rules, workers):
            columns: list[dict[str, Any]] = []
            for row in outcomes:
                if kept + len(columns) == limit:
                    break
                if row.columns is not None:
                    columns.append(row.columns)
                    unused.update(row.unused)
                    for token in row.spelled:
                        count, first = spelled.get(token, (0, row.where))
                        spelled[token] = count + 1, first
                    continue
                if row.at_fault and not skip_bad:
                    raise UserError(row.reason)
                left_out.write(json.dumps({"where": row.where, "reason": row.reason, "bad": row.at_fault}) + "\n")
                bad += row.at_fault
                dropped[row.reason] += not row.at_fault
            if columns:
                waiting.append(pyarrow.RecordBatch.from_pylist(columns, schema=SCHEMA))
            if len(waiting) == CHUNKS_PER_BATCH:
                flush()
            kept += len(columns)
            if kept == limit:
                break
            if time.monotonic() - printed_at > 10:
                printed_at = time.monotonic()
                print(f"{source.name}: {kept} rows tokenised", flush=True)
        flush()
    rows = folder / "rows.arrow"
    of_rows = {"bytes": rows.stat().st_size, "sha256": _checksum(rows)}
    meta = {"source": source.name, "rows": kept, "dropped": +dropped, "bad": bad} | of_rows
    meta |= {"unused": unused, "spelled": spelled}
    (folder / "meta.json").write_text(json.dumps(meta))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _outcomes(source: OpenSource, tokenizer: Tokenizer, rules: EncodingRules, workers: int) -> Iterator[list[Outcome]]:
    """Chunks in the source's order; encoded by several processes once there are many rows."""
    chunks = _chunks(source.rows())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or min(cores, 32)
    first = itertools.islice(chunks, ROWS_BEFORE_WORKERS // CHUNK)
    for chunk in chunks if workers == 1 else first:
        yield encode_chunk(chunk, source.settings, tokenizer, rules)
    following = next(chunks, None)
    if following is None:
        return
    # spawn: a forked copy of a process that has threads (torch, tokenizers) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (source.settings, tokenizer, rules)) as pool:
        waiting: collections.deque[Any] = collections.deque()
        try:
            for chunk in itertools.chain([following], chunks):
                waiting.append(pool.submit(_encode_in_worker, chunk))
                if len(waiting) > 4 * workers:  # bounds what is read but not yet written
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    """At most CHUNK rows, and CHUNK_BYTES unless one row alone has more."""
    chunk: list[SourceRow] = []
    size = 0
    for place in rows:
        more = row_bytes(place[1])
        if chunk and (len(chunk) == CHUNK or size + more > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(place)
        size += more
    if chunk:
        yield chunk


_worker: tuple[SourceSettings, Tokenizer, EncodingRules]


def _start_worker(source: SourceSettings, tokenizer: Tokenizer, rules: EncodingRules) -> None:
    global _worker
    _worker = source, tokenizer, rules
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _encode_in_worker(chunk: list[SourceRow]) -> list[Outcome]:
    return encode_chunk(chunk, *_worker)


def encode_chunk(
    chunk: Sequence[SourceRow], source: SourceSettings, tokenizer: Tokenizer, rules: EncodingRules
) -> list[Outcome]:
    """The outcome of each raw row, in order."""
    read: list[Row | Exception] = []
    for place in chunk:
        try:
            read.append(read_row(place, source, rules.kind, rules.labels))
        except (UserError, Unusable) as reason:
            read.append(reason)
    encoded = iter(encode([row for row in read if not isinstance(row, Exception)], tokenizer, rules))
    outcomes: list[Outcome] = []
    for (where, _), row in zip(chunk, read, strict=True):
        found = row if isinstance(row, Exception) else next(encoded)
        if isinstance(found, Exception):
            outcomes.append(Outcome(where, None, str(found), isinstance(found, UserError)))
        else:
            assert not isinstance(row, Exception)
            columns = _columns(*found) | {"prompt_hash": prompt_hash(row), "row_hash": row_hash(row), "where": where}
            if isinstance(row, PromptRow):
                columns["turns"] = json.dumps(row.prompt, ensure_ascii=False)
                columns["labels"] = json.dumps(row.labels, ensure_ascii=False) if row.labels else None
            outcomes.append(Outcome(where, columns, unused=row.unused, spelled=tuple(spelled_in(row, tokenizer))))
    return outcomes


def _columns(item: Item, full_length: int) -> dict[str, Any]:
    examples, ranks = item if isinstance(item, tuple) else ([item], ())
    return {
        "ids": [token for example in examples for token in example.ids],
        "lengths": [len(example.ids) for example in examples],
        "prompt_length": examples[0].prompt_length,
        "also_trained": [place for span in examples[0].also_trained for place in span],
        "ranks": list(ranks),
        "length": max(len(example.ids) for example in examples),
        "full_length": full_length,
    }
