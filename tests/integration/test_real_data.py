"""Real files through the data path: read, split, tokenised, packed, cut into blocks, shown. No model, no step.

The tokenizer is a byte-level one, so that a row's tokens decode to exactly the text that was rendered.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny
from tests.helpers.real_data import DATA, HH, needs
from tristage.cli import main as cli
from tristage.config import SourceSettings
from tristage.data.packing import PackedRows
from tristage.data.sets import load_sets, load_text_blocks
from tristage.models.tokenizer import load_tokenizer

SHAKESPEARE = DATA / "ptx/tinyshakespeare.txt"
pytestmark = needs(DATA)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of one token a byte, and a config that the settings accept."""
    folder = tmp_path_factory.mktemp("bytes") / "model"
    tiny.write_model(folder)
    symbols = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    for file in folder.glob("*token*"):
        file.unlink()
    fast.save_pretrained(folder)
    return str(folder)


def rows_of(kind: str, source: dict[str, Any] | str, model: str, folder: Path, *words: str) -> tuple[Any, Any, Any]:
    """(tokenizer, training rows, held-out rows)."""
    make = {"sft": tiny.sft_config, "ranking": tiny.reward_model_config}[kind]
    settings = make(folder, model, json.dumps(source), 0, f"data.train={json.dumps(source)}", *words)
    tokenizer = load_tokenizer(model)
    return tokenizer, *load_sets(settings, tokenizer)


def test_every_hh_dialogue_becomes_a_pair_that_decodes_to_its_text(model: str, tmp_path: Path) -> None:
    tokenizer, train, heldout = rows_of("ranking", str(HH), model, tmp_path, "max_tokens=100000")
    with gzip.open(HH, "rt") as file:
        raw = [json.loads(line) for line in file]
    assert 0.97 * len(raw) < len(train) + len(heldout) <= len(raw) == 2354  # some rows hold the same answer twice
    assert 0.15 < len(heldout) / len(train) < 0.35  # heldout_fraction 0.2
    for row in list(range(0, len(train), 97)):
        examples, ranks = train[row]
        line = raw[int(train.where(row).rpartition(":")[2]) - 1]
        assert sorted(ranks) == [0.0, 1.0]
        for example, rank in zip(examples, ranks, strict=True):
            answer = line["chosen" if rank == 0 else "rejected"].rpartition("\n\nAssistant:")[2].strip()
            text = tokenizer.decode(example.ids[example.prompt_length :])
            assert text.strip() == answer + "<eos>", train.where(row)
    prompts = [set(rows.column("prompt_hash").tolist()) for rows in (train, heldout)]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    "kind, source, rows",
    [
        ("ranking", {"path": str(DATA / "oasst_en/oasst_en.ranked.jsonl"), "best_first": True}, 212),
        ("ranking", {"path": str(DATA / "oasst_zh/oaast_rm_zh.json")}, 775),
        ("sft", {"path": str(DATA / "oasst_zh/oaast_sft_zh.json")}, 766),
        (
            "sft",
            {
                "path": str(DATA / "seed_tasks/seed_tasks.jsonl"),
                "columns": {"instruction": "instruction", "input": "instances.0.input", "output": "instances.0.output"},
            },
            175,
        ),
    ],
)
def test_every_row_of_other_sets_is_read_or_counted(
    kind: str, source: dict[str, Any], rows: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("max_tokens=100000", "data.heldout_overlap=drop")
    tokenizer, train, heldout = rows_of(kind, source, model, tmp_path, *words)
    printed = capsys.readouterr().out
    dropped = rows - len(train) - len(heldout)
    assert 0 <= dropped < 0.05 * rows, printed
    assert len(train) > 0.6 * rows and len(heldout) > 0.1 * rows
    examples = train[0][0] if kind == "ranking" else [train[0]]
    for example in examples:
        assert example.ids[-1] == tokenizer.eos_token_id and 0 < example.prompt_length < len(example.ids)
    assert "\ufffd" not in tokenizer.decode(examples[0].ids)  # no character was cut in the middle


def test_chinese_dialogues_are_packed_each_once(model: str, tmp_path: Path) -> None:
    source = {"path": str(DATA / "oasst_zh/oaast_sft_zh.json")}
    _, train, _ = rows_of("sft", source, model, tmp_path, "max_tokens=4096")
    packs = PackedRows(train, 4096, seed=0)
    members = sorted(int(row) for pack in packs.packs for row in pack)
    assert members == list(range(len(train)))
    assert packs.lengths.max() <= 4096 and packs.lengths.mean() > 0.95 * 4096
    assert int(packs.lengths.sum()) == int(train.lengths.sum())


def test_a_whole_book_becomes_blocks_and_nothing_is_lost(model: str, tmp_path: Path) -> None:
    settings = tiny.sft_config(tmp_path, model, str(HH), 0)
    tokenizer = load_tokenizer(model)
    blocks = load_text_blocks([SourceSettings(path=str(SHAKESPEARE))], settings, tokenizer, 1000)
    text = SHAKESPEARE.read_text()
    joined = np.concatenate([np.array(blocks[i].ids) for i in range(len(blocks))])
    assert len(blocks) == -(-len(joined) // 1000)  # the last is short
    assert tokenizer.decode(joined.tolist()).replace("<eos>", "").split() == text.split()


def test_data_check_reports_on_real_pairs(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny.reward_model_config(tmp_path, model, str(HH), 0)
    code = cli.main(["data", "check", settings.file, "--step", "step2_reward_model"])
    printed, errors = capsys.readouterr()
    assert (code, errors) == (1, ""), printed + errors  # some pairs stand in the file twice
    assert "helpful-base-test.jsonl.gz" in printed
