"""Masks say what is real, what is learned and what is filler, and never look at ids."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_template import chatml, default
from tristage.data.collate import collate_prompts, collate_ranking, collate_sft, pick
from tristage.data.rows import SFTRow
from tristage.data.tokenize import Example, encode_sft

PAD = 0
LONG = Example([5, 6, 7, 8, 9], prompt_length=3)
SHORT = Example([5, 1], prompt_length=1)
RANKED = ([Example([5, 6, 1], 2), Example([5, 6, 7, 1], 2), Example([5, 6, 8, 1], 2)], (1.0, 0.0, 2.0))
PAIR = ([SHORT, LONG], (0.0, 1.0))


def test_pick_keeps_fillers():
    assert pick(["a", "b", "c"], [2, None, 0]) == ["c", None, "a"]


def test_sft_by_hand():
    batch = collate_sft([LONG, SHORT], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 1, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.loss_mask.dtype) == (
        torch.long,
        torch.bool,
        torch.bool,
    )


@pytest.mark.parametrize(
    "make",
    [default, lambda: default(adds_bos=True), lambda: default(pad_token="</s>"), chatml],
    ids=["default", "bos", "pad is eos", "chatml"],
)
def test_the_loss_mask_covers_exactly_the_answer_and_its_one_eos(make):
    tokenizer = make()
    history = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": f"{tokenizer.eos_token} or {tokenizer.eos_token}?"},
    )
    rows = [SFTRow(history, "Ciao", ""), SFTRow(history[:1], "Good morning to you", "")]
    batch = collate_sft(encode_sft(rows, tokenizer, 1000)[0], tokenizer.eos_token_id)
    for row, ids, mask in zip(rows, batch.input_ids, batch.loss_mask, strict=True):
        learned = ids[mask]
        assert tokenizer.decode(learned).strip() == row.response + tokenizer.eos_token
        assert (learned == tokenizer.eos_token_id).sum() == 1


def test_the_attention_mask_ignores_pad_ids_inside_a_row():
    example = Example([PAD, 5, PAD, PAD], prompt_length=2)
    assert collate_sft([example], PAD).attention_mask.all()
    assert collate_prompts([example], [0], PAD).attention_mask.all()
    assert collate_ranking([([example, example], (0.0, 1.0))], PAD).attention_mask.all()


def test_rows_are_padded_to_the_longest_of_the_micro_batch_only():
    assert collate_sft([SHORT, SHORT], PAD).input_ids.shape == (2, 2)


def test_an_sft_filler_attends_like_the_first_row_and_learns_nothing():
    batch = collate_sft([LONG, SHORT, None], PAD)
    assert torch.equal(batch.input_ids[2], batch.input_ids[0])
    assert torch.equal(batch.attention_mask[2], batch.attention_mask[0])
    assert not batch.loss_mask[2].any() and batch.loss_mask[:2].any(dim=1).all()


def test_ranking_by_hand():
    batch = collate_ranking([RANKED, PAIR], PAD)
    assert batch.input_ids.tolist() == [
        [5, 6, 1, 0, 0],
        [5, 6, 7, 1, 0],
        [5, 6, 8, 1, 0],
        [5, 1, 0, 0, 0],
        [5, 6, 7, 8, 9],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 4, 4, 2, 5]
    assert batch.prompt_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.ranks.tolist() == [1, 0, 2, 0, 1] and batch.ranks.dtype == torch.float32
    assert batch.is_real.tolist() == [True, True]


def test_a_ranking_filler_repeats_all_answers_of_the_first_prompt():
    batch = collate_ranking([PAIR, None], PAD)
    assert torch.equal(batch.input_ids[2:], batch.input_ids[:2])
    assert torch.equal(batch.attention_mask[2:], batch.attention_mask[:2])
    assert batch.prompt_index.tolist() == [0, 0, 1, 1] and batch.is_real.tolist() == [True, False]


def test_prompts_are_left_padded():
    batch = collate_prompts([SHORT, LONG, None], [7, 3, None], PAD)
    assert batch.input_ids.tolist() == [[0, 0, 0, 5, 1], [5, 6, 7, 8, 9], [0, 0, 0, 5, 1]]
    assert batch.attention_mask.int().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.row_index.tolist() == [7, 3, -1] and batch.is_real.tolist() == [True, True, False]


def test_prompts_can_be_padded_to_a_width_that_all_ranks_share():
    batch = collate_prompts([SHORT], [7], PAD, width=4)
    assert batch.input_ids.tolist() == [[0, 0, 5, 1]]
    assert batch.attention_mask.int().tolist() == [[0, 0, 1, 1]]
    with pytest.raises(AssertionError, match="a row of 5 tokens in 4 columns"):
        collate_prompts([LONG], [7], PAD, width=4)


def test_a_micro_batch_of_fillers_still_has_a_token_to_run_on():
    sft, ranking = collate_sft([None, None], PAD), collate_ranking([None], PAD)
    prompts = collate_prompts([None, None], [None, None], PAD)
    for batch in (sft, ranking, prompts):
        assert batch.input_ids.tolist() == [[PAD], [PAD]] and batch.attention_mask.all()
    assert not sft.loss_mask.any() and not ranking.is_real.any() and not prompts.is_real.any()
    assert ranking.ranks.tolist() == [0, 1] and prompts.row_index.tolist() == [-1, -1]
