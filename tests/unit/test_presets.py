"""Each preset reads rows in the layout of its set, with made-up content, into what is written beside them by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.helpers.real_data import real_file
from tristage.config import DataSettings, Kind, RunSettings, SourceSettings
from tristage.data.rows import PromptRow, RankingRow, SFTRow, Turn, read_row
from tristage.data.sources import open_source, resolve_preset
from tristage.errors import UserError

REPO = Path(__file__).parents[2]
FOLDER = REPO / "configs" / "datasets"
SETTINGS = RunSettings(output="out", data={"train": "rows.jsonl"})

Raw = dict[str, Any]


def talk(*texts: str) -> tuple[Turn, ...]:
    """Turns of user and assistant by turns."""
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


@dataclass(frozen=True)
class Read:
    """What a raw row holds: SFT's answer is `best`; `answers` are empty where the set has one answer a row."""

    prompt: tuple[Turn, ...]
    best: str
    answers: tuple[str, ...] = ()
    ranks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    rows: list[tuple[Raw, Read]]
    bad: tuple[Raw, ...] = ()  # rows that the set is known to have and `on_bad_row: skip` passes over


def ask(question: str, answer: str) -> Read:
    return Read(talk(question), answer)


def pair(prompt: tuple[Turn, ...], chosen: str, rejected: str) -> Read:
    return Read(prompt, chosen, (chosen, rejected), (0, 1))


HH_OPEN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a bird\n\nAssistant:"
HH_SPLIT = Sample(  # the sets of Dahoas; `response` repeats `chosen`
    [
        (
            {"prompt": HH_OPEN, "response": " A wren", "chosen": " A wren", "rejected": " A bat"},
            pair(talk("Hi", "Hello", "Name a bird"), "A wren", "A bat"),
        ),
        (
            {"prompt": "\n\nHuman: Sing\n\nAssistant:", "response": " La\n", "chosen": " La\n", "rejected": "  no"},
            pair(talk("Sing"), "La\n", " no"),
        ),
    ],
    bad=({"prompt": HH_OPEN, "response": " A wren", "chosen": " A wren", "rejected": " "},),
)


def miracl(query: str, right: list[str], wrong: list[str]) -> Raw:
    positive, negative = ([{"docid": "5#0", "title": "", "text": text} for text in side] for side in (right, wrong))
    return {"query_id": "7", "query": query, "positive_passages": positive, "negative_passages": negative}


MIRACL = Sample(
    [
        (miracl("江長？", ["六千公里。", "很長。"], ["河在北。"]), pair(talk("江長？"), "六千公里。", "河在北。")),
        (miracl("琵琶湖は？", ["滋賀県。"], ["富士山。", "京都。"]), pair(talk("琵琶湖は？"), "滋賀県。", "富士山。")),
    ],
    bad=(miracl("誰？", ["某人。"], []), miracl("何？", [], ["不明。"])),
)


def mkqa(language: str, query: str, kind: str, text: str | None) -> Raw:
    answer = {"type": kind, "entity": None, "text": text, "aliases": []}
    other = {"type": "number", "entity": None, "text": "4", "aliases": ["four"]}
    return {
        "query": "how many",
        "queries": {"en": "how many", language: query},
        "answers": {"en": [other], language: [answer, other]},
    }


def webgpt(answers: tuple[str, str], scores: tuple[float, float]) -> Raw:
    raw: Raw = {"question": {"dataset": "eli5", "id": "x1", "full_text": "Why is rain wet?"}}
    for i in (0, 1):
        raw |= {f"quotes_{i}": {"title": [], "extract": []}, f"answer_{i}": answers[i], f"score_{i}": scores[i]}
    return raw


def shp(votes: tuple[int, int]) -> Raw:
    raw = {"post_id": "a1", "history": "Beans too salty?", "labels": int(votes[0] > votes[1])}
    raw |= {"human_ref_A": "Use less salt.", "human_ref_B": "Rinse them first."}
    return raw | {"score_A": votes[0], "score_B": votes[1]}


SHP_PROMPT = talk("Beans too salty?")
SHP_ANSWERS = ("Use less salt.", "Rinse them first.")

