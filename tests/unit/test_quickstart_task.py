"""The quickstart's task: the rule by hand, the generator's promises, the tokenizer's round trips."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from tristage.quickstart import prepare, task
from tristage.quickstart.network import make_network, make_tokenizer

PROMPT = "Name four fruits."


@pytest.mark.parametrize(
    "response, grade",
    [
        ("fig, pear, plum, kiwi.", 1.0),
        (" fig, pear, plum, kiwi. ", 1.0),
        ("fig, pear, plum.", 3 / 4),
        ("fig, pear, plum, kiwi, peach.", (4 - 1) / 4),
        ("fig, pear, plum, fig.", 3 / 4 - 0.1),
        ("fig, fig, fig, fig.", 0.0),  # 1/4 - 3 * 0.1 is negative
        ("fig, pear, plum, dog.", 3 / 4 - 0.1),
        ("fig, pear, dog, cat.", 2 / 4 - 2 * 0.1),
        ("fig, pear, plum, kiwi", 1.0 - 0.1),
        ("fig pear plum kiwi.", 0.0),
        ("dog, cat, cow, goat.", 0.0),
        ("", 0.0),
    ],
)
def test_the_rule_by_hand(response, grade):
    assert task.gold(PROMPT, response) == pytest.approx(grade)


def test_the_rule_reads_a_prompt_in_its_chat_template():
    assert task.gold("Human: Please list 2 trees.\nAssistant:", "oak, elm.") == 1.0
    assert task.gold_scores([PROMPT, "Name two fruits."], ["fig, pear.", "fig, pear."]) == [0.5, 1.0]
    with pytest.raises(ValueError, match="not a prompt of this task"):
        task.parse_prompt("Name four fruits and two trees.")


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict]]:
    return task.make_data(task.SIZES["small"], seed=0)


def test_the_same_seed_writes_the_same_rows_and_another_seed_others(data):
    tiny = task.SIZES["tiny"]
    assert task.make_data(tiny, 3) == task.make_data(tiny, 3) != task.make_data(tiny, 4)


def test_held_out_prompts_are_never_trained_on_and_there_are_thousands(data):
    prompts = {
        split: {row["prompt"] for name, rows in data.items() if name.endswith(split) for row in rows}
        for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]
    assert len(prompts["train"]) >= 4000 and len(prompts["heldout"]) >= 500


def test_demonstrations_are_of_mixed_quality(data):
    grades = [task.gold(row["prompt"], row["response"]) for row in data["sft.train"]]
    assert 0.60 < sum(grades) / len(grades) < 0.75
    assert 0.35 < sum(grade == 1.0 for grade in grades) / len(grades) < 0.55


def pair_grades(rows: list[dict]) -> list[tuple[float, float]]:
    return [(task.gold(row["prompt"], row["chosen"]), task.gold(row["prompt"], row["rejected"])) for row in rows]


def test_training_labels_are_noisy_and_held_out_labels_are_the_rules(data):
    noise = [chosen < rejected for chosen, rejected in pair_grades(data["preference.train"])]
    assert 0.01 < sum(noise) / len(noise) < 0.08
    assert all(chosen > rejected for chosen, rejected in pair_grades(data["preference.heldout"]))


def test_the_longer_answer_is_no_better(data):
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in data["preference.heldout"]]
    wins = [(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths]
    assert 0.4 < sum(wins) / len(wins) < 0.6


def test_rankings_have_two_to_four_answers_in_every_case(data):
    sizes = {len(row["responses"]) for row in data["ranking.train"]}
    assert sizes <= {2, 3, 4} and 4 in sizes
    for row in data["ranking.heldout"]:
        grades = [task.gold(row["prompt"], answer) for answer in row["responses"]]
        best_first = [grades[row["ranks"].index(rank)] for rank in range(len(grades))]
        assert best_first == sorted(grades, reverse=True)


@pytest.fixture(scope="module")
def tokenizer(data):
    return make_tokenizer([text for row in data["sft.train"] for text in row.values()])


def test_answers_survive_the_tokenizer_so_that_the_rule_can_grade_them(data, tokenizer):
    for row in data["sft.heldout"]:
        for text in row.values():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("size, parameters", [("small", 700_000), ("tiny", 136_000)])
def test_networks_have_the_stated_size_and_run(tokenizer, architecture, size, parameters):
    network = make_network(tokenizer, architecture, size)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count - parameters) < 0.2 * parameters
    logits = network(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, len(tokenizer)) and torch.isfinite(logits).all()
    again = make_network(tokenizer, architecture, size)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_prepare_writes_once_and_again_when_the_arguments_change(tmp_path: Path, capsys):
    prepare.main([str(tmp_path), "--size", "tiny"])
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare.main([str(tmp_path), "--size", "tiny"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    assert "already exist" in capsys.readouterr().out
    prepare.main([str(tmp_path), "--size", "tiny", "--seed", "1", "--pad-is-eos"])
    assert json.loads((tmp_path / "prepared.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["pad_token"] == "<eos>"


def test_a_labeller_without_noise_ranks_by_the_rule():
    answers = ["fig.", "fig, pear, plum, kiwi.", "fig, pear."]
    assert task.rank(PROMPT, answers, random.Random(0), scale=0.0) == [2, 0, 1]
