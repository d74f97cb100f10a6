"""Packs hold every row once and little air; blocks are the documents' tokens, end to end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tristage.config import SourceSettings
from tristage.data import packing
from tristage.data.collate import collate_sft
from tristage.data.packing import Blocks, PackedRows, pack
from tristage.data.sources import open_source
from tristage.data.store import SCHEMA, Rows, prepare
from tristage.data.tokenize import EncodingRules, Example
from tristage.quickstart.network import make_tokenizer

thorough = settings(max_examples=80, deadline=None, database=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)


def rows_of(examples: list[Example], rows_a_chunk: int = 3) -> Rows:
    """As if read from a cache: several chunks, of which some hold more than one row."""
    columns = [
        {
            "ids": row.ids,
            "lengths": [len(row.ids)],
            "prompt_length": row.prompt_length,
            "also_trained": [place for span in row.also_trained for place in span],
            "ranks": [],
            "length": len(row.ids),
        }
        for row in examples
    ]
    chunks = [columns[i : i + rows_a_chunk] for i in range(0, len(columns), rows_a_chunk)]
    return Rows(pyarrow.concat_tables([pyarrow.Table.from_pylist(chunk, SCHEMA) for chunk in chunks or [[]]]), "")


def documents_of(*lengths: int) -> Rows:
    """Documents of some numbers of tokens; no token comes twice."""
    tokens = itertools.count()
    return rows_of([Example(list(itertools.islice(tokens, length)), 0) for length in lengths])


# -- packs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_packs", [1, 2, 1024])
@thorough
@example(lengths=[], room=0, seed=0)
@given(lengths=st.lists(st.integers(1, 30), max_size=100), room=st.integers(0, 30), seed=SEEDS)
def test_every_row_is_in_one_pack_and_no_pack_is_above_its_capacity(open_packs, lengths, room, seed):
    capacity = max(lengths, default=1) + room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_OPEN_PACKS", open_packs)
        packs = pack(lengths, capacity, seed)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    assert all(1 <= len(members) and sum(lengths[row] for row in members) <= capacity for members in packs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "lengths, capacity, num_packs",
    [
        ([5] * 7, 10, 4),  # pairs, and one alone
        ([10, 10, 10], 10, 3),  # full ones take nothing more
        ([6, 6, 6, 6], 11, 4),  # no two fit
        ([9, 8, 2, 1], 11, 2),  # 9 2, 8 1 or 9 1, 8 2: whatever the order
        ([1] * 100, 10, 10),
    ],
)
def test_packs_by_hand(lengths, capacity, num_packs, seed):
    assert len(pack(lengths, capacity, seed)) == num_packs


@pytest.mark.parametrize("seed", range(5))
def test_packs_are_nearly_full(seed):
    """The bound is the tokens over the capacity. Taking rows as they come, one pack at a time, needs a fifth more."""
    lengths = np.random.default_rng(seed).lognormal(3, 0.8, size=2000).astype(int).clip(1, 100)
    assert len(pack(lengths, 100, seed)) <= 1.02 * lengths.sum() / 100


def test_the_seed_and_nothing_else_decides_the_packs():
    lengths = [1 + i % 9 for i in range(60)]
    first, again, other = ([members.tolist() for members in pack(lengths, 20, seed)] for seed in (3, 3, 4))
    assert first == again != other
    assert sorted(map(sorted, first)) != sorted(map(sorted, other))  # other neighbours, not only another order


def test_the_rows_of_a_pack_come_from_all_over_the_set():
    packs = pack([10] * 1000, 100, seed=0)
    means = np.array([members.mean() for members in packs])
    assert len(packs) == 100 and abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.3
    assert means.std() < 2 * 289 / 10**0.5  # the mean of ten numbers drawn from 0 to 999; in order it is 289


def test_packed_rows_are_the_rows_of_their_packs():
    examples = [Example([i] * (i % 4 + 2), 1 + i % 2, ((0, 1),) if i % 3 == 0 else ()) for i in range(20)]
    rows = rows_of(examples).take(np.arange(19, 4, -1))  # a set that is part of a table, in another order
    packed = PackedRows(rows, 12, seed=1)
    assert len(packed) == len(packed.packs) == len(packed.lengths)
    assert [packed[i] for i in range(len(packed))] == [[rows[int(row)] for row in members] for members in packed.packs]
    found = [each for members in packed for each in members]
    assert sorted(found, key=lambda each: each.ids) == examples[5:]
    assert packed.lengths.tolist() == [sum(len(each.ids) for each in members) for members in packed]
    assert max(packed.lengths) <= 12


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_by_hand():
    """Documents of 3, 1 and 4 tokens in blocks of 3: 0 1 2 | 3 4 5 | 6 7."""
    blocks = Blocks(documents_of(3, 1, 4), 3)
    assert (len(blocks), blocks.num_tokens, blocks.lengths.tolist()) == (3, 8, [3, 3, 2])
    assert list(blocks) == [Example([0, 1, 2], 0), Example([3, 4, 5], 0), Example([6, 7], 0)]


@thorough
@given(
    lengths=st.lists(st.integers(1, 12) | st.integers(50, 90), max_size=25),
    block_tokens=st.integers(1, 40),
    data=st.data(),
)
def test_blocks_are_the_joined_documents_cut(lengths, block_tokens, data):
    """Documents may be any part of a table in any order, and blocks may be asked for in any order."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=int)
    documents = documents_of(*lengths).take(order[: data.draw(st.integers(0, len(lengths)))])
    stream = [token for document in documents for token in document.ids]
    expected = [stream[i : i + block_tokens] for i in range(0, len(stream), block_tokens)]
    blocks = Blocks(documents, block_tokens)
    assert len(blocks) == len(expected) and blocks.num_tokens == len(stream)
    assert blocks.lengths.tolist() == [len(block) for block in expected]
    for i in data.draw(st.permutations(range(len(blocks)))):
        assert blocks[i] == Example(expected[i], 0)


