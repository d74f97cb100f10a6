"""Who trains on which row: prompts decide sides, shares and halves, and whatever is odd is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from step1_sft.config import SFTConfig
from tests.helpers import tiny
from tests.helpers.tokenizers import default as byte_default
from tristage import dist
from tristage.config import RunSettings, SourceSettings, load_config
from tristage.data.sets import fingerprint, load_heldout, load_sets
from tristage.data.store import Rows
from tristage.errors import UserError
from tristage.models.tokenizer import load_tokenizer
from tristage.training import preflight, run

LONG = "fig " * 60  # over the 64 tokens of tiny's settings
BAD = '{"prompt": "no answer"}'


class Bench:
    """Files of rows that serve all three steps, and their sets."""

    def __init__(self, folder: Path, model: str, tokenizer: Any) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer

    def file(self, name: str, prompts: Sequence[object], answer: str = "fig", bad_lines: int = 0) -> str:
        rows = [json.dumps({"prompt": f"Name {each}.", "chosen": answer, "rejected": "ash"}) for each in prompts]
        path = self.folder / name
        path.write_text("\n".join(rows + [BAD] * bad_lines))
        return str(path)

    def settings(self, train: object, *overrides: str, step: int = 1) -> RunSettings:
        """`train` as in YAML: a path, a mapping, or a list of them."""
        rows = f"data.train={json.dumps(train)}"
        if step == 3:
            return tiny.ppo_config(self.folder, self.model, self.model, "-", 0, rows, *overrides)
        make = tiny.sft_config if step == 1 else tiny.reward_model_config
        return make(self.folder, self.model, "-", 0, rows, *overrides)

    def sets(self, train: object, *overrides: str, step: int = 1) -> tuple[Rows, Rows]:
        return load_sets(self.settings(train, *overrides, step=step), self.tokenizer)

    def prompts(self, train: object, *overrides: str, step: int = 1) -> tuple[list[str], list[str]]:
        """(training, held-out) prompts, without the words around them, as the files have them."""
        train_rows, heldout = self.sets(train, *overrides, step=step)
        return prompts_of(train_rows), prompts_of(heldout)


def prompts_of(rows: Rows) -> list[str]:
    lines: dict[str, list[str]] = {}
    found = []
    for i in range(len(rows)):
        file, _, line = rows.where(i).rpartition(":")
        text = lines.setdefault(file, Path(file).read_text().split("\n"))[int(line) - 1]
        found.append(json.loads(text)["prompt"].removeprefix("Name ").removesuffix("."))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    path = tiny.write_model(tmp_path_factory.mktemp("model"))
    return path, load_tokenizer(path)


@pytest.fixture
def bench(tmp_path: Path, model: tuple[str, Any]) -> Bench:
    return Bench(tmp_path, *model)


def named(start: int, stop: int) -> list[str]:
    return [str(i) for i in range(start, stop)]


# -- held-out rows ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_wholly_on_one_side_in_all_sources(bench):
    sources = [bench.file("a.jsonl", named(0, 400) * 2), bench.file("b.jsonl", named(200, 600), answer="pear")]
    train, heldout = bench.prompts(sources)
    assert not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter(named(0, 400) * 2 + named(200, 600))
    assert 0.15 < len(set(heldout)) / 600 < 0.25  # 0.2, and three standard deviations of 600 draws are 0.05


def test_the_side_of_a_prompt_is_its_own_in_any_order_and_in_a_grown_file(bench):
    _, heldout = bench.prompts(bench.file("rows.jsonl", named(0, 300)))
    _, of_reversed = bench.prompts(bench.file("reversed.jsonl", named(0, 300)[::-1]))
    _, of_grown = bench.prompts(bench.file("grown.jsonl", named(-100, 500)))
    assert of_reversed == heldout[::-1]
    assert [prompt for prompt in of_grown if prompt in set(named(0, 300))] == heldout
    assert len(of_grown) > len(heldout) > 30


def test_a_larger_fraction_adds_prompts_to_the_held_out(bench):
    file = bench.file("rows.jsonl", named(0, 300))
    small, large = (set(bench.prompts(file, f"data.heldout_fraction={part}")[1]) for part in (0.1, 0.5))
    assert small < large and 0.4 < len(large) / 300 < 0.6


def test_the_split_seed_moves_the_sides_and_the_seed_does_not(bench):
    file = bench.file("rows.jsonl", named(0, 300))
    _, heldout = bench.prompts(file)
    assert bench.prompts(file, "seed=5")[1] == heldout
    _, moved = bench.prompts(file, "data.split_seed=5")
    assert len(set(moved) & set(heldout)) < len(heldout) / 2  # a fifth, by chance


def test_a_held_out_set_of_its_own_leaves_the_training_rows_whole(bench):
    files = bench.file("train.jsonl", named(0, 30)), bench.file("heldout.jsonl", named(30, 40))
    assert bench.prompts(files[0], f"data.heldout={files[1]}") == (named(0, 30), named(30, 40))
    assert bench.prompts(files[0], f"data.heldout={files[1]}", "data.heldout_limit=3")[1] == named(30, 33)


# -- shares of the steps ---------------------------------------------------------------------------------------------


def shares(bench: Bench, train: object, *overrides: str) -> list[list[str]]:
    """Prompts of steps 1, 2 and 3, and last the held-out ones, which are the same for all."""
    found = [bench.prompts(train, "data.data_split=2,4,4", *overrides, step=step) for step in (1, 2, 3)]
    assert found[0][1] == found[1][1] == found[2][1]
    return [*(prompts for prompts, _ in found), found[0][1]]


def test_the_steps_share_the_prompts_that_are_not_held_out(bench):
    """Each source for itself, so that every step sees all of them."""
    files = [bench.file("a.jsonl", named(0, 800) * 2), bench.file("b.jsonl", named(800, 1600))]
    parts = shares(bench, files)
    assert Counter(prompt for part in parts for prompt in part) == Counter(named(0, 800) * 2 + named(800, 1600))
    assert len(set().union(*parts)) == sum(len(set(part)) for part in parts)
    for source in (set(named(0, 800)), set(named(800, 1600))):
        sizes = [len(source & set(part)) for part in parts]
        wanted = [0.8 * 0.2, 0.8 * 0.4, 0.8 * 0.4, 0.2]
        assert [size / 800 for size in sizes] == pytest.approx(wanted, abs=0.05)


def test_the_shares_stay_in_any_order_and_in_a_grown_file(bench):
    parts = shares(bench, bench.file("rows.jsonl", named(0, 200)))
    of_reversed = shares(bench, bench.file("reversed.jsonl", named(0, 200)[::-1]))
    of_grown = shares(bench, bench.file("grown.jsonl", named(-50, 250)))
    assert [part[::-1] for part in of_reversed] == parts
    assert [[prompt for prompt in part if prompt in set(named(0, 200))] for part in of_grown] == parts


def test_with_a_held_out_set_of_its_own_the_steps_share_all_prompts(bench):
    heldout = bench.file("heldout.jsonl", named(200, 210))
    parts = shares(bench, bench.file("train.jsonl", named(0, 200)), f"data.heldout={heldout}")
    assert sorted(map(int, parts[0] + parts[1] + parts[2])) == [*range(200)] and parts[3] == named(200, 210)


def test_one_step_can_have_all_and_without_shares_every_step_has(bench):
    file = bench.file("rows.jsonl", named(0, 50))
    whole = [bench.prompts(file, step=step) for step in (1, 2, 3)]
    assert whole[0] == whole[1] == whole[2] == bench.prompts(file, "data.data_split=[0, 1, 0]", step=2)


# -- several sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def two(bench) -> tuple[str, str, str]:
    """Two training files of 0-9 and 10-19, and the override that gives a held-out one."""
    heldout = bench.file("heldout.jsonl", named(100, 110))
    return bench.file("a.jsonl", named(0, 10)), bench.file("b.jsonl", named(10, 20)), f"data.heldout={heldout}"


def test_sources_are_joined_in_order_from_strings_and_mappings_of_a_yaml_list(bench, two, tmp_path):
    a, b, heldout = two
    values = {"train": [b, {"path": a, "limit": 3}], "heldout": {"path": heldout.partition("=")[2]}}
    path = tiny.write_yaml(tmp_path / "list.yaml", bench.settings(a).model_dump(mode="json") | {"data": values})
    settings = load_config(SFTConfig, ["--config", path])
    assert settings.data.train == (SourceSettings(path=b), SourceSettings(path=a, limit=3))
    train, held = load_sets(settings, bench.tokenizer)
    assert prompts_of(train) == named(10, 20) + named(0, 3) and prompts_of(held) == named(100, 110)


@pytest.mark.parametrize("weight", [2, 3])
def test_a_whole_weight_is_so_many_copies_of_each_row_of_that_source(bench, two, weight):
    a, b, heldout = two
    train, _ = bench.prompts([{"path": a, "weight": weight}, b], heldout)
    assert train == named(0, 10) * weight + named(10, 20)


def test_half_a_weight_is_a_fixed_half_of_the_rows(bench):
    half = weighted(bench, "rows.jsonl", named(0, 300), 0.5)
    assert set(half.values()) == {1} and 120 < len(half) < 180
    more = weighted(bench, "rows.jsonl", named(0, 300), 1.5)
    assert more == Counter(named(0, 300)) + half
    assert weighted(bench, "reversed.jsonl", named(0, 300)[::-1], 0.5) == half
    grown = weighted(bench, "grown.jsonl", named(-200, 400), 0.5)
    assert Counter({prompt: grown[prompt] for prompt in named(0, 300) if grown[prompt]}) == half
    assert weighted(bench, "rows.jsonl", named(0, 300), 0.5, "seed=5") == half
    assert weighted(bench, "rows.jsonl", named(0, 300), 0.5, "data.split_seed=5") != half


def weighted(bench: Bench, name: str, prompts: list[str], weight: float, *overrides: str) -> Counter[str]:
    heldout = bench.file("heldout.jsonl", ["another"])
    source = {"path": bench.file(name, prompts), "weight": weight}
    return Counter(bench.prompts(source, f"data.heldout={heldout}", *overrides)[0])


def test_a_weight_copies_no_held_out_row(bench):
    file = bench.file("rows.jsonl", named(0, 50))
    assert bench.prompts({"path": file, "weight": 2})[1] == bench.prompts(file)[1]


def test_limits_take_the_first_rows_of_each_training_source(bench, two):
    a, b, heldout = two
    train, held = bench.prompts([{"path": a, "limit": 5}, b], heldout, "data.limit=7")
    assert train == named(0, 5) + named(10, 17)
    assert held == named(100, 110)


# -- what is odd is said ---------------------------------------------------------------------------------------------


def test_training_on_held_out_prompts_is_an_error_until_it_is_asked_for(bench, capsys):
    train = bench.file("train.jsonl", named(0, 10))
    heldout = f"data.heldout={bench.file('heldout.jsonl', ['20', '7', '3', '30'], answer='pear')}"
    with pytest.raises(UserError) as error:
        bench.sets(train, heldout)
    for part in ("sft.yaml: 2 training rows", f"the first is {train}:4;", "`data.heldout_overlap: drop`", "`allow`"):
        assert part in str(error.value)
    capsys.readouterr()
    assert bench.prompts(train, heldout, "data.heldout_overlap=allow")[0] == named(0, 10)
    assert "whose prompt is held out" not in capsys.readouterr().out
    dropped = [each for each in named(0, 10) if each not in ("3", "7")]
    assert bench.prompts(train, heldout, "data.heldout_overlap=drop") == (dropped, ["20", "7", "3", "30"])
    assert "dropped 2 training rows whose prompt is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.heldout_fraction=1e-9"], r"sft.yaml: the held-out set is empty: .* `data.heldout_fraction`, 1e-09;"),
        (["data.data_split=0,1,1"], r"sft.yaml: the training set is empty: .* share of `data.data_split`"),
        (["max_tokens=2"], r"rows.jsonl: no usable row \(20 longer than 2 tokens\); give"),
    ],
)
def test_an_empty_set_is_an_error(bench, overrides, message):
    with pytest.raises(UserError, match=message):
        bench.sets(bench.file("rows.jsonl", named(0, 20)), *overrides)


def test_what_is_not_read_and_special_tokens_in_contents_are_said_once_with_counts(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    rows = [{"prompt": f"Name {name}.", "response": "fig", "id": name, "tags": []} for name in named(0, 20)]
    rows[3] |= {"source": "us"}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    load_sets(tiny.sft_config(tmp_path, model, str(file)), load_tokenizer(model))
    printed = capsys.readouterr().out
    assert printed.count(f"{file}: columns that are not read: `id` (20 rows), `source` (1 rows)\n") == 1
    assert "special tokens" not in printed


def test_special_tokens_in_contents_are_said_once_with_counts_and_the_first_place(tmp_path, capsys):
    prompts = [f"Name {name}." for name in named(0, 20)]
    prompts[4] += "</s>"
    prompts[7] += "</s></s>"
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "response": "fig"}) for prompt in prompts))
    load_sets(tiny.sft_config(tmp_path, "-", str(file), 0, "max_tokens=500"), byte_default())
    said = f"{file}: special tokens spelled out in contents, kept as plain text: </s> (2 rows, first {file}:5)\n"
    assert capsys.readouterr().out.count(said) == 1


def test_no_usable_row_names_the_first_malformed_one(bench, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "Hi", "answer": "there"}\n' * 3)
    with pytest.raises(UserError, match=r"no usable row \(3 malformed\); the first .*rows.jsonl:1: .*prompt: question"):
        bench.sets(str(file), "data.on_bad_row=skip")


def test_a_row_over_the_limit_in_bytes_is_malformed_by_the_setting(bench):
    file = bench.file("rows.jsonl", [*named(0, 20), "x" * 300])
    with pytest.raises(UserError, match=r"rows.jsonl:21: a row of more than 200 bytes, .* `data.max_row_bytes`"):
        bench.sets(file, "data.max_row_bytes=200")
    assert sum(map(len, bench.sets(file, "data.max_row_bytes=200", "data.on_bad_row=skip"))) == 20
    assert sum(map(len, bench.sets(file, "max_tokens=1000"))) == 21  # not served from the set with the other limit


def test_malformed_rows_are_skipped_where_the_source_or_the_run_says_so(bench, capsys):
    good, bad = bench.file("good.jsonl", named(0, 10)), bench.file("bad.jsonl", named(10, 20), bad_lines=2)
    heldout = f"data.heldout={bench.file('heldout.jsonl', ['x'])}"
    for sources, overrides in (
        ([good, {"path": bad, "on_bad_row": "skip"}], []),
        ([{"path": good, "on_bad_row": "error"}, bad], ["data.on_bad_row=skip"]),
    ):
        assert bench.prompts(sources, heldout, *overrides)[0] == named(0, 20)
        assert f"{bad}: 2 malformed rows skipped, listed in " in capsys.readouterr().out
    for sources, overrides in (
        ([{"path": good, "on_bad_row": "skip"}, bad], []),
        ([good, {"path": bad, "on_bad_row": "error"}], ["data.on_bad_row=skip"]),
    ):
        with pytest.raises(UserError, match=f"{bad}:11: "):
            bench.sets(sources, heldout, *overrides)


def test_every_source_says_how_many_rows_it_gave(bench, capsys):
    """Rows split off leave what was dropped to the line of the training rows."""
    short, long = bench.file("short.jsonl", named(0, 40)), bench.file("long.jsonl", ["trees"], answer=LONG)
    both = bench.file("both.jsonl", named(40, 80))
    with Path(both).open("a") as more:
        more.write("\n" + Path(long).read_text())
    train, held = bench.prompts(both)
    bench.sets([short, both], f"data.heldout={both}", "data.heldout_overlap=allow")
    bench.sets(short, f"data.heldout={both}", "data.too_long=truncate_right")
    assert capsys.readouterr().out.splitlines() == [
        f"{both}: training rows: {len(train)} (dropped: 1 longer than 64 tokens)",
        f"{both}: held-out rows: {40 - len(train)}",
        f"{short}: training rows: 40",
        f"{both}: training rows: 40 (dropped: 1 longer than 64 tokens)",
        f"{both}: held-out rows: 40 (dropped: 1 longer than 64 tokens)",
        f"{short}: training rows: 40",
        f"{both}: held-out rows: 41 (1 truncated)",
    ]
    assert len(train) + len(held) == 40 and held


# -- ranks agree -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_data_apart(bench):
    rows, heldout = bench.file("rows.jsonl", named(0, 20)), bench.file("heldout.jsonl", ["x"])

    def found(*overrides: str) -> str:
        return fingerprint(bench.sets(rows, f"data.heldout={heldout}", *overrides))

    seen = [found()]
    assert found() == found("seed=3", "output=elsewhere") == seen[0]
    seen += [found("data.limit=19"), found("data.train_on=everything")]
    bench.file("rows.jsonl", [*named(0, 19), "another"])
    seen.append(found())
    bench.file("heldout.jsonl", ["y"])
    seen.append(found())
    assert len(set(seen)) == 5


def test_ranks_with_other_data_are_refused(bench, monkeypatch):
    settings = bench.settings(bench.file("rows.jsonl", named(0, 20)), "resume=never")
    monkeypatch.setattr(dist, "init", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    monkeypatch.setattr(run, "on_main", lambda action: {"models": {}})  # the lock, and what is written
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [("first", mine[1]), ("second", "abc:20")])
    with pytest.raises(UserError, match="rank 1 on second has other data than rank 0 on first; give all"):
        run.start(settings, "abc:21")
    assert run.start(settings, "abc:20") == (torch.device("cpu"), None)


def test_held_out_rows_alone_are_those_of_both_and_leave_the_training_rows_unread(bench):
    train, held = bench.file("train.jsonl", range(40)), bench.file("held.jsonl", range(40, 50))

    def alone(path: str, *overrides: str) -> list[Any]:
        return list(load_heldout(bench.settings(path, *overrides), bench.tokenizer))

    for overrides in ((f"data.heldout={held}", "data.heldout_limit=7"), ()):
        assert alone(train, *overrides) == list(bench.sets(train, *overrides)[1]) != []
    assert len(alone(bench.file("broken.jsonl", [], bad_lines=1), f"data.heldout={held}")) == 10
