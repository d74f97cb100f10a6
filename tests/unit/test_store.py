"""A set is tokenised once and whole, is made again when anything it depends on changes, and gives back its rows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch

from tests.helpers.tokenizers import word_tokenizer
from tristage import dist
from tristage.config import SourceSettings
from tristage.data import store
from tristage.data.rows import read_row
from tristage.data.sources import open_source
from tristage.data.store import PreparedSet, cache_folder, concatenate, prepare
from tristage.data.tokenize import EncodingRules, Example, encode
from tristage.errors import UserError

WORDS = ("Human:", "Assistant:", "a", "b", "c", "d")  # 2 3 4 5 6 7
TOKENIZER = word_tokenizer(*WORDS)
SFT = EncodingRules("sft", 20)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


DEMONSTRATIONS = [
    {"prompt": "a", "response": "b"},  # 2 4 3 | 5 1
    {"prompt": chat("a", "b c", "d"), "response": "a"},  # 2 4 3 [5 6 1] 2 7 3 | 4 1
    {"prompt": "b", "response": "c d a"},  # 2 5 3 | 6 7 4 1
    {"prompt": "a", "response": "c"},  # 2 4 3 | 6 1
]
RANKINGS = [
    {"prompt": "a", "responses": ["b", "c d", "d"], "ranks": [2, 0, 1]},
    {"prompt": "b", "chosen": "a", "rejected": "c d a"},
]
BAD = [
    {"prompt": "a", "response": "b"},
    {"prompt": "", "response": "b"},  # malformed
    {"prompt": "a"},  # malformed for SFT
    {"prompt": "c", "chosen": "a", "rejected": "a"},  # of no use
    {"prompt": "c", "response": "d"},
    {"prompt": "d", "response": "a " * 30},  # too long
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", DEMONSTRATIONS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the thread of each call that tokenises."""
    made: list[str] = []

    def counted(*arguments):
        made.append(threading.current_thread().name)
        return encode_chunk(*arguments)

    encode_chunk = store.encode_chunk
    monkeypatch.setattr(store, "encode_chunk", counted)
    return made


def prepared(file: Path, tokenizer=TOKENIZER, policy=SFT, skip_bad=False, workers=1, **source) -> PreparedSet:
    opened = open_source(SourceSettings(path=str(file), **source))
    return prepare(opened, tokenizer, policy, skip_bad=skip_bad, cache=file.parent / "cache", workers=workers)


def folders(file: Path) -> list[str]:
    return sorted(path.name for path in (file.parent / "cache").iterdir() if path.is_dir())


# -- when a set is made ------------------------------------------------------------------------------------


def test_the_same_set_is_tokenised_once(file, calls):
    first, second = prepared(file), prepared(file)
    assert len(calls) == 1 and list(first.rows) == list(second.rows)
    assert first.rows.fingerprint == second.rows.fingerprint and folders(file) == [first.rows.fingerprint]


def test_what_says_nothing_about_the_tokens_of_a_row_makes_no_other_set(file, calls):
    prepared(file)
    prepared(file, weight=2.0, on_bad_row="skip", skip_bad=True, workers=2)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": word_tokenizer(*reversed(WORDS))},
        {"policy": EncodingRules("prompt", 20)},
        {"policy": EncodingRules("sft", 21)},
        {"policy": EncodingRules("sft", 20, too_long="truncate_left")},
        {"policy": EncodingRules("sft", 20, train_on="last_answer")},
        {"limit": 4},
        {"columns": {"prompt": "prompt", "response": "response"}},
        {"clean": [{"columns": ["prompt"], "pattern": "x"}]},
    ],
    ids=["tokenizer", "kind", "limit of tokens", "too_long", "train_on", "limit of rows", "columns", "clean"],
)
def test_another_way_to_read_or_cut_rows_makes_another_set(file, calls, change):
    assert prepared(file).rows.fingerprint != prepared(file, **change).rows.fingerprint
    assert len(calls) == 2 and len(folders(file)) == 2


def test_another_template_or_format_makes_another_set(file, calls, monkeypatch):
    other = word_tokenizer(*WORDS)
    other.chat_template += "{# a remark #}"
    found = [prepared(file), prepared(file, tokenizer=other)]
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    found.append(prepared(file))
    assert len({each.rows.fingerprint for each in found}) == len(calls) == 3


