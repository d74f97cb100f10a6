"""All three steps train on files in the layouts that people have, by settings alone: HH, OASST and Alpaca."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage.data.sets import fingerprint, load_sets
from tristage.models.tokenizer import load_tokenizer
from tristage.quickstart import task
from tristage.training.metrics import read_metrics

NUM_ROWS = 96
# style -> settings of each step; %s is the folder of the files
STYLES = {
    "hh": {step: ["data.train=%s/hh.jsonl.gz", "data.data_split=3,3,4"] for step in ("sft", "reward", "ppo")},
    "oasst": {
        step: ["data.train=[{path: %s/oasst.parquet, best_first: true}, {path: %s/oasst_ranks.jsonl, weight: 2}]"]
        for step in ("sft", "reward", "ppo")
    },
    "alpaca": {
        "sft": ["data.train=%s/alpaca.csv", "packing=true", "group_by_length=true"],
        "reward": ["data.train=%s/alpaca_ranked.json", "data.too_long=truncate_left", "max_tokens=32"],
        "ppo": ["data.train=%s/alpaca.csv", "data.limit=60"],
    },
    "template": {  # step 2 takes it from step 1's folder, step 3 is told again
        "sft": ["data.train=%s/alpaca.csv", "data.template=%s/own.jinja"],
        "reward": ["data.train=%s/alpaca_ranked.json"],
        "ppo": ["data.train=%s/alpaca.csv", "data.template=%s/own.jinja", "data.limit=60"],
    },
}


def write_files(folder: Path) -> None:
    """The quickstart's prompts and rankings in each layout, as each is usually stored."""
    import csv
    import gzip

    import pandas

    rng = random.Random(3)
    rankings = task.make_rankings(task.draw_prompts(NUM_ROWS, rng), NUM_ROWS, rng)
    best_first = [
        (row["prompt"], [answer for _, answer in sorted(zip(row["ranks"], row["responses"], strict=True))])
        for row in rankings
    ]
    with gzip.open(folder / "hh.jsonl.gz", "wt") as file:
        for prompt, answers in best_first:
            # An earlier exchange in front, as most of HH's rows have.
            start = f"\n\nHuman: Hello.\n\nAssistant: Hello.\n\nHuman: {prompt}\n\nAssistant: "
            file.write(json.dumps({"chosen": start + answers[0], "rejected": start + answers[-1]}) + "\n")
    frame = pandas.DataFrame(best_first, columns=["prompt", "responses"])
    frame[: NUM_ROWS // 2].to_parquet(folder / "oasst.parquet")
    with (folder / "oasst_ranks.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rankings[NUM_ROWS // 2 :])
    with (folder / "alpaca.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows([prompt, "", answers[0]] for prompt, answers in best_first)
    (folder / "alpaca_ranked.json").write_text(
        json.dumps([{"instruction": prompt, "input": "", "output": answers} for prompt, answers in best_first])
    )


def train_each_style(rank: int, folder: str) -> None:
    from step1_sft.train import main as sft
    from step2_reward_model.train import main as reward_model
    from step3_ppo.train import main as ppo

    for style, steps in STYLES.items():
        here = Path(folder) / style
        given = {step: [word.replace("%s", folder) for word in words] for step, words in steps.items()}
        config = tiny.sft_config(here, f"{folder}/model", "unused")
        sft(["--config", config.file, "max_steps=12", *given["sft"]])
        config = tiny.reward_model_config(here, f"{here}/sft/final", "unused")
        reward_model(["--config", config.file, "max_steps=3", *given["reward"]])
        config = tiny.ppo_config(here, f"{here}/sft/final", f"{here}/reward/final", "unused")
        ppo(["--config", config.file, "iterations=1", *given["ppo"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("styles")
    write_files(folder)
    tiny.write_model(folder / "model")
    template = (folder / "model/chat_template.jinja").read_text()
    (folder / "own.jinja").write_text(template.replace("'Human: '", "'Human: Human: '"))
    run_ranks(2, train_each_style, str(folder), timeout=600)
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_three_steps_train_on_the_layout(folder, style):
    here = folder / style
    losses = [line["sft/loss"] for line in read_metrics(here / "sft/metrics.jsonl") if line["split"] == "heldout"]
    assert losses[-1] < losses[0]
    accuracies = [line["reward_model/accuracy"] for line in read_metrics(here / "reward/metrics.jsonl")]
    assert len(accuracies) == 5 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    first = read_metrics(here / "ppo/metrics.jsonl")[0]
    assert abs(first["objective/kl"]) < 1e-5 and first["rollout/length"] > 0
    for step in ("sft", "reward", "ppo"):
        assert (here / step / "final" / "model.safetensors").is_file()


def test_a_template_of_ones_own_goes_through_the_steps(folder):
    own = (folder / "own.jinja").read_text()
    folders = {step: folder / f"template/{step}/final" for step in ("sft", "reward", "ppo")}
    tokenizers = {step: load_tokenizer(str(path)) for step, path in folders.items()}
    assert [tokenizer.chat_template for tokenizer in tokenizers.values()] == [own] * 3
    settings = {
        "sft": tiny.sft_config(folder / "read", "unused", f"{folder}/alpaca.csv"),
        "reward": tiny.reward_model_config(folder / "read", "unused", f"{folder}/alpaca_ranked.json"),
        "ppo": tiny.ppo_config(folder / "read", "unused", "unused", f"{folder}/alpaca.csv", 0, "data.limit=60"),
    }
    default = load_tokenizer(f"{folder}/model")
    human = default.convert_tokens_to_ids("Human: ")
    for step, tokenizer in tokenizers.items():
        used, unused = load_sets(settings[step], tokenizer), load_sets(settings[step], default)
        assert json.loads((folder / "template" / step / "environment.json").read_text())["data"] == fingerprint(used)
        for by_own, by_default in ((used[0].tokens(i, 0, 99), unused[0].tokens(i, 0, 99)) for i in range(8)):
            assert by_own[:2] == [human, human] and by_default[0] == human != by_default[1]


def test_packed_steps_hold_more_tokens_than_rows_alone_could(folder):
    tokens = [line["sft/tokens"] for line in read_metrics(folder / "alpaca/sft/metrics.jsonl") if "sft/tokens" in line]
    alone = [line["sft/tokens"] for line in read_metrics(folder / "hh/sft/metrics.jsonl") if "sft/tokens" in line]
    assert max(tokens) > 2 * max(alone)
