"""Masks say what is real, what is learned and what is filler, and never look at ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import TAGGED, chatml, default
from tristage.data.collate import collate_packed, collate_prompts, collate_ranking, collate_sft, pick
from tristage.data.rows import SFTRow
from tristage.data.tokenize import EncodingRules, Example, encode

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


def test_earlier_answers_are_learned_where_they_are_marked():
    example = Example([5, 6, 7, 8, 9, 1], prompt_length=4, also_trained=((1, 2), (3, 4)))
    assert collate_sft([example], PAD).loss_mask.int().tolist() == [[0, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "example", [Example([5, 6, 1], 1, ((0, 1),)), Example([5, 6, 1], 0)], ids=["marked", "a document"]
)
def test_the_first_token_of_a_row_is_never_learned(example):
    assert collate_sft([example], PAD).loss_mask.int().tolist() == [[0, 1, 1]]
    assert collate_packed([[example, example]], PAD).loss_mask.int().tolist() == [[0, 1, 1, 0, 1, 1]]


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
    assert batch.answer_mask.int().tolist() == [
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1],
    ]
    assert batch.answer_mask.dtype == torch.bool
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
    assert batch.draw_index.tolist() == [7, 3, -1] and batch.is_real.tolist() == [True, True, False]


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
    assert ranking.ranks.tolist() == [0, 1] and prompts.draw_index.tolist() == [-1, -1]


# -- packed rows -------------------------------------------------------------------------------------------


def test_packed_by_hand():
    batch = collate_packed([[LONG, SHORT], [SHORT, SHORT], [SHORT]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 1], [5, 1, 5, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert (batch.loss_mask.dtype, batch.position_ids.dtype) == (torch.bool, torch.long)


def test_packed_earlier_answers_are_learned_in_their_own_row():
    example = Example([5, 6, 7, 1], prompt_length=3, also_trained=((1, 2),))
    assert collate_packed([[LONG, example]], PAD).loss_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 1]]


def test_a_packed_filler_attends_like_the_first_pack_and_learns_nothing():
    batch = collate_packed([None, [LONG, SHORT], [SHORT]], PAD)
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids):
        assert torch.equal(tensor[0], tensor[1])
    assert batch.loss_mask.any(dim=1).tolist() == [False, True, True]


# -- from text to mask -------------------------------------------------------------------------------------

CONTENT = "\0"
Part = tuple[str, bool]  # text as the template writes it, and whether it is an answer with its EOS


def default_parts(role: str, content: str) -> list[Part]:
    if role == "assistant":
        return [("\n\nAssistant:", False), (f" {content}</s>", True)]
    return [(f"\n\nHuman: {content}" if role == "user" else content, False)]


def chatml_parts(role: str, content: str) -> list[Part]:
    header, answered = f"<|im_start|>{role}\n", role == "assistant"
    return [(header, False), (f"{content}<|im_end|>", answered), ("\n", False)]


def tagged_parts(role: str, content: str) -> list[Part]:
    parts = chatml_parts(role, content)
    return [parts[0], ("(calm)", False), *parts[1:]] if role == "assistant" else parts


WRITERS = {
    "default": (default(), default_parts),
    "BOS": (default(adds_bos=True), default_parts),
    "pad is EOS": (default(pad_token="</s>"), default_parts),
    "ChatML": (chatml(), chatml_parts),
    "tags": (chatml(TAGGED), tagged_parts),
}
printable = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" \n"), min_size=1, max_size=6)
contents = printable.filter(lambda text: text.strip())
questions = contents | st.sampled_from(["</s>?", "<|im_end|>\n<|im_start|>assistant\nHi", "a\n\nAssistant: b</s>"])
answers = contents | st.sampled_from(["<s>", "<|im_start|> <s>"])


@st.composite
def dialogues(draw) -> list[tuple[str, str]]:
    """(role, content) each: perhaps a system turn, then user and assistant in turn, an answer last."""
    system = [("system", draw(contents))] if draw(st.booleans()) else []
    pairs = draw(st.lists(st.tuples(questions, answers), min_size=1, max_size=3))
    return system + [turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer))]


def expected_row(tokenizer, write, turns, train_on: str) -> tuple[list[int], list[bool]]:
    """Ids and mask, part after part: a token of these tokenizers is a byte, so no part shares one with the next.

    A content stands as CONTENT in its part, and has no special tokens whatever it spells out.
    """
    parts = [("<s>", False, "")] if tokenizer.chat_template.startswith("{{ bos_token }}") else []
    for role, content in turns[:-1]:
        parts += [(text, learned and train_on != "last_answer", content) for text, learned in write(role, CONTENT)]
    # Of the last turn, all that follows the generation prompt is the answer, up to its EOS.
    role, content = turns[-1]
    header, *rest = (text for text, _ in write(role, CONTENT))
    parts += [(header, False, content), ("".join(rest).rstrip("\n"), True, content)]
    ids, mask = [], []
    for text, learned, content in parts:
        before, there, after = text.partition(CONTENT)
        new = tokenizer(before, add_special_tokens=False)["input_ids"]
        if there:
            new += tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        new += tokenizer(after, add_special_tokens=False)["input_ids"]
        ids, mask = ids + new, mask + [learned or train_on == "everything"] * len(new)
    return ids, [False, *mask[1:]]


@pytest.mark.parametrize("writer", WRITERS)
@settings(deadline=None, max_examples=40)
@given(
    st.lists(dialogues(), min_size=1, max_size=3),
    st.sampled_from(["answers", "last_answer", "everything"]),
    st.integers(4, 200),
)
def test_exactly_the_answers_and_their_eos_are_learned(writer, drawn, train_on, max_tokens):
    tokenizer, write = WRITERS[writer]
    rows = [
        SFTRow(tuple({"role": role, "content": text} for role, text in turns[:-1]), turns[-1][1], "") for turns in drawn
    ]
    expected = [expected_row(tokenizer, write, turns, train_on) for turns in drawn]
    kept = [(ids, mask) for ids, mask in expected if len(ids) <= max_tokens]
    found = encode(rows, tokenizer, EncodingRules("sft", max_tokens, train_on=train_on))
    examples = [each[0] for each in found if isinstance(each, tuple)]
    assert len(examples) == len(kept)
    if not kept:
        return
    width = max(len(ids) for ids, _ in kept)
    batch = collate_sft([*examples, None], tokenizer.eos_token_id)
    for row, (ids, mask) in enumerate(kept):
        padding = width - len(ids)
        assert batch.input_ids[row].tolist() == ids + [tokenizer.eos_token_id] * padding
        assert batch.loss_mask[row].tolist() == mask + [False] * padding
    assert not batch.loss_mask[-1].any()
