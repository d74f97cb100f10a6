"""Reads raw rows, each with its place, from files, folders, saved data sets and hub sets.

A JSON line stays bytes here, so that the worker that parses the row also decodes it. A row of more than `max_row_bytes`
becomes an error in its place, and no more than that of a line is ever held in memory. (A `.json` file is one list,
which is read completely.)
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from pydantic import ValidationError

from tristage.config import MAX_ROW_BYTES, RunSettings, SourceSettings, find_file
from tristage.config.problems import explain
from tristage.data import hub
from tristage.errors import UserError

# A JSON line, a row that its format has already decoded, or the reason why there is none.
Payload = bytes | dict[str, Any] | UserError | object
SourceRow = tuple[str, Payload]  # its place ("file:line" or "file[index]"), and its content

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt")
LFS_POINTER = b"version https://git-lfs"  # start of a file that Git LFS has not fetched
HUB_SECONDS = 5.0  # for the hub to answer at all
EXTRA_CELLS_KEY = "(more cells than columns)"  # key of the surplus cells of a CSV row
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|training|test|testing|eval|valid|validation|val|dev)(?=$|[^a-z])")
_SAME_SPLIT = {"training": "train", "testing": "test", "eval": "test", "valid": "validation", "val": "validation"}
_SAME_SPLIT["dev"] = "validation"


@dataclass(frozen=True)
class OpenSource:
    """A source that exists; none of its rows have been read yet."""

    name: str  # for messages
    settings: SourceSettings
    max_row_bytes: int
    rows: Callable[[], Iterator[SourceRow]]
    content: Callable[[], str]  # a hash of every byte of it


def resolve_preset(source: SourceSettings, settings: RunSettings) -> SourceSettings:
    """`source`, completed by its preset for keys that it does not set itself.

    Raises:
        UserError: no such preset, keys that a source does not have, or still no path.
    """
    if source.preset is not None:
        file = find_file(source.preset, settings, "data.*.preset")
        try:
            values = yaml.safe_load(file.read_text())
            values |= source.model_dump(exclude_unset=True)
            source = SourceSettings.model_validate(values)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise UserError(f"{file}: not a preset: {str(error).splitlines()[0]}; write `key: value` lines") from None
        except ValidationError as error:
            raise UserError("\n".join(f"{file}: {line}" for line in explain(error, SourceSettings).values())) from None
    if source.path is None:
        raise UserError(f"{settings.file}: a source of `data` has no `path`, give it or a `preset` that has one")
    for rule in source.clean:
        try:
            re.sub(rule.pattern, rule.replacement, "")
        except (re.error, IndexError) as error:  # IndexError: the replacement names a group that does not exist
            raise UserError(f"{source.path}: `clean` pattern {rule.pattern!r} is not valid ({error})") from None
    return source


def require_exists(source: SourceSettings) -> None:
    """Raises UserError if `source` is neither a file, a folder nor the id of a hub set."""
    path = Path(str(source.path))
    is_id = _HUB_ID.fullmatch(str(source.path)) and not path.name.endswith((*SUFFIXES, ".gz", ".arrow"))
    if not path.exists() and not is_id:
        raise UserError(f"{source.path}: there is no such file or folder, correct the path")


def open_source(source: SourceSettings, max_row_bytes: int = MAX_ROW_BYTES) -> OpenSource:
    """Open `source`, whatever it is. Raises UserError if it does not exist or cannot be read."""
    rows, content = _find(source, max_row_bytes)
    return OpenSource(str(source.path), source, max_row_bytes, lambda: _within(rows(), max_row_bytes), content)


Found = tuple[Callable[[], Iterator[SourceRow]], Callable[[], str]]  # `rows` and `content` of an OpenSource


def _find(source: SourceSettings, max_row_bytes: int) -> Found:
    require_exists(source)
    path = Path(str(source.path))
    if not path.exists():
        return _hub_source(source)
    if source.subset is not None:
        path = path / source.subset
        if not path.is_dir():
            raise UserError(f"{source.path}: there is no folder {source.subset!r} in it, correct `subset`")
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_source(path, source)
        if source.name is not None or _describes_its_files(path):
            return _hub_source(source)
        files = _files_of_split(path, source.split)
    else:
        files = [path]
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: cannot read {file.suffix or 'such'} files, give one of {', '.join(SUFFIXES)}")
        _refuse_pointer(file)
    return (lambda: (place for file in files for place in _file_rows(file, max_row_bytes))), lambda: _hash_files(files)


# -- the limit ---------------------------------------------------------------------------------------------


def row_bytes(payload: object) -> int:
    """Bytes of text in a row, its column names included; other values count as 8."""
    if isinstance(payload, str):
        return len(payload) if payload.isascii() else len(payload.encode(errors="surrogatepass"))
    if isinstance(payload, bytes):
        return len(payload)
    if isinstance(payload, dict):
        return sum(row_bytes(name) + row_bytes(value) for name, value in payload.items())
    if isinstance(payload, (list, tuple)):
        return sum(map(row_bytes, payload))
    return 8


def _within(rows: Iterator[SourceRow], max_row_bytes: int) -> Iterator[SourceRow]:
    for where, payload in rows:
        yield where, payload if row_bytes(payload) <= max_row_bytes else _too_large(where, max_row_bytes)


def _too_large(where: str, max_row_bytes: int) -> UserError:
    return UserError(f"{where}: a row of more than {max_row_bytes} bytes, shorten it or raise `data.max_row_bytes`")


# -- folders -----------------------------------------------------------------------------------------------


def _describes_its_files(folder: Path) -> bool:
    """Whether the folder has a hub set's README that assigns files to splits."""
    readme = folder / "README.md"
    return (
        readme.is_file() and re.search(r"^(configs|data_files):", readme.read_text(errors="replace"), re.M) is not None
    )


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Data files of `split`, by their names ("train-00000.parquet", "test/rows.jsonl"); all if no name has a split."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES[:-1]))
    files = files or sorted(folder.rglob("*.txt"))
    if not files:
        raise UserError(f"{folder}: no data file in this folder, give one of {', '.join(SUFFIXES)}")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        found = _SPLIT_IN_NAME.findall(str(file.relative_to(folder)).lower())
        by_split.setdefault(_SAME_SPLIT.get(found[-1], found[-1]) if found else None, []).append(file)
    if set(by_split) == {None}:
        return files
    wanted = _SAME_SPLIT.get(split, split)
    if wanted not in by_split:
        there = ", ".join(sorted(str(name) for name in by_split if name is not None))
        raise UserError(f"{folder}: there is no split {split!r}, choose one of {there}")
    return by_split[wanted]


