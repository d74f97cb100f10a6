"""A prompt has the ids of a rollout, an answer ends with one EOS, over-long rows are dropped and counted."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.unit.test_template import chatml, default
from tristage.data.rows import PromptRow, RankingRow, SFTRow
from tristage.data.template import ensure_template, render
from tristage.data.tokenize import (
    Example,
    encode_prompts,
    encode_ranking,
    encode_sft,
    tokenize_prompt,
    tokenize_ranking,
    tokenize_sft,
)
from tristage.errors import UserError

HI = ({"role": "user", "content": "Hi"},)
DIALOGUE = (*HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"})
MAKERS = {
    "default template": default,
    "BOS in front": lambda: default(adds_bos=True),
    "pad equal to EOS": lambda: default(pad_token="</s>"),
    "ChatML": chatml,
}


@pytest.fixture(params=MAKERS, ids=lambda name: name)
def tokenizer(request):
    return MAKERS[request.param]()


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")
    ensure_template(tokenizer)
    return tokenizer


def test_hand_made_ids_of_a_word_tokenizer():
    tokenizer = word_tokenizer("Human:", "Assistant:", "Hi", "Hello")  # 2 3 4 5
    assert tokenize_sft(tokenizer, SFTRow(HI, "Hello Hi", "")) == Example([2, 4, 3, 5, 4, 1], prompt_length=3)
    assert tokenize_prompt(tokenizer, PromptRow(HI, "")) == Example([2, 4, 3], prompt_length=3)


def test_the_prompt_ids_of_training_are_those_of_a_rollout(tokenizer):
    example = tokenize_sft(tokenizer, SFTRow(DIALOGUE, "Ciao", ""))
    assert example.ids[: example.prompt_length] == tokenize_prompt(tokenizer, PromptRow(DIALOGUE, "")).ids


def test_prompt_and_answer_do_not_merge_across_their_border():
    tokenizer = word_tokenizer("ab", "a", "b")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    example = tokenize_sft(tokenizer, SFTRow(({"role": "user", "content": "a"},), "b", ""))
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["a", "b", "</s>"]


def test_the_answer_is_the_text_and_exactly_one_eos(tokenizer):
    example = tokenize_sft(tokenizer, SFTRow(DIALOGUE, " Ciao \n", ""))
    answer = example.ids[example.prompt_length :]
    assert answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer) == render(tokenizer, DIALOGUE, " Ciao \n")[1]


def test_the_tokenizer_adds_no_special_token_of_its_own():
    ids = tokenize_sft(default(adds_bos=True), SFTRow(HI, "Hello", "")).ids
    assert ids.count(default(adds_bos=True).bos_token_id) == 1


def test_special_tokens_in_a_users_text_stay(tokenizer):
    prompt = ({"role": "user", "content": f"What is {tokenizer.eos_token}?"},)
    assert tokenizer.eos_token_id in tokenize_prompt(tokenizer, PromptRow(prompt, "")).ids


def test_every_answer_of_a_ranking_row_has_the_same_prompt(tokenizer):
    row = RankingRow(DIALOGUE, ("best", "worse", "worst"), (0.0, 1.0, 2.0), "")
    examples = tokenize_ranking(tokenizer, row)
    assert examples == [tokenize_sft(tokenizer, SFTRow(DIALOGUE, answer, "")) for answer in row.answers]


def test_whole_sets_equal_single_rows_in_order(tokenizer):
    rows = [SFTRow(HI, f"answer {i}", "") for i in range(1500)]  # more than one call of the tokenizer
    examples, dropped = encode_sft(rows, tokenizer, max_tokens=1000)
    assert not dropped and len(examples) == 1500
    assert all(examples[i] == tokenize_sft(tokenizer, rows[i]) for i in (0, 1, 1023, 1024, 1499))
    prompts, _ = encode_prompts([PromptRow(HI, ""), PromptRow(DIALOGUE, "")], tokenizer, 1000)
    assert prompts == [tokenize_prompt(tokenizer, PromptRow(turns, "")) for turns in (HI, DIALOGUE)]


def test_a_row_of_exactly_the_limit_stays_and_one_more_token_drops_it(tokenizer):
    row = SFTRow(HI, "Hello", "")
    length = len(tokenize_sft(tokenizer, row).ids)
    assert len(encode_sft([row], tokenizer, length)[0]) == 1
    assert encode_sft([row], tokenizer, length - 1) == ([], {f"longer than {length - 1} tokens": 1})
    prompt_length = len(tokenize_prompt(tokenizer, PromptRow(HI, "")).ids)
    rows = [PromptRow(HI, ""), PromptRow(DIALOGUE, "")]
    kept, dropped = encode_prompts(rows, tokenizer, prompt_length)
    assert len(kept) == 1 and dropped.total() == 1


def test_one_long_answer_drops_its_ranking_row_whole(tokenizer):
    rows = [
        RankingRow(HI, ("a", "b", "c"), (0.0, 1.0, 2.0), ""),
        RankingRow(HI, ("a", "b" * 100), (0.0, 1.0), ""),
        RankingRow(DIALOGUE, ("x", "y"), (1.0, 0.0), ""),
    ]
    kept, dropped = encode_ranking(rows, tokenizer, max_tokens=120)
    assert kept == [(tokenize_ranking(tokenizer, row), row.ranks) for row in (rows[0], rows[2])]
    assert dropped == {"longer than 120 tokens": 1}


def test_a_ranking_row_of_exactly_the_limit_stays(tokenizer):
    row = RankingRow(HI, ("a", "longer"), (0.0, 1.0), "")
    longest = max(len(example.ids) for example in tokenize_ranking(tokenizer, row))
    assert len(encode_ranking([row], tokenizer, longest)[0]) == 1
    assert encode_ranking([row], tokenizer, longest - 1)[1].total() == 1


def test_no_rows_give_no_examples(tokenizer):
    assert encode_sft([], tokenizer, 10) == encode_ranking([], tokenizer, 10) == ([], {})


def test_an_eos_that_is_no_id_of_its_own_is_an_error_that_names_the_row():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[UNK]", unk_token="[UNK]")
    ensure_template(tokenizer)
    with pytest.raises(
        UserError, match="f:1: the tokenizer does not end this answer with exactly one EOS id"
    ):
        tokenize_sft(tokenizer, SFTRow(HI, "Hello unknown", "f:1"))
