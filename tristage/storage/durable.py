"""Files that survive a power cut: checksums while writing, fsync of files and folders, a manifest written last.

    FOLDER/manifest.json      size and checksum of every other file, the folder's number, and a checksum of all that
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from tristage.errors import UserError

MANIFEST = "manifest.json"
CHUNK = 1 << 24
HASH_THREADS = 4


class Entry(NamedTuple):
    """Size and checksum of a file in a manifest."""

    size: int
    checksum: str  # xxh3_128


class HashingFile:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.hash = file, 0, xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash."""
        view = memoryview(data)
        for at in range(0, len(view), CHUNK):
            self.file.write(view[at : at + CHUNK])
            self.hash.update(view[at : at + CHUNK])
        self.size += len(view)

    def entry(self) -> Entry:
        return Entry(self.size, self.hash.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[HashingFile]:
    """A file to write, synced to the disk when the block ends."""
    with open(path, "wb") as file:
        yield HashingFile(file)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> Entry:
    """Write a file durably."""
    with writing(path) as file:
        file.write(text.encode())
    return file.entry()


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text atomically: it always has its old or its new text."""
    partial = path.with_name(path.name + ".partial")
    write_text(partial, text)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make durable a file's content, or what was created, renamed or deleted in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_text(files: Mapping[str, Entry], number: int) -> str:
    """The text of a manifest of these files. It is unique: any other text is damaged."""
    content = json.dumps({"number": number, "files": {name: list(files[name]) for name in sorted(files)}}, indent=1)
    return f"{xxhash.xxh3_128_hexdigest(content.encode())}\n{content}\n"


class Manifest(NamedTuple):
    """An undamaged manifest."""

    number: int
    files: dict[str, Entry]


def read_manifest(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        content: Any = json.loads(text.partition("\n")[2])
        files = {name: Entry(*entry) for name, entry in content["files"].items()}
        if manifest_text(files, content["number"]) != text:
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, as those of earlier versions, and cannot be verified"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__})"
    return Manifest(content["number"], files)


def wrong_size(folder: Path, files: Mapping[str, Entry]) -> str | None:
    """The first file that is missing or of another size."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry.size:
            return f"{name} has {size} bytes and should have {entry.size}"
    return None


def wrong_content(folder: Path, files: Mapping[str, Entry], share: int = 0, shares: int = 1) -> str | None:
    """The first damaged file of every `shares`-th, read by a few threads."""
    largest_first = sorted(files, key=lambda name: (-files[name].size, name))
    mine: Sequence[str] = largest_first[share::shares]

    def check(name: str) -> str | None:
        try:
            is_intact = checksum(folder / name) == files[name].checksum
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if is_intact else f"{name} is damaged: its checksum is wrong"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return next((problem for problem in pool.map(check, mine) if problem), None)


def checksum(path: Path) -> str:
    """xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_full(error: OSError) -> bool:
    """Whether the disk, or this user's share of it, has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn an error while writing `path` in the output folder into one sentence.

    Raises:
        UserError: the disk is full, the folder was removed, or any other error of the system.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        fix = "fix that"
        if is_full(error):
            what, fix = "the disk is full", "make room"
        elif error.errno in (errno.ENOENT, errno.ESTALE):
            what, fix = "was removed, or a folder above it, while the run wrote there", "put back what you still need"
        raise UserError(
            f"{path}: {what}; {fix} and start again: the run resumes from its newest checkpoint, if it has one"
        ) from None


def append_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file in a run's folder. Raises UserError like explain_disk_errors."""
    with explain_disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)



def remove_tree(folder: Path) -> None:
    """Delete a folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)
