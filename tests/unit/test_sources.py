"""Every kind of source gives its rows with their places; what cannot be read is one sentence that says where."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tristage.config import RunSettings, SourceSettings
from tristage.data import hub, sources
from tristage.data.rows import read_row
from tristage.data.sources import load_json, open_source, resolve_preset
from tristage.errors import UserError

SAMPLES = Path(__file__).parents[1] / "data_samples"
PRESETS = Path(__file__).parents[2] / "configs" / "datasets"

GREETINGS = [
    {"prompt": "Hi", "response": "Hello, you"},
    {"prompt": "Wie geht's Jürgen?", "response": "Gut.\nUnd dir?"},
    {"prompt": 'Say "yes"', "response": "yes"},
]


def read(path: Path | str, **source) -> list[tuple[str, object]]:
    """(place, row) of each row, JSON lines decoded."""
    places = list(open_source(SourceSettings(path=str(path), **source)).rows())
    return [(where, load_json(row, where) if isinstance(row, bytes) else row) for where, row in places]


def refusal(path: Path | str, **source) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def prompt_line(prompt: str) -> str:
    return json.dumps({"prompt": prompt}) + "\n"


def prompts(path: Path, **source) -> list[str]:
    return [row["prompt"] for _, row in read(path, **source)]


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, places",
    [
        ("greetings.jsonl", [":1", ":2", ":3"]),
        ("greetings.json", ["[0]", "[1]", "[2]"]),
        ("greetings.csv", [":2", ":3", ":5"]),  # the second row is written over two lines
        ("greetings.tsv", [":2", ":3", ":5"]),
    ],
)
def test_every_text_format_gives_the_same_rows_each_at_its_place(name, places):
    path = SAMPLES / name
    assert read(path) == [(f"{path}{place}", row) for place, row in zip(places, GREETINGS, strict=True)]


def test_gzip_gives_the_rows_and_lines_of_the_file_inside(tmp_path):
    path = write(tmp_path / "greetings.jsonl.gz", gzip.compress((SAMPLES / "greetings.jsonl").read_bytes()))
    assert read(path) == [(f"{path}:{number}", row) for number, row in enumerate(GREETINGS, start=1)]


def test_parquet_rows_are_counted_over_its_row_groups_and_lists_stay_lists(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Frage {i}"}], "ranks": [float(i), 1.5]} for i in range(5)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    assert read(path) == [(f"{path}[{i}]", row) for i, row in enumerate(rows)]


def test_a_txt_file_is_one_row_of_text_without_its_byte_order_mark(tmp_path):
    path = write(tmp_path / "book.txt", b"\xef\xbb\xbfOne.\r\n\nTwo\xc3\xa9.\n")
    assert read(path) == [(f"{path}:1", {"text": "One.\r\n\nTwoé.\n"})]


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("rows.jsonl", b'{"prompt": "a"}\r\n\n{"prompt": "b"}', [1, 3]),
        ("rows.csv", b'prompt\r\n"a"\r\n\r\nb', [2, 4]),
        ("rows.tsv", b"\nprompt\na\n\n\nb\n", [3, 6]),
    ],
)
def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(tmp_path, name, content, lines):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content)
    assert read(path) == [(f"{path}:{lines[0]}", {"prompt": "a"}), (f"{path}:{lines[1]}", {"prompt": "b"})]


# -- broken files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ":2: not JSON (Expecting value at column"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ":2: byte 0xff is not UTF-8, convert it"),
        ("rows.json", b'[\n{"prompt": "a"},\n{"prompt" 3}]', ":3: not JSON (Expecting ':' delimiter at column 11)"),
        ("rows.json", b'[\n"\xff"]', ":2: byte 0xff is not UTF-8, convert it"),
        ("rows.json", b'{"prompt": "a"}', ":1: a .json file must hold one list of rows, found dict; name it .jsonl"),
        ("rows.csv", b'prompt,response\na,b\n"a"b,c\n', ":3: not csv (',' expected after '\"'), fix the line"),
        ("rows.csv", b'prompt,response\na,b\na,"b\nc\n', ":3: not csv (unexpected end of data), fix the line"),
        ("rows.tsv", b'prompt\tresponse\n"a"b\tc\n', ":2: not tsv ('\t' expected after '\"'), fix the line"),
        ("rows.csv", b'prompt,response\n"a\nb",c\na,\xff\n', ":4: byte 0xff is not UTF-8, convert it"),
        ("rows.txt", b"One.\nTwo\xe9.\n", ":2: byte 0xe9 is not UTF-8, convert it"),
        ("rows.parquet", b"prompt,response\na,b\n", "[0]: not readable as Parquet ("),
        ("rows.parquet", b"", "[0]: not readable as Parquet ("),
    ],
)
def test_a_broken_file_is_one_sentence_with_the_line(tmp_path, name, content, sentence):
    path = write(tmp_path / name, content)
    assert refusal(path).startswith(f"{path}{sentence}")


def test_parquet_with_a_broken_page_is_one_sentence(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"question {i}" for i in range(3000)]}), path)
    whole = path.read_bytes()
    write(path, whole[:4] + bytes(200) + whole[204:])  # the footer, read first, is whole
    assert refusal(path).startswith(f"{path}: cannot be read (")


def test_a_cut_or_fake_gzip_is_an_error_with_the_line_it_breaks_at(tmp_path):
    line = prompt_line("Hi").encode()
    cut, fake = gzip.compress(line * 3)[:-12], line
    for content, lines in ((cut, "[123]"), (fake, "1")):  # how much of a cut stream can be read is up to zlib
        path = write(tmp_path / "rows.jsonl.gz", content)
        assert re.match(f"{re.escape(str(path))}:{lines}: the gzip stream breaks here [(]", refusal(path))


@pytest.mark.parametrize(
    "name, kind", [("rows.xlsx", ".xlsx"), ("rows.json.gz", ".gz"), ("rows", "such")], ids=lambda name: name
)
def test_an_unknown_suffix_is_an_error(tmp_path, name, kind):
    path = write(tmp_path / name, prompt_line("Hi"))
    assert refusal(path).startswith(f"{path}: cannot read {kind} files, give one of .json, .jsonl, .jsonl.gz, .csv")


@pytest.mark.parametrize("source", ["missing.jsonl", "./folder/rows.jsonl", "/no/such", "data/rows.jsonl.gz", "folder"])
def test_a_missing_path_is_said_to_be_missing_and_never_looked_up(source):
    assert refusal(source) == f"{source}: there is no such file or folder, correct the path"


@pytest.mark.parametrize("columns", [{}, {"prompt": "prompt", "response": "response"}], ids=["all columns", "mapped"])
@pytest.mark.parametrize(
    "row, sentence",
    [
        ("Hi,Well, yes", "more cells than the first line names columns; quote the cell that was cut in two"),
        ("Hi", "`response` must be text, found null"),
    ],
)
def test_a_csv_row_with_too_many_or_too_few_cells_is_refused(tmp_path, row, sentence, columns):
    path = write(tmp_path / "rows.csv", f"prompt,response\n{row}\nHi,there\n")
    source = SourceSettings(path=str(path), columns=columns)
    bad, good = open_source(source).rows()
    with pytest.raises(UserError) as caught:
        read_row(bad, source, "sft")
    assert str(caught.value) == f"{path}:2: {sentence}"
    assert read_row(good, source, "sft").response == "there"


# -- folders -----------------------------------------------------------------------------------------------


def make_folder(folder: Path, *names: str) -> Path:
    """JSON lines files that each hold their own name."""
    for name in names:
        write(folder / name, prompt_line(name))
    return folder


def test_a_folder_gives_its_files_sorted_whatever_their_formats(tmp_path):
    make_folder(tmp_path, "b.jsonl", "c/rows.jsonl", "a/2.jsonl")
    write(tmp_path / "a/1.csv", "prompt\na/1.csv\n")
    write(tmp_path / "readme.txt", "no rows")
    assert prompts(tmp_path) == ["a/1.csv", "a/2.jsonl", "b.jsonl", "c/rows.jsonl"]


def test_a_folder_of_txt_files_gives_a_row_for_each(tmp_path):
    write(tmp_path / "2.txt", "two")
    write(tmp_path / "1.txt", "one")
    assert [row for _, row in read(tmp_path)] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    "names, split, read_names",
    [
        (["train-00001.jsonl", "train-00000.jsonl", "test-00000.jsonl"], "train", [1, 0]),
        (["train-00001.jsonl", "train-00000.jsonl", "test-00000.jsonl"], "test", [2]),
        (["train/rows.jsonl", "dev/rows.jsonl"], "validation", [1]),
        (["train/rows.jsonl", "dev/rows.jsonl"], "dev", [1]),
        (["my_training.jsonl", "my_val.jsonl", "my.eval.jsonl"], "train", [0]),
        (["my_training.jsonl", "my_val.jsonl", "my.eval.jsonl"], "test", [2]),
        (["TRAIN.jsonl", "Valid.jsonl"], "validation", [1]),
        (["trainers.jsonl", "latest.jsonl", "evaluated.jsonl"], "validation", [2, 1, 0]),  # no name of a split
        (["train.jsonl", "notes.jsonl"], "train", [0]),
    ],
)
def test_file_names_tell_the_split_where_any_does(tmp_path, names, split, read_names):
    make_folder(tmp_path, *names)
    assert prompts(tmp_path, split=split) == [names[i] for i in read_names]


def test_a_split_that_no_file_name_tells_is_an_error_with_those_there(tmp_path):
    make_folder(tmp_path, "train.jsonl", "dev.jsonl", "notes.jsonl")
    assert refusal(tmp_path, split="test") == f"{tmp_path}: there is no split 'test', choose one of train, validation"


def test_a_folder_without_a_data_file_is_an_error(tmp_path):
    write(tmp_path / "image.png", b"")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no data file in this folder, give one of .json, .jsonl")


def test_a_subset_is_a_folder_inside_the_source(tmp_path):
    make_folder(tmp_path, "base/rows.jsonl", "online/rows.jsonl")
    assert prompts(tmp_path, subset="online") == ["online/rows.jsonl"]
    for source in (tmp_path, tmp_path / "base/rows.jsonl"):
        assert refusal(source, subset="x") == f"{source}: there is no folder 'x' in it, correct `subset`"


# -- rows that are too large, keys that are not unique, files that are not there -----------------------------


def lines_within(file: Path, limit: int) -> list[tuple[str, object]]:
    return list(open_source(SourceSettings(path=str(file)), limit).rows())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_over_the_limit_is_an_error_in_its_place_and_the_others_are_read(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    lines = [b'{"text": "a"}', b"x" * 40, b"x" * (5 << 20), b'{"text": "b"}', b"y" * 41]
    with gzip.open(file, "wb") if suffix.endswith("gz") else file.open("wb") as stream:
        stream.write(b"\n".join(lines))
    places = lines_within(file, 40)
    assert [payload for _, payload in places if isinstance(payload, bytes)] == [lines[0], lines[1], lines[3]]
    assert [str(payload) for _, payload in places if isinstance(payload, UserError)] == [
        f"{file}:{number}: a row of more than 40 bytes, shorten it or raise `data.max_row_bytes`" for number in (3, 5)
    ]


def test_a_line_over_the_limit_is_never_held_whole(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for _ in range(64):
            stream.write(b"x" * (1 << 20))
    tracemalloc.start()
    try:
        assert len(lines_within(file, 1000)) == 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_decoded_rows_and_texts_over_the_limit_are_errors_too(tmp_path):
    rows = [{"text": "a"}, {"text": "é" * 20}, {"text": [{"content": "a" * 50}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = [isinstance(payload, UserError) for _, payload in lines_within(tmp_path / "rows.json", 40)]
    assert found == [False, True, True]
    (tmp_path / "rows.txt").write_text("a" * 41)
    (place,) = lines_within(tmp_path / "rows.txt", 40)
    assert isinstance(place[1], UserError)
    for content in ("text\n" + "a" * 41, 'text\n"' + "a\n" * 41):
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(UserError, match=r"rows.csv:2: a row of more than 40 bytes"):
            lines_within(tmp_path / "rows.csv", 40)


@pytest.mark.parametrize("text", ['{"prompt": "a", "prompt": "b"}', '[{"x": [{"prompt": 1, "role": 2, "prompt": 1}]}]'])
def test_a_key_that_is_in_an_object_twice_is_an_error(text):
    with pytest.raises(UserError) as caught:
        sources.load_json(text.encode(), "f.jsonl:3")
    assert str(caught.value) == "f.jsonl:3: the key 'prompt' is in one object twice, remove one of them"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
def test_a_git_lfs_pointer_is_named_as_one(tmp_path, name):
    file = tmp_path / name
    file.write_text("version https://git-lfs.example/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert refusal(file) == f"{file}: is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned"


# -- saved and hub sets ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """One data set as `one`, and as two splits of `two`."""
    datasets = pytest.importorskip("datasets")
    parts = [datasets.Dataset.from_list([{"prompt": name}]) for name in ("train row", "test row")]
    parts[0].save_to_disk(tmp_path / "saved" / "one")
    datasets.DatasetDict(train=parts[0], test=parts[1]).save_to_disk(tmp_path / "saved" / "two")
    return tmp_path / "saved"


def test_saved_data_sets_are_read_by_split(saved):
    assert read(saved / "one") == [(f"{saved}/one[0]", {"prompt": "train row"})]
    assert prompts(saved / "two") == ["train row"]
    assert prompts(saved / "two", split="test") == prompts(saved, subset="two", split="test") == ["test row"]
    assert refusal(saved / "two", split="dev") == f"{saved}/two: there is no split 'dev', choose one of train, test"


def test_a_broken_saved_data_set_is_an_error(saved):
    for file in (saved / "one").glob("*.arrow"):
        file.unlink()
    assert refusal(saved / "one").startswith(f"{saved}/one: not readable as a datasets.save_to_disk folder (")


def test_a_hub_id_is_loaded_with_its_name_subset_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    class Loaded(list):
        _fingerprint = "as on the hub"

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Loaded([{"prompt": "Hi"}])

    monkeypatch.setattr(hub, "answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # a test before may have found no network
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # a test before may have found no network
    source = open_source(SourceSettings(path="some-org/some.set", name="en", subset="base", split="test"))
    assert calls == [(("some-org/some.set", "en"), {"data_dir": "base", "split": "test", "cache_dir": None})]
    assert list(source.rows()) == [("some-org/some.set[test][0]", {"prompt": "Hi"})]
    assert source.content() == "as on the hub"


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_its_cache_is_tried(monkeypatch):
    datasets = pytest.importorskip("datasets")
    offline = []

    def load_dataset(*args, **kwargs):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "answers", lambda endpoint: False)
    for config in (datasets.config, hub.constants):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sentence = refusal("some-org/set")
    assert sentence.startswith("some-org/set: not a local folder and not in the cache")
    assert "give a local folder, or set HF_HOME" in sentence and "\n" not in sentence
    assert offline == [True]


def test_a_hub_failure_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # a test before may have found no network

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # a test before may have found no network
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("some-org/set", name="en", split="dev") == (
        "some-org/set: could not be loaded as a hub set (name 'en', subset None, split 'dev'): no route"
    )


@pytest.fixture
def hub_set(tmp_path, monkeypatch) -> Path:
    """A folder whose README, and no file name, says which files make which split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return shutil.copytree(SAMPLES / "hub_set", tmp_path / "hub_set")