def test_a_big_document_fills_block_after_block():
    blocks = Blocks(documents_of(2, 100_000, 5), 1024)
    assert len(blocks) == 98 and blocks.lengths[-1] == 100_007 - 97 * 1024
    assert [blocks[i].ids for i in (0, 50, 97)] == [
        [*range(1024)], [*range(50 * 1024, 51 * 1024)], [*range(97 * 1024, 100_007)]
    ]  # fmt: skip


@pytest.mark.parametrize("lengths, outside", [((3, 1, 4), (3, -1, 100)), ((), (0, -1))])
def test_there_is_no_block_outside(lengths, outside):
    blocks = Blocks(documents_of(*lengths), 3)
    for i in outside:
        with pytest.raises(IndexError):
            blocks[i]


def test_every_token_of_a_block_but_its_first_is_trained():
    batch = collate_sft([*Blocks(documents_of(3, 1, 4), 3)], pad_id=9)
    assert batch.input_ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 9]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 0]]


def test_an_eos_ends_every_document_of_a_text_file(tmp_path: Path):
    """Whatever its length: a token limit and a policy for long rows are no matter of text."""
    words = ["one ", "two ", "three "]
    texts = ["one two ", "three ", "one " * 40]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = make_tokenizer(words)
    one, two, three = (tokenizer.convert_tokens_to_ids(word) for word in words)
    source = open_source(SourceSettings(path=str(tmp_path / "text.jsonl")))
    policy = EncodingRules("text", max_tokens=8, too_long="truncate_left")
    documents = prepare(source, tokenizer, policy, skip_bad=False, cache=tmp_path / "cache").rows
    eos = tokenizer.eos_token_id
    stream = [one, two, eos, three, eos, *[one] * 40, eos]
    assert [block.ids for block in Blocks(documents, 4)] == [stream[i : i + 4] for i in range(0, 46, 4)]
