"""A prompt has the ids of a rollout, an answer ends with one EOS, rows over the limit meet one policy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tokenizers import DIALOGUE, FORGETS, TAGGED, byte_tokenizer, chatml, default, word_tokenizer
from tristage.data.rows import PromptRow, RankingRow, Row, SFTRow, TextRow, Unusable
from tristage.data.special import encode_hidden
from tristage.data.template import ensure_template, render
from tristage.data.tokenize import EncodingRules, Example, encode, encode_sampled
from tristage.errors import UserError

HI = ({"role": "user", "content": "Hi"},)
LIMITED = ("drop", "truncate_left", "truncate_right")
MAKERS = {
    "default template": default,
    "BOS in front": lambda: default(adds_bos=True),
    "pad equal to EOS": lambda: default(pad_token="</s>"),
    "ChatML": chatml,
    "generation tags": lambda: chatml(TAGGED),
}
KINDS = {SFTRow: "sft", RankingRow: "ranking", PromptRow: "prompt", TextRow: "text"}


@pytest.fixture(params=MAKERS, ids=lambda name: name)
def tokenizer(request):
    return MAKERS[request.param]()


def encoded(tokenizer, row: Row, max_tokens: int = 1000, **options):
    """What becomes of one row: its item, or the sentence that says why it has none."""
    [found] = encode([row], tokenizer, EncodingRules(KINDS[type(row)], max_tokens, **options))
    return found[0] if isinstance(found, tuple) else f"{type(found).__name__}: {found}"


def test_hand_made_ids_of_a_word_tokenizer():
    tokenizer = word_tokenizer("Human:", "Assistant:", "Hi", "Hello")  # 2 3 4 5
    assert encoded(tokenizer, SFTRow(HI, "Hello Hi", "")) == Example([2, 4, 3, 5, 4, 1], prompt_length=3)
    assert encoded(tokenizer, PromptRow(HI, "")) == Example([2, 4, 3], prompt_length=3)
    assert encoded(tokenizer, TextRow("Hello Hi", "")) == Example([5, 4, 1], prompt_length=0)
    ranking = RankingRow(HI, ("Hi", "Hello Hi"), (1.0, 0.0), "")
    assert encoded(tokenizer, ranking) == ([Example([2, 4, 3, 4, 1], 3), Example([2, 4, 3, 5, 4, 1], 3)], (1.0, 0.0))


@pytest.mark.parametrize("train_on", ["answers", "last_answer", "everything"])
def test_the_prompt_ids_of_training_are_those_of_a_rollout(tokenizer, train_on):
    prompt = encoded(tokenizer, PromptRow(DIALOGUE, "")).ids
    example = encoded(tokenizer, SFTRow(DIALOGUE, "Ciao", ""), train_on=train_on)
    assert example.ids[: example.prompt_length] == prompt
    ranked, _ = encoded(tokenizer, RankingRow(DIALOGUE, ("Ciao", "Bye"), (0.0, 1.0), ""))
    assert [answer.ids[: answer.prompt_length] for answer in ranked] == [prompt, prompt]


def test_prompt_and_answer_do_not_merge_across_their_border():
    tokenizer = word_tokenizer("ab", "a", "b")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    example = encoded(tokenizer, SFTRow(({"role": "user", "content": "a"},), "b", ""))
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["a", "b", "</s>"]


def test_the_answer_is_the_text_and_exactly_one_eos(tokenizer):
    example = encoded(tokenizer, SFTRow(DIALOGUE, " Ciao \n", ""))
    answer = example.ids[example.prompt_length :]
    assert answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer) == render(tokenizer, DIALOGUE, " Ciao \n")[1]


def test_the_tokenizer_adds_no_special_token_of_its_own():
    tokenizer = default(adds_bos=True)
    assert encoded(tokenizer, SFTRow(HI, "Hello", "")).ids.count(tokenizer.bos_token_id) == 1
    assert encoded(tokenizer, TextRow("a", "")).ids[1:] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["What is {}?", "{}", "a{}{}b ", "日本{}🙂", "<{} <|im_start|><s"])
def test_special_tokens_that_contents_spell_out_are_plain_text(tokenizer, text):
    """The special ids are those of the same dialogue without any, the text comes back, the answers are in place."""
    end = tokenizer.eos_token
    spelled, plain = text.replace("{}", end), text.replace("{}", "x").replace("<|im_start|>", "x")
    special = set(tokenizer.all_special_ids)

    def specials_of(example: Example) -> list[int]:
        return [token for token in example.ids if token in special]

    roles = ("user", "assistant", "user")
    dialogue, without = (
        tuple({"role": role, "content": content} for role in roles) for content in (spelled, plain)
    )
    example, other = (encoded(tokenizer, SFTRow(turns, "Ciao <|im_start|>", "")) for turns in (dialogue, without))
    assert specials_of(example) == specials_of(other)
    assert tokenizer.decode(example.ids).count(spelled.strip()) >= 3
    [(start, stop)] = example.also_trained
    assert tokenizer.decode(example.ids[start:stop]).removesuffix(end).strip() == spelled.strip()
    assert tokenizer.decode(example.ids[example.prompt_length :]).endswith("Ciao <|im_start|>" + end)
    prompt = encoded(tokenizer, PromptRow(dialogue, "")).ids
    assert example.ids[: example.prompt_length] == prompt
    document = encoded(tokenizer, TextRow(spelled, ""))
    assert specials_of(document) == [tokenizer.eos_token_id] and tokenizer.decode(document.ids[:-1]) == spelled


def test_hand_made_ids_of_text_that_spells_special_tokens():
    core = Tokenizer(models.BPE({"[UNK]": 0, "</s>": 1, "<": 2, "/": 3, "s": 4, ">": 5, "a": 6}, [], unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    row = SFTRow(({"role": "user", "content": "a</s>"},), "a", "")
    assert encoded(tokenizer, row) == Example([6, 2, 3, 4, 5, 1, 6, 1], prompt_length=6)
    assert encoded(tokenizer, TextRow("</s>a", "")) == Example([2, 3, 4, 5, 6, 1], prompt_length=0)


BITS = ["<s>", "</s>", "<|im_start|>", "<pad>", " ", "  ", "\n", "the model", "é", "日", "<", "|im", "a"]


def trained_tokenizer(spaces: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = spaces
    names = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    core.train_from_iterator(["the model sees a user, the model answers </ s > < | im"] * 9, trainer)
    core.add_special_tokens([AddedToken("<pad>", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


TRAINED = {
    "bytes": trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "a space in front": trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "SentencePiece": trained_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first")),
}


@pytest.mark.parametrize("name", TRAINED)
@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(BITS), max_size=12).map("".join))
def test_the_twin_that_reads_spelled_tokens_as_text_gives_the_ids_and_places_of_the_tokenizer_otherwise(name, text):
    ids, places = encode_hidden(text, TRAINED[name])
    found = TRAINED[name](text, add_special_tokens=False, return_offsets_mapping=True)
    assert (ids, places) == (found["input_ids"], found["offset_mapping"])


def test_a_spelled_special_token_that_is_a_word_of_the_vocabulary_is_an_error_that_names_the_row():
    tokenizer = word_tokenizer("Human:", "Assistant:", "Hi")
    row = PromptRow(({"role": "user", "content": "Hi </s> Hi"},), "f:1")
    assert encoded(tokenizer, row) == (
        "UserError: f:1: has the text '</s>', which this tokenizer can't tell from its special token; remove it"
    )
    assert encoded(tokenizer, PromptRow(({"role": "user", "content": "Hi\U00108001"},), "f:1")) == (
        "UserError: f:1: has the private character U+108001, remove it"
    )


def test_a_sampled_responses_prompt_spells_special_tokens_as_text_too(tokenizer):
    prompt = ({"role": "user", "content": f"What is {tokenizer.eos_token}?"},)
    row = SFTRow(prompt, "Hello", "")
    assert sampled(tokenizer, "Hello", True, prompt=prompt) == encoded(tokenizer, row, train_on="last_answer")
    words = word_tokenizer("Human:", "Assistant:", "Hi")  # has no other way to write it
    prompt = ({"role": "user", "content": "Hi </s>"},)
    assert sampled(words, "Hi", True, prompt=prompt) == sampled(words, "Hi", True)


def test_rows_come_in_order_whatever_is_wrong_with_some(tokenizer):
    rows = [SFTRow(HI, f"answer {i}", f"f:{i}") for i in range(6)]
    rows[1] = SFTRow(HI, f"stop {tokenizer.eos_token}", "f:1")
    rows[3] = SFTRow(DIALOGUE, "long " * 200, "f:3")
    found = encode(rows, tokenizer, EncodingRules("sft", 200))
    assert isinstance(found[1], UserError) and str(found[1]).startswith("f:1: the answer holds the EOS token")
    assert isinstance(found[3], Unusable) and str(found[3]) == "longer than 200 tokens"
    for i in (0, 2, 4, 5):
        example = encoded(tokenizer, rows[i])
        assert found[i] == (example, len(example.ids))


@pytest.mark.parametrize("kind", KINDS.values())
def test_no_rows_give_nothing(tokenizer, kind):
    assert encode([], tokenizer, EncodingRules(kind, 10)) == []


def test_an_eos_that_is_no_id_of_its_own_is_an_error_that_names_the_row():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[UNK]", unk_token="[UNK]")
    ensure_template(tokenizer)
    [found] = encode([SFTRow(HI, "Hello unknown", "f:1")], tokenizer, EncodingRules("sft", 100))
    assert isinstance(found, UserError)
    assert str(found).startswith("f:1: the tokenizer does not end this answer with exactly one EOS id")


# -- what SFT learns of the prompt -------------------------------------------------------------------------

CHAT_WORDS = word_tokenizer("Human:", "Assistant:", "a", "b", "c", "d", "<s>")  # 2 3 4 5 6 7 8
CHAT = tuple(
    {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b c"), ("user", "d"))
)


@pytest.mark.parametrize(
    "train_on, also_trained", [("answers", ((4, 7),)), ("last_answer", ()), ("everything", ((0, 10),))]
)
def test_earlier_answers_by_hand(train_on, also_trained):
    ids = [8, 2, 4, 3, 5, 6, 1, 2, 7, 3, 4, 1]  # "b c" and its EOS are ids[4:7]
    found = encoded(CHAT_WORDS, SFTRow(CHAT, "a", ""), train_on=train_on)
    assert found == Example(ids, prompt_length=10, also_trained=also_trained)


@pytest.mark.parametrize("answers", [["Hello"], ["Hi", "Hi"], ["日本 🙂", " two\n\nHuman: ", "\t{{ x }} "]], ids=len)
def test_the_trained_ids_of_earlier_answers_decode_to_them_and_their_eos(tokenizer, answers):
    written = "{}<|im_end|>" if tokenizer.eos_token == "<|im_end|>" else " {}</s>"
    turns = DIALOGUE[:1]
    for answer in answers:
        turns = [*turns, {"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    example = encoded(tokenizer, SFTRow((*turns, *HI), "Ciao", ""))
    learned = [tokenizer.decode(example.ids[start:stop]) for start, stop in example.also_trained]
    assert learned == [written.format(answer) for answer in answers]


def test_only_demonstrations_learn_earlier_answers(tokenizer):
    ranked, _ = encoded(tokenizer, RankingRow(DIALOGUE, ("x", "y"), (0.0, 1.0), ""))
    assert [answer.also_trained for answer in ranked] == [(), ()]
    assert encoded(tokenizer, PromptRow(DIALOGUE, "")).also_trained == ()


def test_a_template_that_rewrites_history_works_with_the_last_answer_only():
    tokenizer = chatml(FORGETS)
    row = SFTRow((*HI, {"role": "assistant", "content": "<think>hm</think>Hello"}, *HI), "Ciao", "f:7")
    assert encoded(tokenizer, row).startswith("UserError: f:7: ")
    assert "set `data.train_on: last_answer`" in encoded(tokenizer, row)
    example = encoded(tokenizer, row, train_on="last_answer")
    assert tokenizer.decode(example.ids) == "Q:HiA:Hello<|im_end|>Q:HiA:Ciao<|im_end|>"
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "Ciao<|im_end|>" and not example.also_trained


def test_a_tokenizer_that_knows_no_places_is_refused_for_earlier_answers_only(monkeypatch):
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    rows = [SFTRow(HI, "Ciao", "f:1"), SFTRow(DIALOGUE, "Ciao", "f:2")]
    single, earlier = (encoded(tokenizer, row, train_on="last_answer") for row in rows)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="^f:2: this tokenizer can't tell.*set `data.train_on: last_answer`"):
        encode(rows, tokenizer, EncodingRules("sft", 1000))
    assert encoded(tokenizer, rows[0]) == single
    assert encoded(tokenizer, rows[1], train_on="last_answer") == earlier


# -- the token limit ---------------------------------------------------------------------------------------

WORDS = word_tokenizer("Human:", "Assistant:", "a", "b", "c", "d", "e", "f")  # 2 3 4 5 6 7 8 9
ABC = ({"role": "user", "content": "a b c"},)
DEMONSTRATION = SFTRow(ABC, "d e", "")  # 2 4 5 6 3 | 7 8 1
PROMPT = PromptRow(ABC, "")
PAIR = RankingRow(ABC, ("d", "d e f"), (0.0, 1.0), "")  # 2 4 5 6 3 | 7 1 and 2 4 5 6 3 | 7 8 9 1


@pytest.mark.parametrize("too_long", LIMITED)
@pytest.mark.parametrize("row, length", [(DEMONSTRATION, 8), (PROMPT, 5), (PAIR, 9)], ids=["sft", "prompt", "ranking"])
def test_a_row_of_exactly_the_limit_stays_as_it_is(row, length, too_long):
    whole = encoded(WORDS, row)
    policy = EncodingRules(KINDS[type(row)], length, too_long)
    assert encode([row], WORDS, policy) == [(whole, length)]


@pytest.mark.parametrize(
    "row, max_tokens, too_long, item",
    [
        (DEMONSTRATION, 7, "drop", "Unusable: longer than 7 tokens"),
        (DEMONSTRATION, 7, "truncate_left", Example([4, 5, 6, 3, 7, 8, 1], 4)),
        (DEMONSTRATION, 4, "truncate_left", Example([3, 7, 8, 1], 1)),
        (DEMONSTRATION, 3, "truncate_left", "Unusable: answer alone longer than 2 tokens"),
        (DEMONSTRATION, 2, "truncate_left", "Unusable: answer alone longer than 1 tokens"),
        (DEMONSTRATION, 7, "truncate_right", Example([2, 4, 5, 6, 3, 7, 8], 5)),
        (DEMONSTRATION, 6, "truncate_right", Example([2, 4, 5, 6, 3, 7], 5)),
        (DEMONSTRATION, 5, "truncate_right", "Unusable: prompt alone longer than 4 tokens"),
        (PROMPT, 4, "drop", "Unusable: longer than 4 tokens"),
        (PROMPT, 3, "truncate_left", Example([5, 6, 3], 3)),
        (PROMPT, 4, "truncate_right", "Unusable: prompt alone longer than 4 tokens"),
        (PAIR, 8, "drop", "Unusable: longer than 8 tokens"),
        (PAIR, 6, "truncate_left", ([Example([6, 3, 7, 1], 2), Example([6, 3, 7, 8, 9, 1], 2)], (0.0, 1.0))),
        (PAIR, 4, "truncate_left", "Unusable: answer alone longer than 3 tokens"),
        (PAIR, 7, "truncate_right",
         ([Example([2, 4, 5, 6, 3, 7, 1], 5), Example([2, 4, 5, 6, 3, 7, 8], 5)], (0.0, 1.0))),
        (PAIR, 6, "truncate_right", "Unusable: answers that are the same once truncated"),
        (PAIR, 5, "truncate_right", "Unusable: prompt alone longer than 4 tokens"),
    ],
)  # fmt: skip
def test_rows_over_the_limit_by_hand(row, max_tokens, too_long, item):
    assert encoded(WORDS, row, max_tokens, too_long=too_long) == item


@pytest.mark.parametrize("too_long", ["truncate_left", "truncate_right"])
def test_a_cut_row_tells_its_whole_length(too_long):
    for row, length in ((DEMONSTRATION, 8), (PAIR, 9)):
        [(_, full_length)] = encode([row], WORDS, EncodingRules(KINDS[type(row)], 7, too_long))
        assert full_length == length


def test_answers_of_which_some_still_differ_stay():
    row = RankingRow(ABC, ("d e", "d f", "e"), (0.0, 1.0, 2.0), "")
    answers, ranks = encoded(WORDS, row, 6, too_long="truncate_right")
    assert [answer.ids[5:] for answer in answers] == [[7], [7], [8]] and ranks == row.ranks


@pytest.mark.parametrize("too_long", LIMITED)
def test_documents_have_no_limit(too_long):
    assert encoded(WORDS, TextRow("a b c d", ""), 2, too_long=too_long) == Example([4, 5, 6, 7, 1], 0)


@pytest.mark.parametrize(
    "max_tokens, ids, also_trained",
    [  # 8 2 4 3 [5 6 1] 2 7 3 | 4 1 whole; the BOS stays and is not trained
        (9, [8, 5, 6, 1, 2, 7, 3, 4, 1], ((1, 4),)),
        (8, [8, 6, 1, 2, 7, 3, 4, 1], ((1, 3),)),
        (7, [8, 1, 2, 7, 3, 4, 1], ((1, 2),)),
        (6, [8, 2, 7, 3, 4, 1], ()),
        (4, [8, 3, 4, 1], ()),
    ],
)
def test_a_cut_on_the_left_keeps_bos_and_shifts_and_clips_earlier_answers(max_tokens, ids, also_trained):
    found = encoded(CHAT_WORDS, SFTRow(CHAT, "a", ""), max_tokens, too_long="truncate_left")
    assert found == Example(ids, len(ids) - 2, also_trained)


def test_a_prompt_of_which_only_bos_is_left_is_none():
    found = encoded(CHAT_WORDS, SFTRow(CHAT, "a", ""), 3, too_long="truncate_left")
    assert found == "Unusable: answer alone longer than 1 tokens"


def test_a_cut_on_the_right_leaves_earlier_answers_alone():
    found = encoded(CHAT_WORDS, SFTRow(CHAT, "a b", ""), 11, too_long="truncate_right")
    assert found == Example([8, 2, 4, 3, 5, 6, 1, 2, 7, 3, 4], 10, ((4, 7),))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text("abcd ", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=7),
    st.integers(2, 30),
    st.sampled_from(LIMITED[1:]),
    st.sampled_from(["answers", "last_answer", "everything"]),
    st.booleans(),
)
def test_a_cut_row_is_a_window_of_the_whole_one_and_always_has_an_answer(texts, max_tokens, too_long, train_on, bos):
    """And is never dropped while a window would do: a token of the prompt beside BOS, and one of the answer."""
    tokenizer = CHAT_WORDS if bos else WORDS
    roles = ["assistant", "user"] * 4
    turns = [{"role": role, "content": " ".join(text)} for role, text in zip(roles, texts, strict=False)][::-1]
    row = SFTRow(tuple(turns[:-1]), turns[-1]["content"], "")
    whole = encoded(tokenizer, row, train_on=train_on)
    found = encoded(tokenizer, row, max_tokens, too_long=too_long, train_on=train_on)
    answer_length = len(whole.ids) - whole.prompt_length
    if isinstance(found, str):
        fits = answer_length + 1 + bos if too_long == "truncate_left" else whole.prompt_length + 1
        assert fits > max_tokens
        return
    assert len(found.ids) == min(len(whole.ids), max_tokens) and len(found.ids) > found.prompt_length > bos
    learned = trained_places(whole)
    if too_long == "truncate_right":
        assert found.ids == whole.ids[:max_tokens] and trained_places(found) == learned[:max_tokens]
    else:
        tail = len(found.ids) - bos
        assert found.ids == whole.ids[:bos] + whole.ids[-tail:]
        assert trained_places(found)[bos:] == learned[-tail:]


def trained_places(example: Example) -> list[bool]:
    spans = (*example.also_trained, (example.prompt_length, len(example.ids)))
    return [any(start <= place < stop for start, stop in spans) for place in range(len(example.ids))]


# -- what another model sampled ----------------------------------------------------------------------------


def sampled(tokenizer, response: str, ended: bool, max_tokens: int | None = None, prompt=HI) -> Example:
    return encode_sampled(prompt, response, ended, tokenizer, max_tokens)


@pytest.mark.parametrize("response", ["Hello", " Hello\n", "日本 🙂"])
def test_a_sampled_response_that_ended_reads_as_a_row_does(tokenizer, response):
    row = SFTRow(HI, response.strip(), "")
    assert sampled(tokenizer, response, True) == encoded(tokenizer, row, train_on="last_answer")


def test_a_sampled_response_that_was_cut_off_has_no_eos_and_nothing_that_the_template_adds():
    tokenizer = default()
    tokenizer.chat_template = tokenizer.chat_template.replace("+ eos_token", "+ ' .' + eos_token")
    for response in ("Hello", "Hello "):
        ids = sampled(tokenizer, response, False).ids
        assert tokenizer.decode(ids) == f"\n\nHuman: Hi\n\nAssistant: {response}"
    assert tokenizer.decode(sampled(tokenizer, "Hello", True).ids).endswith("Assistant: Hello .</s>")


def test_a_sampled_response_may_be_empty_and_still_has_a_token_to_score(tokenizer):
    prompt = encoded(tokenizer, PromptRow(HI, "")).ids
    assert sampled(tokenizer, " ", True) == Example([*prompt, tokenizer.eos_token_id], len(prompt))
    assert sampled(tokenizer, " ", False) == Example(prompt, len(prompt) - 1)


def test_a_template_may_leave_out_all_of_a_sampled_response():
    tokenizer = default()
    content = "message['content'] + eos"
    tokenizer.chat_template = tokenizer.chat_template.replace(content, content.replace(" +", ".split('!')[-1] +"))
    assert tokenizer.decode(sampled(tokenizer, "Hello!", True).ids) == "\n\nHuman: Hi\n\nAssistant: </s>"
    assert tokenizer.decode(sampled(tokenizer, "Hello!", False).ids) == "\n\nHuman: Hi\n\nAssistant: "


@pytest.mark.parametrize("spelled", ["</s>", "</<s>s>", "<|im_start|>", "<</s>/s>"])
def test_special_tokens_that_a_response_only_spells_out_are_not_read_as_such(spelled):
    tokenizer = default()
    assert sampled(tokenizer, f"Hel{spelled}lo", True) == sampled(tokenizer, "Hello", True)


def test_what_is_too_long_for_the_other_model_loses_its_oldest_tokens_but_for_a_bos():
    tokenizer = word_tokenizer("Human:", "Assistant:", "a", "b", "c", "<s>")  # 2 .. 7
    prompt = ({"role": "user", "content": "a b c"},)
    assert sampled(tokenizer, "a b", True, None, prompt) == Example([7, 2, 4, 5, 6, 3, 4, 5, 1], 6)
    assert sampled(tokenizer, "a b", True, 9, prompt) == sampled(tokenizer, "a b", True, None, prompt)
    assert sampled(tokenizer, "a b", True, 7, prompt) == Example([7, 5, 6, 3, 4, 5, 1], 4)
    assert sampled(tokenizer, "a b", True, 3, prompt) == Example([7, 5, 1], 1)  # the answer alone is too long
    without = word_tokenizer("Human:", "Assistant:", "a", "b", "c")
    assert sampled(without, "a b", False, 3, prompt) == Example([3, 4, 5], 1)