SAMPLES: dict[str, Sample] = {
    "rm-static": HH_SPLIT,
    "full-hh-rlhf": HH_SPLIT,
    "hh-rlhf": Sample(
        [
            (
                {"chosen": f"{HH_OPEN} A wren", "rejected": f"{HH_OPEN} A bat"},
                pair(talk("Hi", "Hello", "Name a bird"), "A wren", "A bat"),
            ),
            (
                {"chosen": "\n\nHuman: Sing\n\nAssistant: La", "rejected": "\n\nHuman: Sing\n\nAssistant:  no"},
                pair(talk("Sing"), "La", " no"),
            ),
        ]
    ),
    "synthetic-instruct-gptj-pairwise": Sample(
        [
            ({"prompt": "A tree?", "chosen": "Oak.", "rejected": "Moss."}, pair(talk("A tree?"), "Oak.", "Moss.")),
            ({"prompt": "Add\n2, 3", "chosen": "5", "rejected": "I can't."}, pair(talk("Add\n2, 3"), "5", "I can't.")),
        ]
    ),
    "rlhf-reward-datasets": Sample(
        [
            (
                {"prompt": "Human: Name a bird\n\n", "chosen": "Assistant: A wren", "rejected": "Assistant: A bat"},
                pair(talk("Name a bird"), "A wren", "A bat"),
            ),
            (
                {
                    "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What is a PA?\n\n",
                    "chosen": " Assistant: Title\n\nAssistant: one who helps",
                    "rejected": "Nothing",
                },
                pair(talk("Hi", "Hello", "What is a PA?"), "Title\n\nAssistant: one who helps", "Nothing"),
            ),
        ]
    ),
    "webgpt": Sample(
        [
            (
                webgpt(("It is [1, 2].\n\nWater [3] wets[1][12].", "It [sic] is (so) wet in [2020s]."), (-0.5, 0.5)),
                Read(
                    talk("Why is rain wet?"),
                    "It [sic] is (so) wet in [2020s].",
                    ("It is.\n\nWater wets.", "It [sic] is (so) wet in [2020s]."),
                    (1, 0),
                ),
            ),
            (
                webgpt(("Water[1].", "No idea."), (1.0, -1.0)),
                Read(talk("Why is rain wet?"), "Water.", ("Water.", "No idea."), (0, 1)),
            ),
        ],
        bad=(webgpt(("", "Water."), (-1.0, 1.0)), webgpt(("Water.", "[1][2]"), (1.0, -1.0))),
    ),
    "shp": Sample(
        [
            (shp((3, 11)), Read(SHP_PROMPT, "Rinse them first.", SHP_ANSWERS, (1, 0))),
            (shp((8, 2)), Read(SHP_PROMPT, "Use less salt.", SHP_ANSWERS, (0, 1))),
        ]
    ),
    "sharegpt-vicuna": Sample(
        [
            ({"prompt": "USER: Name a lake. ASSISTANT:", "label": "Como.</s>"}, Read(talk("Name a lake."), "Como.")),
            (
                {
                    "prompt": "USER: Hi ASSISTANT: Hello</s>USER: Is USER_ID\na name? ASSISTANT: ",
                    "label": "Yes:\n\n    USER_ID = 1\n</s>",
                },
                Read(talk("Hi", "Hello", "Is USER_ID\na name?"), "Yes:\n\n    USER_ID = 1"),
            ),
        ],
        bad=({"prompt": "USER: Hi ASSISTANT:", "label": ""}, {"prompt": "USER: Hi ASSISTANT:", "label": "</s>"}),
    ),
    "local-json": Sample(
        [
            (
                {"prompt": "Human: Name a bird. Assistant:", "chosen": "A wren.", "rejected": "A bat."},
                pair(talk("Name a bird."), "A wren.", "A bat."),
            ),
            (
                {"prompt": " Human: Hi Assistant: Hello Human: Bye\nnow Assistant:", "chosen": "Bye", "rejected": "No"},
                pair(talk("Hi", "Hello", "Bye\nnow"), "Bye", "No"),
            ),
        ]
    ),
    "zhihu-kol": Sample(
        [
            (
                {"INSTRUCTION": "茶怎么泡？", "RESPONSE": "用热水。\n等三分钟。", "SOURCE": "Zhihu", "METADATA": "{}"},
                ask("茶怎么泡？", "用热水。\n等三分钟。"),
            ),
            ({"INSTRUCTION": "鸟为何唱？", "RESPONSE": "为了爱。"}, ask("鸟为何唱？", "为了爱。")),
        ],
        bad=({"INSTRUCTION": "茶？", "RESPONSE": None}, {"INSTRUCTION": None, "RESPONSE": "用热水。"}),
    ),
    "miracl-zh": MIRACL,
    "miracl-ja": MIRACL,
    "hc3-chinese": Sample(
        [
            (
                {"question": "雨为什么湿？", "human_answers": ["是水。", "不知道。"], "chatgpt_answers": ["雨是水。"]},
                ask("雨为什么湿？", "是水。"),
            ),
            ({"question": "茶？", "human_answers": ["用热水。"], "chatgpt_answers": []}, ask("茶？", "用热水。")),
        ],
        bad=({"question": "雨？", "human_answers": [], "chatgpt_answers": ["水。"]},),
    ),
    "mkqa-zh": Sample(
        [
            (mkqa("zh_cn", "几个？", "number", "四个"), ask("几个？", "四个")),
            (mkqa("zh_cn", "湿吗？", "binary", "是"), ask("湿吗？", "是")),
        ],
        bad=(mkqa("zh_cn", "谁？", "unanswerable", None), mkqa("zh_cn", "为何？", "long_answer", "")),
    ),
    "mkqa-ja": Sample(
        [
            (mkqa("ja", "いくつ？", "number", "四つ"), ask("いくつ？", "四つ")),
            (mkqa("ja", "湖は？", "entity", "琵琶湖"), ask("湖は？", "琵琶湖")),
        ],
        bad=(mkqa("ja", "誰？", "unanswerable", None),),
    ),
    "qg-jaquad": Sample(
        [
            (
                {"question": "都は？", "answer": "東京", "sentence": "都は東京。", "paragraph": "都は東京。人も多い。"},
                ask("都は？", "都は東京。"),
            ),
            (
                {"question": "人は？", "answer": "多い", "sentence": "人も多い。", "paragraph": "都は東京。人も多い。"},
                ask("人は？", "人も多い。"),
            ),
        ]
    ),
    "qag-jaquad": Sample(
        [
            (
                {"questions": ["都は？", "人は？"], "answers": ["東京", "多い"], "paragraph": "都は東京。人も多い。"},
                ask("都は？", "都は東京。人も多い。"),
            ),
            ({"questions": ["雨は？"], "answers": ["水"], "paragraph": "雨は水。"}, ask("雨は？", "雨は水。")),
        ]
    ),
    "oasst-ranked": Sample(
        [
            (
                {"prompt": "Human: Name a bird.\n\nAssistant:", "responses": ["A wren.", "A hen?", "A bat."]},
                Read(talk("Name a bird."), "A wren.", ("A wren.", "A hen?", "A bat."), (0, 1, 2)),
            ),
            ({"prompt": "Sing", "responses": ["La", "No"]}, pair(talk("Sing"), "La", "No")),
        ]
    ),
    "alpaca": Sample(
        [
            (
                {"instruction": "Name a bird.", "input": "", "output": "A wren.", "text": "Below is an instruction"},
                Read(talk("Name a bird."), "A wren."),
            ),
            ({"instruction": "Add.", "input": "2, 3", "output": "5"}, Read(talk("Add.\n2, 3"), "5")),
        ],
        bad=({"instruction": "Draw a bird.", "input": "", "output": ""},),
    ),
}