def test_a_changed_file_of_the_same_size_and_time_is_not_served_stale(file, calls):
    before, times = prepared(file), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    size = file.stat().st_size
    write(file, [{"prompt": "a", "response": "d"}, *DEMONSTRATIONS[1:]])
    os.utime(file, ns=times)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (size, times[1])
    after = prepared(file)
    assert [before.rows[0].ids, after.rows[0].ids] == [[2, 4, 3, 5, 1], [2, 4, 3, 7, 1]] and len(calls) == 2


# -- what comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, policy",
    [
        (DEMONSTRATIONS, SFT),
        (DEMONSTRATIONS, EncodingRules("sft", 8, "truncate_left")),
        (DEMONSTRATIONS, EncodingRules("prompt", 20)),
        (RANKINGS, EncodingRules("ranking", 20)),
        ([{"text": "a b"}, {"text": "c"}, {"text": "d " * 30}], EncodingRules("text", 0)),
    ],
    ids=["sft", "truncated", "prompt", "ranking", "text"],
)
def test_items_come_back_as_they_were_encoded(tmp_path, monkeypatch, rows, policy):
    monkeypatch.setattr(store, "CHUNK", 2)
    monkeypatch.setattr(store, "CHUNKS_PER_BATCH", 1)  # several Arrow batches
    file = write(tmp_path / "rows.jsonl", rows)
    source = SourceSettings(path=str(file))
    read = [read_row(place, source, policy.kind) for place in open_source(source).rows()]
    found = prepared(file, policy=policy).rows
    assert [(found[i], found.column("full_length")[i]) for i in range(len(found))] == encode(read, TOKENIZER, policy)
    assert len(found) == len(rows)


def test_the_columns_of_rows_by_hand(file):
    rows = prepared(file, policy=EncodingRules("sft", 10, "truncate_left")).rows
    assert rows[1] == Example([4, 3, 5, 6, 1, 2, 7, 3, 4, 1], prompt_length=8, also_trained=((2, 5),))
    assert rows.lengths.tolist() == [5, 10, 7, 5] and rows.column("full_length").tolist() == [5, 11, 7, 5]
    assert rows.column("prompt_length").tolist() == [3, 8, 3, 3]
    hashes = rows.column("prompt_hash")
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3 and len(set(rows.column("row_hash"))) == 4
    assert [rows.where(i) for i in range(4)] == [f"{file}:{line}" for line in (1, 2, 3, 4)]
    assert rows.tokens(2, 2, 5) == [3, 6, 7] and rows.tokens(2, 5, 99) == [4, 1]


def test_the_length_of_a_ranked_row_is_its_longest_answers(tmp_path):
    rows = prepared(write(tmp_path / "rows.jsonl", RANKINGS), policy=EncodingRules("ranking", 20)).rows
    assert rows.lengths.tolist() == [6, 7] and rows[0][1] == (2.0, 0.0, 1.0)


def test_a_prompt_keeps_its_turns_whole_when_its_tokens_are_cut(tmp_path):
    rows = [{"prompt": "a"}, {"messages": chat("a", "日\n b", "d", "c")}, {"prompt": "b c d"}]
    file = write(tmp_path / "rows.jsonl", rows)
    found = prepared(file, policy=EncodingRules("prompt", 4, "truncate_left")).rows
    turns = [tuple(chat("a")), tuple(chat("a", "日\n b", "d")), tuple(chat("b c d"))]
    assert [found.turns(i) for i in range(3)] == turns
    assert len(found[1].ids) == 4 < found.column("full_length")[1]
    both = concatenate([found.take(np.array([2, 1])), prepared(file, policy=EncodingRules("prompt", 20)).rows[1:]])
    assert [both.turns(i) for i in range(4)] == [turns[2], turns[1], turns[1], turns[2]]


def test_parts_of_rows_keep_items_columns_and_places_together(file):
    rows = prepared(file).rows
    whole = list(rows)
    some = rows.take(np.array([3, 0, 3, 2]))
    for part, expected in ((rows[1:3], [1, 2]), (some, [3, 0, 3, 2]), (some[1:][:2], [0, 3]),
                           (some.take(np.array([3, 0])), [2, 3]), (rows[:0], []), (rows[::-2], [3, 1])):  # fmt: skip
        assert list(part) == [whole[i] for i in expected]
        assert part.lengths.tolist() == [len(whole[i].ids) for i in expected]
        assert [part.where(i) for i in range(len(part))] == [rows.where(i) for i in expected]
    assert rows[-1] == whole[3]
    with pytest.raises(IndexError):
        rows[4]