def test_a_folder_laid_out_as_a_hub_set_is_read_as_its_readme_says(hub_set):
    assert read(hub_set) == [(f"{hub_set}[train][0]", {"prompt": "Hi", "response": "Hello"})]
    assert read(hub_set, split="test") == [(f"{hub_set}[test][0]", {"prompt": "Hi", "response": "Good day"})]
    assert prompts(hub_set, name="farewells") == ["Bye"]
    assert refusal(hub_set, split="dev").startswith(
        f"{hub_set}: could not be loaded as a hub set (name None, subset None, split 'dev'): "
    )


def test_an_edited_hub_folder_and_another_of_the_same_name_are_not_taken_from_the_librarys_cache(hub_set):
    other = Path(shutil.copytree(hub_set, hub_set.parent / "elsewhere" / hub_set.name))
    assert prompts(hub_set) == prompts(other) == ["Hi"]
    before = content(other)
    os.utime(other / "first/a.jsonl", (1, 1))
    assert content(other) == before
    write(other / "first/a.jsonl", '{"prompt": "Ha", "response": "Hello"}\n')
    assert (prompts(hub_set), prompts(other)) == (["Hi"], ["Ha"]) and content(other) != before
    before = content(other)
    (other / "second/a.jsonl").rename(other / "second/b.jsonl")
    assert content(other) != before