# -- files -------------------------------------------------------------------------------------------------


def _hash_files(files: Sequence[Path]) -> str:
    """A hash of names and contents. 1 GB takes about a second."""
    whole = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}), check the file") from error
        whole.update(file.name.encode() + digest.digest())
    return whole.hexdigest()


def _hash_folder(folder: Path) -> str:
    """A hash of all files in it that are not hidden, with their paths."""
    paths = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    seen = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    contents = _hash_files([folder / path for path in seen])
    return hashlib.sha256("\n".join([contents, *map(str, seen)]).encode()).hexdigest()


def content_on_disk(source: SourceSettings) -> str:
    """A hash of the bytes of a source's file or folder, which is not opened; "" of a data set on the hub."""
    path = Path(str(source.path))
    if path.is_dir():
        return _hash_folder(path)
    return _hash_files([path]) if path.exists() else ""


def _digest(stream: Any) -> Any:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest


def _refuse_pointer(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("rb") as stream:  # an unreadable file is reported later
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{file}: is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned")


def _file_rows(file: Path, max_row_bytes: int) -> Iterator[SourceRow]:
    try:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(file, max_row_bytes)
        elif file.suffix == ".json":
            yield from _json_rows(file)
        elif file.suffix in (".csv", ".tsv"):
            yield from _csv_rows(file, max_row_bytes)
        elif file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.stat().st_size > max_row_bytes:
            yield f"{file}:1", _too_large(f"{file}:1", max_row_bytes)
        else:
            yield f"{file}:1", {"text": _decode(file.read_bytes(), file, 1)}
    except OSError as error:
        problem = error.strerror or " ".join(str(error).split())  # Arrow's have a line break
        raise UserError(f"{file}: cannot be read ({problem}), check the file") from error


def _jsonl_rows(file: Path, max_row_bytes: int) -> Iterator[SourceRow]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            while line := stream.readline(max_row_bytes + 1):
                number += 1
                if len(line) > max_row_bytes and not line.endswith(b"\n"):
                    yield f"{file}:{number}", _too_large(f"{file}:{number}", max_row_bytes)
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(1 << 20)
                elif text := line.rstrip():
                    yield f"{file}:{number}", text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}:{number + 1}: the gzip stream breaks here ({error}), copy it again") from error