def test_several_sets_are_read_as_one(file, tmp_path):
    more = prepared(write(tmp_path / "more.jsonl", DEMONSTRATIONS[2:])).rows
    rows = prepared(file).rows
    both = concatenate([rows[:0], rows.take(np.array([1, 0])), more])
    assert list(both) == [rows[1], rows[0], more[0], more[1]]
    assert both.lengths.tolist() == [11, 5, 7, 5] and both.where(3).endswith("more.jsonl:2")
    assert both.fingerprint not in (rows.fingerprint, more.fingerprint)
    assert both.fingerprint != concatenate([more, rows]).fingerprint


def test_a_set_without_a_usable_row_is_empty(tmp_path):
    found = prepared(write(tmp_path / "rows.jsonl", DEMONSTRATIONS), policy=EncodingRules("sft", 2))
    assert len(found.rows) == 0 and list(found.rows) == [] and found.rows.lengths.tolist() == []
    assert found.dropped == {"longer than 2 tokens": 4}


# -- malformed and unusable rows ---------------------------------------------------------------------------


def test_skipped_rows_are_counted_and_listed_in_order_with_place_and_reason(tmp_path):
    file = write(tmp_path / "rows.jsonl", BAD)
    found = prepared(file, skip_bad=True)
    assert [found.rows.where(i) for i in range(len(found.rows))] == [f"{file}:1", f"{file}:5"]
    assert found.bad == 2 and found.dropped == {"identical answers": 1, "longer than 20 tokens": 1}
    listed = [json.loads(line) for line in found.report.read_text().splitlines()]
    assert listed == list(found.left_out())
    assert [(line["where"], line["bad"]) for line in listed] == [
        (f"{file}:{number}", bad) for number, bad in ((2, True), (3, True), (4, False), (6, False))
    ]
    assert "`prompt` is empty" in listed[0]["reason"] and "found only a prompt" in listed[1]["reason"]
    assert [line["reason"] for line in listed[2:]] == ["identical answers", "longer than 20 tokens"]


def test_a_chunk_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 100)
    rows = [("f:1", b"x" * 60), ("f:2", b"x" * 40), ("f:3", {"a": "x"}), ("f:4", b"x" * 500), ("f:5", b"x")]
    assert [len(chunk) for chunk in store._chunks(rows)] == [2, 1, 1, 1]
    monkeypatch.setattr(store, "CHUNK", 1)
    assert [len(chunk) for chunk in store._chunks(rows)] == [1] * 5


@pytest.mark.parametrize("skipped_before", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_the_first_bad_row_in_file_order_is_the_error(tmp_path, monkeypatch, chunk, skipped_before):
    monkeypatch.setattr(store, "CHUNK", chunk)
    file = write(tmp_path / "rows.jsonl", BAD)
    if skipped_before:
        prepared(file, skip_bad=True)
    with pytest.raises(UserError, match="rows.jsonl:2: `prompt` is empty"):
        prepared(file)
    assert len(folders(file)) == skipped_before


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_limit_counts_usable_rows_and_nothing_after_it_is_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store, "CHUNK", chunk)
    file = write(tmp_path / "rows.jsonl", [BAD[0], BAD[3], *DEMONSTRATIONS[1:3], *BAD])
    found = prepared(file, limit=3)
    assert [found.rows.where(i) for i in range(3)] == [f"{file}:1", f"{file}:3", f"{file}:4"]
    assert len(found.rows) == 3 and found.bad == 0 and found.dropped == {"identical answers": 1}


# -- the cache ---------------------------------------------------------------------------------------------


def test_the_cache_is_the_setting_then_the_environment_then_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("TRISTAGE_CACHE", "/from_environment")
    assert cache_folder("/setting") == Path("/setting")
    assert cache_folder("~/mine") == Path("/home/someone/mine")
    assert cache_folder(None) == Path("/from_environment")
    monkeypatch.delenv("TRISTAGE_CACHE")
    assert cache_folder(None) == Path("/xdg/tristage")
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset is None else monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder(None) == Path("/home/someone/.cache/tristage")


def test_a_cache_that_is_a_file_is_an_error_that_names_the_setting(file):
    (file.parent / "cache").write_text("")
    with pytest.raises(UserError, match="cache: tokenised data can't be kept here .*set `data.cache`"):
        prepared(file)


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="can't be kept here .*No space left on device.*set `data.cache`"):
            prepared(file)
    assert folders(file) == []
    assert len(prepared(file).rows) == 4


def one_batch_short(content: bytes) -> bytes:
    """Arrow itself opens this without a complaint."""
    reader, sink = pyarrow.ipc.open_stream(content), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, reader.schema) as stream:
        stream.write_batch(next(reader))
    return sink.getvalue().to_pybytes()


