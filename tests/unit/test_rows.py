"""Each layout reads as documented, each bad row is one sentence that names it, real data reads whole."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tristage.data.rows import PromptRow, RankingRow, SFTRow, read_rows, split_heldout
from tristage.errors import UserError

HH_FILE = Path(__file__).parents[2].parent / "shared" / "data" / "hh_helpful" / "helpful-base-test.jsonl.gz"

USER_HI = ({"role": "user", "content": "Hi"},)
HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye"
HH_TURNS = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
)


def write_jsonl(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def hh(answer: str) -> str:
    return f"{HH_PROMPT}\n\nAssistant: {answer}"


# -- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, prompt, answers, ranks",
    [
        ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, USER_HI, ("good", "bad"), (0, 1)),
        (
            {"prompt": "Hi", "responses": ["c", "a", "b"], "ranks": [2, 0, 1]},
            USER_HI,
            ("c", "a", "b"),
            (2, 0, 1),
        ),
        ({"chosen": hh("good"), "rejected": hh("bad")}, HH_TURNS, ("good", "bad"), (0, 1)),
    ],
)
def test_ranking_layouts_give_a_prompt_with_ranked_answers(tmp_path, raw, prompt, answers, ranks):
    source = write_jsonl(tmp_path, raw)
    rows, dropped = read_rows(source, "ranking")
    assert rows == [RankingRow(prompt, answers, ranks, f"{source}:1")]
    assert not dropped


@pytest.mark.parametrize(
    "raw, prompt, response",
    [
        ({"prompt": "Hi", "response": " there\n"}, USER_HI, " there\n"),
        ({"messages": [*HH_TURNS, {"role": "assistant", "content": "Ciao"}]}, HH_TURNS, "Ciao"),
        ({"prompt": list(HH_TURNS), "response": "Ciao"}, HH_TURNS, "Ciao"),
    ],
)
def test_demonstration_layouts_give_a_prompt_with_an_answer(tmp_path, raw, prompt, response):
    source = write_jsonl(tmp_path, raw)
    assert read_rows(source, "sft")[0] == [SFTRow(prompt, response, f"{source}:1")]


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("Hi", USER_HI),
        (HH_PROMPT, HH_TURNS),
        (HH_PROMPT + "\n\nAssistant:", HH_TURNS),
        ("What does\n\nHuman: mean?", ({"role": "user", "content": "What does\n\nHuman: mean?"},)),
        ("\n\nHuman:  two spaces \n", ({"role": "user", "content": " two spaces \n"},)),
    ],
)
def test_prompt_text_is_one_user_turn_unless_it_is_a_dialogue(tmp_path, prompt, turns):
    source = write_jsonl(tmp_path, {"prompt": prompt})
    assert read_rows(source, "prompt")[0] == [PromptRow(turns, f"{source}:1")]


def test_a_ranking_row_serves_the_simpler_steps_with_its_first_best_answer(tmp_path):
    source = write_jsonl(
        tmp_path, {"prompt": "Hi", "responses": ["worst", "best", "as good"], "ranks": [3, 0, 0]}
    )
    assert read_rows(source, "sft")[0] == [SFTRow(USER_HI, "best", f"{source}:1")]
    assert read_rows(source, "prompt")[0] == [PromptRow(USER_HI, f"{source}:1")]


def test_other_columns_are_ignored(tmp_path):
    source = write_jsonl(tmp_path, {"prompt": "Hi", "response": "there", "id": 7, "tags": None})
    assert read_rows(source, "sft")[0] == [SFTRow(USER_HI, "there", f"{source}:1")]


# -- sources -----------------------------------------------------------------------------------------------


def test_json_jsonl_and_gzip_hold_the_same_rows(tmp_path):
    raws = [{"prompt": f"Frage über {i}"} for i in range(3)]
    jsonl = write_jsonl(tmp_path, *raws)
    (tmp_path / "rows.json").write_text(json.dumps(raws, indent=1))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(Path(jsonl).read_bytes())
    prompts = [
        [row.prompt for row in read_rows(str(tmp_path / name), "prompt")[0]]
        for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz")
    ]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 3
    assert read_rows(str(tmp_path / "rows.json"), "prompt")[0][2].where == f"{tmp_path / 'rows.json'}[2]"


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n\n{"prompt": "b"}')
    assert [row.where for row in read_rows(str(path), "prompt")[0]] == [f"{path}:1", f"{path}:3"]


def test_limit_counts_usable_rows(tmp_path):
    same = {"prompt": "Hi", "chosen": "x", "rejected": "x"}
    good = {"prompt": "Hi", "chosen": "x", "rejected": "y"}
    rows, dropped = read_rows(write_jsonl(tmp_path, same, good, good, good), "ranking", limit=2)
    assert [row.where[-1] for row in rows] == ["2", "3"] and dropped == {"identical answers": 1}


def test_saved_datasets_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": "Hi", "response": "there"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "two")
    for source in (str(tmp_path / "one"), str(tmp_path / "two")):
        assert read_rows(source, "sft")[0] == [SFTRow(USER_HI, "there", f"{source}:0")]
    with pytest.raises(UserError, match="no split 'dev', choose one of train, test"):
        read_rows(str(tmp_path / "two"), "sft", split="dev")
    with pytest.raises(UserError, match="not a folder of datasets.save_to_disk"):
        read_rows(str(tmp_path), "sft")


def test_a_hub_id_is_loaded_with_its_subset_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, data_dir, split):
        calls.append((name, data_dir, split))
        return [{"prompt": "Hi", "response": "there"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read_rows("some-org/some.set", "sft", subset="base", split="test")
    assert rows == [SFTRow(USER_HI, "there", "some-org/some.set[test]:0")]
    assert calls == [("some-org/some.set", "base", "test")]


def test_a_hub_failure_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="some-org/set: no such path here, and as a hub set .*no route"):
        read_rows("some-org/set", "sft")


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "./folder/rows.jsonl", "/no/such", "data/rows.jsonl.gz", "folder"]
)
def test_a_missing_path_is_said_to_be_missing_and_never_looked_up(source):
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_rows(source, "sft")


def test_subset_of_a_local_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="`subset` = 'x' is for hub sets only"):
        read_rows(write_jsonl(tmp_path, {"prompt": "Hi"}), "prompt", subset="x")


# -- bad rows ----------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "Hi", "response": "there"}'


def as_line(**columns: object) -> bytes:
    return json.dumps(columns).encode()


@pytest.mark.parametrize(
    "line, sentence",
    [
        (b'{"prompt": "Hi", ', "not JSON"),
        (b'{"prompt": "\xff", "response": "x"}', "byte 0xff is not UTF-8"),
        (b'["Hi", "there"]', "a row must be an object with named columns, found list"),
        (b"null", "a row must be an object with named columns, found null"),
        (
            as_line(question="Hi", answer="there"),
            r"columns \['answer', 'question'\] are not understood.*prompt \+ response",
        ),
        (as_line(prompt="Hi", response=3), "`response` must be text, found int"),
        (as_line(prompt=None, response="x"), "`prompt` must be text, found null"),
        (as_line(prompt="", response="x"), "`prompt` is empty"),
        (as_line(prompt="Hi", response=" \n"), "`response` is empty"),
        (b'{"prompt": "\\ud800", "response": "x"}', "`prompt` has half a surrogate pair"),
        (as_line(prompt="Hi"), "needs an answer .* found only a prompt"),
        (as_line(prompt=[], response="x"), "`prompt` as a list of messages must end with a user turn"),
        (as_line(prompt=[{"role": "assistant", "content": "Hi"}], response="x"), "must end with a user turn"),
        (as_line(messages="Hi"), "`messages` must be a list of messages, found str"),
        (as_line(messages=[{"role": "user", "content": "Hi"}]), "end with an assistant turn"),
        (as_line(messages=[{"role": "assistant", "content": "Hi"}]), "must hold a prompt"),
        (
            as_line(messages=[{"role": "bot", "content": "Hi"}]),
            r"`messages\[0\]` must be an object with a role",
        ),
        (as_line(messages=[{"role": "user"}]), r"`messages\[0\].content` must be text, found null"),
        (as_line(prompt="Hi", responses="ab", ranks=[0, 1]), "two lists of the same length"),
        (as_line(prompt="Hi", responses=["a", "b"], ranks=[0]), "two lists of the same length"),
        (as_line(prompt="Hi", responses=["a"], ranks=[0]), "has 1 answer, give 2"),
        (as_line(prompt="Hi", responses=["a", "b"], ranks=[0, "1"]), "finite numbers"),
        (as_line(prompt="Hi", responses=["a", "b"], ranks=[0, float("nan")]), "finite numbers"),
        (
            as_line(prompt="Hi", responses=["a", None], ranks=[0, 1]),
            r"`responses\[1\]` must be text, found null",
        ),
        (as_line(chosen="good", rejected="bad"), "must be a whole dialogue"),
    ],
)
def test_a_malformed_row_is_one_error_that_names_file_and_line(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    with pytest.raises(UserError, match=sentence) as caught:
        read_rows(str(path), "sft")
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_a_demonstration_cannot_serve_the_ranking_step(tmp_path):
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: this step needs ranked answers .* found only a prompt and one answer"
    ):
        read_rows(write_jsonl(tmp_path, {"prompt": "Hi", "response": "there"}), "ranking")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'[\n{"prompt": "a"},\n{"prompt" 3}]', ":3: not JSON"),
        (b'[\n"\xff"]', ":2: byte 0xff"),
        (b'{"prompt": "a"}', ":1: a .json file must hold one list of rows, found dict"),
    ],
)
def test_a_broken_json_file_is_an_error_that_names_the_line(tmp_path, content, sentence):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_rows(str(path), "prompt")


def test_a_cut_or_fake_gzip_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"\n".join([GOOD] * 3))
    for content in (whole[:-12], GOOD):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rows.jsonl.gz:\d+: the gzip stream breaks"):
            read_rows(str(path), "sft")


def test_an_unknown_suffix_is_an_error(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\nHi\n")
    with pytest.raises(UserError, match="cannot read .csv files"):
        read_rows(str(tmp_path / "rows.csv"), "prompt")


# -- dropped rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "x"}, "identical answers"),
        ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 1]}, "all answers ranked equal"),
        ({"chosen": hh("same"), "rejected": hh("same")}, "identical answers"),
        (
            {"chosen": hh("a"), "rejected": "\n\nHuman: Else\n\nAssistant: b"},
            "dialogues differ before the last turn",
        ),
        ({"chosen": hh("a"), "rejected": hh("")}, "dialogue with an empty turn"),
        ({"chosen": HH_PROMPT, "rejected": HH_PROMPT}, "dialogue does not end with an answer"),
        ({"prompt": "\n\nHuman: \n\nAssistant: a\n\nHuman: Hi"}, "dialogue with an empty turn"),
    ],
)
def test_a_row_that_teaches_nothing_is_dropped_alike_in_every_step(tmp_path, raw, reason):
    source = write_jsonl(tmp_path, raw, {"prompt": "Hi", "chosen": "x", "rejected": "y"})
    for kind in ("ranking", "sft", "prompt"):
        rows, dropped = read_rows(source, kind)
        assert len(rows) == 1 and dropped == {reason: 1}


def test_a_source_without_a_usable_row_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no usable row \(dropped: {'identical answers': 1}\)"):
        read_rows(write_jsonl(tmp_path, {"prompt": "Hi", "chosen": "x", "rejected": "x"}), "ranking")


# -- held-out split ----------------------------------------------------------------------------------------


def make_rows(num_rows: int) -> list[SFTRow]:
    return [
        SFTRow(({"role": "user", "content": f"question {i // 2}"},), f"answer {i}", "")
        for i in range(num_rows)
    ]


def test_rows_with_the_same_prompt_fall_on_the_same_side():
    train, heldout = split_heldout(make_rows(400), 0.25, seed=0)
    assert len(train) + len(heldout) == 400
    assert not {row.prompt[0]["content"] for row in train} & {row.prompt[0]["content"] for row in heldout}


def test_the_side_depends_on_neither_order_nor_the_other_rows():
    rows = make_rows(400)
    _, heldout = split_heldout(rows, 0.25, seed=0)
    assert split_heldout(rows[::-1], 0.25, seed=0)[1] == heldout[::-1]
    assert split_heldout(make_rows(800), 0.25, seed=0)[1][: len(heldout)] == heldout


def test_the_share_is_about_the_fraction_and_the_seed_moves_it():
    splits = [split_heldout(make_rows(2000), 0.25, seed=seed)[1] for seed in (0, 1)]
    assert all(0.2 < len(heldout) / 2000 < 0.3 for heldout in splits) and splits[0] != splits[1]
    assert (
        split_heldout(make_rows(10), 0.0, seed=0)[1] == []
        and split_heldout(make_rows(10), 1.0, seed=0)[0] == []
    )


# -- real data ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HH_FILE.exists(), reason=f"real data absent: {HH_FILE}")
def test_every_row_of_the_real_hh_set_is_read_or_counted():
    rows, dropped = read_rows(str(HH_FILE), "ranking")
    assert len(rows) + dropped.total() == 2354
    assert dropped == Counter(
        {"dialogues differ before the last turn": 9, "dialogue with an empty turn": 4, "identical answers": 2}
    )
    first = rows[0]
    assert first.prompt == (
        {"role": "user", "content": "Do you know why turkeys became the official food of thanksgiving?"},
    )
    assert first.answers[0].startswith("To be honest") and first.answers[1].startswith("I know that")