def _json_rows(file: Path) -> Iterator[SourceRow]:
    rows = load_json(file.read_bytes(), f"{file}:1")
    if not isinstance(rows, list):
        raise UserError(
            f"{file}:1: a .json file must hold one list of rows, found {type(rows).__name__}; "
            "name it .jsonl if it has one row per line"
        )
    for i, row in enumerate(rows):
        yield f"{file}[{i}]", row


def _csv_rows(file: Path, max_row_bytes: int) -> Iterator[SourceRow]:
    """The first line names the columns; every cell is text. A cell or line that is too large ends the file."""
    csv.field_size_limit(max_row_bytes)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    last = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = iter(lambda: stream.readline(max_row_bytes + 1), "")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next((cells for cells in reader if cells), [])
            last = reader.line_num
            for cells in reader:
                if cells:  # not a blank line
                    row: dict[str, Any] = dict(itertools.zip_longest(names, cells[: len(names)]))
                    more = {EXTRA_CELLS_KEY: cells[len(names) :]} if len(cells) > len(names) else {}
                    yield f"{file}:{last + 1}", row | more
                last = reader.line_num
    except UnicodeDecodeError as error:
        _decode(file.read_bytes(), file, 1)
        raise AssertionError(f"{file}: decoding failed and then succeeded") from error
    except csv.Error as error:
        if "field limit" in str(error):  # a line is no longer than its cells
            raise _too_large(f"{file}:{last + 1}", max_row_bytes) from None
        raise UserError(f"{file}:{last + 1}: not {file.suffix[1:]} ({error}), fix the line") from error


def _parquet_rows(file: Path) -> Iterator[SourceRow]:
    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=128):
            for row in batch.to_pylist():
                yield f"{file}[{index}]", row
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}[{index}]: not readable as Parquet ({error}), write it again") from error


def _decode(data: bytes, file: Path | str, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: byte {data[error.start]:#04x} is not UTF-8, convert it") from error


def load_json(data: bytes, where: str) -> object:
    """`data`, whose first line is at `where` ("file:line"), as JSON. Raises UserError that names the line."""
    file, _, line = where.rpartition(":")
    text = _decode(data, file, int(line))
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _KeyTwice as error:
        raise UserError(f"{where}: the key {str(error)!r} is in one object twice, remove one of them") from None
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise UserError(f"{file}:{int(line) + error.lineno - 1}: not JSON ({problem}), fix the line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
        raise UserError(f"{where}: not JSON that can be read ({error}), fix the line") from error


class _KeyTwice(ValueError):
    """The message is the key. Python's json would silently take the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _KeyTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return values


# -- saved and hub sets ------------------------------------------------------------------------------------


def _saved_source(path: Path, source: SourceSettings) -> Found:
    import datasets  # here and below: it takes a second to import, and plain files do not need it

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not readable as a datasets.save_to_disk folder ({error}), save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise UserError(f"{path}: there is no split {source.split!r}, choose one of {', '.join(saved)}")
        saved = saved[source.split]
    files = sorted(Path(entry["filename"]) for entry in saved.cache_files)
    return (lambda: ((f"{path}[{i}]", row) for i, row in enumerate(saved))), lambda: _hash_files(files)


def _hub_source(source: SourceSettings) -> Found:
    import datasets

    path, folder, cache, content = str(source.path), source.subset, None, None
    hub.prepare(path)
    if Path(path).is_dir():
        # The library's cache identifies a local folder by its name and README only; an edited file would not be read.
        content = _hash_folder(Path(path))
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / content)
    try:
        rows = datasets.load_dataset(path, source.name, data_dir=folder, split=source.split, cache_dir=cache)
    except Exception as error:  # no network, login, set or split: each library has its own
        if problem := hub.problem(path):
            raise UserError(problem) from error
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise UserError(
            f"{path}: could not be loaded as a hub set (name {source.name!r}, subset {folder!r}, "
            f"split {source.split!r}): {error}{cause}"
        ) from error
    where = f"{path}[{source.split}]"
    return (lambda: ((f"{where}[{i}]", row) for i, row in enumerate(rows))), lambda: content or str(rows._fingerprint)