def one_bit_flipped(content: bytes) -> bytes:
    """Of the ids: the same size, and Arrow opens it."""
    place = content.index(np.array([2, 4, 3, 5, 1], np.int32).tobytes())
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = {"a byte short": lambda content: content[:-1], "empty": lambda _: b"", "gone": lambda _: None}


@pytest.mark.parametrize(
    "name, damage",
    [(name, damage) for name in ("rows.arrow", "meta.json") for damage in DAMAGES.values()]
    + [("rows.arrow", one_batch_short), ("rows.arrow", one_bit_flipped), ("meta.json", lambda _: b"{}")],
    ids=[f"{name} {damage}" for name in ("rows.arrow", "meta.json") for damage in DAMAGES]
    + ["a batch short", "a bit flipped", "meta.json of nothing"],
)
def test_a_set_that_was_damaged_is_made_again(file, calls, monkeypatch, name, damage):
    monkeypatch.setattr(store, "CHUNK", 2)
    monkeypatch.setattr(store, "CHUNKS_PER_BATCH", 1)
    whole = list(prepared(file).rows)
    target = file.parent / "cache" / folders(file)[0] / name
    content = damage(target.read_bytes())
    target.unlink() if content is None else target.write_bytes(content)
    assert list(prepared(file).rows) == whole and len(calls) == 4


def test_what_a_run_makes_of_the_cache_is_for_its_user_alone(file, tmp_path):
    before = os.umask(0)
    try:
        prepared(file)
    finally:
        os.umask(before)
    cache = file.parent / "cache"
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / folders(file)[0])] == [0o700, 0o700]


# -- several processes -------------------------------------------------------------------------------------


def test_several_workers_give_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 2)
    monkeypatch.setattr(store, "ROWS_BEFORE_WORKERS", 4)
    file = write(tmp_path / "rows.jsonl", BAD * 5)
    alone = prepared(file, skip_bad=True, workers=1)
    expected, listed = list(alone.rows), list(alone.left_out())
    (file.parent / "cache").rename(tmp_path / "first")
    several = prepared(file, skip_bad=True, workers=2)
    assert list(several.rows) == expected and len(expected) == 10
    assert list(several.left_out()) == listed
    assert [several.rows.where(i) for i in range(10)] == [alone.rows.where(i) for i in range(10)]


def test_other_local_ranks_wait_for_the_first_and_tokenise_nothing(file, calls, monkeypatch):
    monkeypatch.setattr(dist, "local_rank", lambda: int(threading.current_thread().name == "rank 1"))
    found: list[PreparedSet] = []
    waiting = threading.Thread(target=lambda: found.append(prepared(file)), name="rank 1", daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not calls
    first = prepared(file)
    waiting.join(10)
    assert not waiting.is_alive() and list(found[0].rows) == list(first.rows)
    assert len(calls) == 1 and "rank 1" not in calls


def prepare_slowly(file: Path, seconds: float) -> None:
    """In a process of its own that looks like a rank of a launch; it says when its second chunk begins."""

    def slow(*arguments):
        if begun.exists():
            (file.parent / "second chunk").touch()
            time.sleep(seconds)
        begun.touch()
        return encode_chunk(*arguments)

    begun, encode_chunk = file.parent / "first chunk", store.encode_chunk
    store.encode_chunk, store.CHUNK = slow, 2
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert len(prepared(file).rows) == len(DEMONSTRATIONS)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def in_the_middle(file):
    """Starts `prepare_slowly(file, seconds)`; returns its process once one of the set's two chunks is written."""
    processes = []

    def start(seconds: float):
        process = multiprocessing.get_context("spawn").Process(target=prepare_slowly, args=(file, seconds))
        processes.append(process)
        process.start()
        while not (file.parent / "second chunk").exists():
            assert process.is_alive()
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_taken_for_finished(file, calls, in_the_middle):
    killed = in_the_middle(seconds=600)
    killed.kill()
    killed.join()
    [left] = folders(file)
    assert ".partial-" in left
    found = prepared(file)
    assert len(calls) == 1 and len(found.rows) == len(DEMONSTRATIONS)
    assert folders(file) == [found.rows.fingerprint]


def test_two_processes_that_want_the_same_set_at_once_both_get_it_and_one_makes_it(file, calls, in_the_middle):
    other = in_the_middle(seconds=2)
    found = prepared(file)
    other.join()
    assert other.exitcode == 0 and not calls
    assert len(found.rows) == len(DEMONSTRATIONS) and folders(file) == [found.rows.fingerprint]