# Where the header of a preset names its set by another name than its path.
OTHER_PATHS = {"local-json": "data/train.json", "oasst-ranked": None}


def preset(name: str, /, **source: Any) -> SourceSettings:
    return resolve_preset(SourceSettings(preset=str(FOLDER / f"{name}.yaml"), **source), SETTINGS)


def header(name: str) -> tuple[str, str, str, str]:
    """Set, what it holds, steps and splits, as the first line of the preset says."""
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# (.+?): (.+)\.   steps: (1, 2, 3|1, 3)   splits: (.+)", first)
    assert found, f"{name}: {first}"
    return found[1], found[2], found[3], found[4]


def read(name: str, raws: list[Raw] | tuple[Raw, ...], kind: Kind, folder: Path) -> list[Any]:
    """Each row, or the UserError that it raises."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(raw, ensure_ascii=False) + "\n" for raw in raws), encoding="utf-8")
    source = preset(name, path=str(file))
    rows: list[Any] = []
    for place in open_source(source).rows():
        try:
            rows.append(read_row(place, source, kind))
        except UserError as error:
            rows.append(error)
    return rows


@pytest.mark.parametrize("name", SAMPLES)
def test_rows_in_the_layout_of_the_set_hold_what_is_written_beside_them(name, tmp_path):
    raws, expected = zip(*SAMPLES[name].rows, strict=True)
    places = [f"{tmp_path / 'rows.jsonl'}:{i}" for i in range(1, len(raws) + 1)]
    both = list(zip(expected, places, strict=True))
    assert read(name, raws, "prompt", tmp_path) == [PromptRow(row.prompt, where) for row, where in both]
    assert read(name, raws, "sft", tmp_path) == [SFTRow(row.prompt, row.best, where) for row, where in both]
    ranked = read(name, raws, "ranking", tmp_path)
    if header(name)[2] == "1, 2, 3":
        assert ranked == [RankingRow(row.prompt, row.answers, row.ranks, where) for row, where in both]
    else:
        assert all("this step needs ranked answers" in str(error) for error in ranked)


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.bad])
@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_rows_of_the_set_that_lack_a_text_are_bad_for_every_step_and_skipped(name, kind, tmp_path):
    rows = read(name, SAMPLES[name].bad, kind, tmp_path)
    assert all(isinstance(row, UserError) for row in rows), rows
    assert preset(name, path="rows.jsonl").on_bad_row == "skip"


def test_only_presets_of_sets_with_known_bad_rows_skip_any():
    skipping = {name for name in SAMPLES if preset(name, path="rows.jsonl").on_bad_row == "skip"}
    assert skipping == {name for name, sample in SAMPLES.items() if sample.bad}


# -- the folder --------------------------------------------------------------------------------------------


def test_every_preset_has_a_sample():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SAMPLES)
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", *(f"{name}.yaml" for name in SAMPLES)}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_header_names_the_set_that_is_loaded(name):
    expected = OTHER_PATHS.get(name, header(name)[0])
    if expected is None:
        with pytest.raises(UserError, match="has no `path`"):
            preset(name)
    else:
        assert preset(name).path == expected


@pytest.mark.parametrize("name", SAMPLES)
def test_a_preset_of_a_set_without_a_second_split_says_to_leave_heldout_null(name):
    second = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]
    assert second.startswith("# No held-out split: leave data.heldout null.") == ("," not in header(name)[3])


README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_exactly_the_presets_each_as_its_header_says():
    cells = [tuple(line.strip("| ").split(" | ")) for line in README.splitlines() if ".yaml | " in line]
    assert cells == [(f"{name}.yaml", *header(name)) for name in sorted(SAMPLES)]


def test_the_example_of_the_readme_trains_on_one_split_and_holds_out_another():
    example = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert example
    data = DataSettings.model_validate(yaml.safe_load(example[1])["data"])
    sources = [resolve_preset(source, SETTINGS) for source in (*data.train, *data.heldout)]
    assert [(source.path, source.split) for source in sources] == [
        ("stanfordnlp/SHP", "train"),
        ("stanfordnlp/SHP", "validation"),
    ]


def test_the_parquet_copy_of_a_set_in_several_parts_reads_as_the_readme_says(tmp_path):
    for part, question in [("all", "雨？"), ("law", "法？")]:
        (tmp_path / part / "train").mkdir(parents=True)
        row = {"question": question, "human_answers": ["是水。"], "chatgpt_answers": ["水。"]}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / part / "train" / "0000.parquet")
    assert "add `name: null, subset: all`" in README
    source = preset("hc3-chinese", path=str(tmp_path), name=None, subset="all")
    rows = [read_row(place, source, "sft") for place in open_source(source).rows()]
    assert [(row.prompt, row.response) for row in rows] == [(talk("雨？"), "是水。")]


# -- real files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, file, kind, num_rows",
    [
        ("oasst-ranked", "oasst_en/oasst_en.ranked.jsonl", "ranking", 212),
        ("alpaca", "oasst_zh/oaast_sft_zh.json", "sft", 766),
    ],
)
def test_a_real_file_reads_whole(name, file, kind, num_rows):
    source = preset(name, path=real_file(file))
    rows = [read_row(place, source, kind) for place in open_source(source).rows()]
    assert len(rows) == num_rows
    assert not any("Human:" in turn["content"][:8] for row in rows for turn in row.prompt)