# -- content -----------------------------------------------------------------------------------------------


def content(path: Path) -> str:
    return open_source(SourceSettings(path=str(path))).content()


@pytest.mark.parametrize("source", ["rows.jsonl", "folder", "saved/one", "saved/two"])
def test_the_content_hash_follows_one_byte_and_not_the_modification_time(tmp_path, saved, source):
    write(tmp_path / "rows.jsonl", prompt_line("Hi"))
    make_folder(tmp_path / "folder", "a.jsonl", "b.jsonl")
    path = tmp_path / source
    before = content(path)
    files = sorted(file for file in [path, *path.rglob("*")] if file.suffix in (".jsonl", ".arrow"))
    for file in files:
        os.utime(file, (1, 1))
    assert content(path) == before
    changed = next(file for file in files[::-1] if "test" not in file.parts)
    whole = changed.read_bytes()
    position = whole.index(b'"prompt"' if changed.suffix == ".jsonl" else b"train row") + 1
    write(changed, whole[:position] + b"P" + whole[position + 1 :])
    assert content(path) != before


def test_the_content_hash_follows_the_names_and_number_of_a_folders_files(tmp_path):
    def of(*names: str) -> str:
        folder = tmp_path / "-".join(names)
        for name in names:
            write(folder / f"{name}.jsonl", prompt_line("same"))
        return content(folder)

    assert len({of("a"), of("a", "b"), of("a", "c")}) == 3


# -- presets -----------------------------------------------------------------------------------------------


SETTINGS = RunSettings(output="out", data={"train": "rows.jsonl"})


def preset(folder: Path, text: str) -> str:
    return str(write(folder / "preset.yaml", text))


def test_a_preset_fills_only_the_keys_that_the_source_leaves_out(tmp_path):
    file = preset(tmp_path, "path: some-org/set\nsplit: test\nlimit: 5\ncolumns: {prompt: question}\n")
    source = SourceSettings(preset=file, split="train", limit=9)  # "train" is the default, and yet set
    assert resolve_preset(source, SETTINGS) == SourceSettings(
        preset=file, path="some-org/set", split="train", limit=9, columns={"prompt": "question"}
    )


def test_a_source_without_a_preset_stays_as_it_is():
    source = SourceSettings(path="rows.jsonl", limit=3)
    assert resolve_preset(source, SETTINGS) == source


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("path: a/b\ncolumn: {prompt: q}\n", "{file}: unknown key `column`; did you mean `columns`?"),
        ("path: a/b\nlimit: 0\n", "{file}: key `limit`: give a number above 0; got 0"),
        ("path: [a\n", "{file}: not a preset: "),
        ("- path: a/b\n", "{file}: not a preset: "),
        ("", "{file}: not a preset: "),
        ("split: test\n", "settings: a source of `data` has no `path`, give it or a `preset` that has one"),
    ],
)
def test_a_preset_that_cannot_be_used_is_an_error(tmp_path, text, sentence):
    file = preset(tmp_path, text)
    with pytest.raises(UserError) as caught:
        resolve_preset(SourceSettings(preset=file), SETTINGS)
    assert str(caught.value).startswith(sentence.format(file=file)) and "\n" not in str(caught.value)


def test_a_missing_preset_is_an_error():
    with pytest.raises(UserError, match=r"^settings: key `data.\*.preset`: no file no/such.yaml, here or next to"):
        resolve_preset(SourceSettings(preset="no/such.yaml"), SETTINGS)


@pytest.mark.parametrize(
    "pattern, replacement", [("(", ""), ("a", r"\1"), ("a", r"\g<name>")], ids=["pattern", "group", "named group"]
)
def test_a_clean_rule_that_is_no_regular_expression_is_an_error_before_any_row(pattern, replacement):
    rule = {"columns": ["prompt"], "pattern": pattern, "replacement": replacement}
    with pytest.raises(UserError) as caught:
        resolve_preset(SourceSettings(path="rows.jsonl", clean=[rule]), SETTINGS)
    assert str(caught.value).startswith(f"rows.jsonl: `clean` pattern {pattern!r} is not valid (")


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_preset_of_the_project_goes_with_a_path_of_the_users(file):
    assert resolve_preset(SourceSettings(preset=str(file), path="rows.jsonl"), SETTINGS).path == "rows.jsonl"
