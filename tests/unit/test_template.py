"""Every template gives a prompt that a rollout can start from and an answer that ends with one EOS."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers.tokenizers import CHATML, DIALOGUE, FORGETS, HI, TAGGED, byte_tokenizer, chatml, default
from tristage.config import RunSettings
from tristage.data import trial
from tristage.data.rows import _dialogue_turns
from tristage.data.template import earlier_answers, ensure_template, read_template, render, template_fingerprint
from tristage.errors import UserError
from tristage.models.tokenizer import load_tokenizer


def test_the_default_template_writes_human_and_assistant():
    assert render(default(), HI, "Hello.") == ("\n\nHuman: Hi\n\nAssistant:", " Hello.</s>")
    assert render(default(), DIALOGUE)[0] == (
        "Be kind.\n\nHuman: Hi\n\nAssistant: Hello</s>\n\nHuman: Bye\n\nAssistant:"
    )


def test_without_a_response_there_is_no_answer_and_the_same_prompt():
    assert render(default(), HI) == (render(default(), HI, "Hello.")[0], None)


def test_bos_is_in_front_exactly_where_the_tokenizer_puts_it():
    assert render(default(adds_bos=True), HI)[0].startswith("<s>\n\nHuman")
    assert render(default(adds_bos=False), HI)[0].startswith("\n\nHuman")


def test_text_that_happens_to_start_with_the_bos_id_is_no_bos_in_front():
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))  # any text is BOS to this one
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    ensure_template(tokenizer)
    assert not render(tokenizer, HI)[0].startswith("<s>")


def test_a_template_that_is_there_is_kept():
    tokenizer = chatml()
    ensure_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_the_default_template_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = default(adds_bos=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert render(loaded, DIALOGUE, "Ciao") == render(tokenizer, DIALOGUE, "Ciao")
    assert template_fingerprint(loaded) == template_fingerprint(tokenizer)


def test_what_a_template_writes_after_eos_is_cut():
    prompt, answer = render(chatml(), HI, "Hello.")
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "Hello.<|im_end|>"


def test_eos_is_appended_where_the_template_writes_none():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML  # its <|im_end|> is plain text to this tokenizer, whose EOS is </s>
    assert render(tokenizer, HI, "Hello.")[1] == "Hello.<|im_end|>\n</s>"


def test_pad_equal_to_eos_changes_nothing():
    assert render(default(pad_token="</s>"), HI, "Hello.")[1] == " Hello.</s>"


@pytest.mark.parametrize(
    "text", ["a", " a", "  a \n", "\n\na\n\n", "\ta\u3000", "日本 🙂", "{{ bos_token }} {% if %}", "\r\nx"]
)
@pytest.mark.parametrize("make", [default, chatml])
def test_prompt_and_answer_text_come_back_the_same(make, text):
    tokenizer = make()
    prompt, answer = render(tokenizer, [{"role": "user", "content": text}], text)
    plain_prompt, plain_answer = render(tokenizer, [{"role": "user", "content": "MARK"}], "MARK")
    assert prompt == plain_prompt.replace("MARK", text) and answer == plain_answer.replace("MARK", text)


def test_an_hh_dialogue_is_rendered_as_it_was_written():
    text = "\n\nHuman:  Hi \n\nAssistant: Hello\n\n1. one\n\nHuman: Bye\n"
    rendered = render(default(), _dialogue_turns(text))[0]
    assert rendered.replace("</s>", "") == text + "\n\nAssistant:"


def test_an_answer_that_holds_the_eos_text_is_an_error_that_names_the_row():
    with pytest.raises(UserError, match="f.jsonl:3: the answer holds the EOS token '</s>'"):
        render(default(), HI, "stop</s> go", where="f.jsonl:3")


def test_a_prompt_may_hold_the_eos_text():
    prompt, answer = render(default(), [{"role": "user", "content": "</s>?"}], "Yes")
    assert "</s>?" in prompt and answer == " Yes</s>"


@pytest.mark.parametrize(
    "template, sentence",
    [
        (
            "{% for m in messages %}{{ '' if loop.last else '(old)' }}{{ m.content }}{% endfor %}",
            "writes the prompt differently once an answer follows",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the answer",
        ),
        ("{{ raise_exception('roles must alternate') }}", r"refuses this row \(roles must alternate\)"),
        ("{{ eos_token }}{% for m in messages %}{{ m.content | nothing }}{% endfor %}", "refuses this row"),
    ],
)
def test_an_unusable_template_is_an_error_that_names_the_row_and_the_template(template, sentence):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"f.jsonl:3: the tokenizer's chat template.*{sentence}"):
        render(tokenizer, HI, "Hello.", where="f.jsonl:3")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{{ 'x' * 2 * 10 ** 9 }}",
        "{{ 'x' * 10 ** 12 }}",
        "{% if messages[0]['role'] == 'system' %}{{ 'x' * 2 * 10 ** 9 }}{% endif %}",
        "{% set n = namespace(t='x' * 4096) %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_loops_or_allocates_is_refused_in_one_sentence(template, monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        trial.refuse_endless(tokenizer, "models/mine")
    assert str(caught.value).startswith("models/mine: the chat template takes more than 1 seconds or 1024 MiB for a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000  # KiB: none of it in this process


@pytest.mark.parametrize("template", [CHATML, FORGETS, "{{ raise_exception('no') }}", "{{ nothing.at.all }}"])
def test_other_templates_pass_the_trial_and_it_is_cheap(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template + " "
    began = time.process_time()
    trial.refuse_endless(tokenizer, "models/mine")
    trial.refuse_endless(tokenizer, "models/mine")
    assert time.process_time() - began < 0.5


def test_loading_a_tokenizer_refuses_an_endless_template_and_says_which_default_it_takes(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().out == (
        f"{tmp_path}: no chat template, so dialogues are written as "
        r"'\n\nHuman: QUESTION\n\nAssistant: ANSWER</s>'; "
        "`data.template` gives another one\n"
    )
    load_tokenizer(str(tmp_path), CHATML)
    assert capsys.readouterr().out == ""
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' * 10 ** 12 }}")
    with pytest.raises(UserError, match=f"^{tmp_path}: the chat template takes"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="^data.template: the chat template takes"):
        load_tokenizer(str(tmp_path), "{{ 'y' * 10 ** 12 }}")


def test_a_template_that_fails_otherwise_refuses_the_row_in_one_sentence():
    tokenizer = byte_tokenizer()
    for template, error in (("{{ 1 // 0 }}", "ZeroDivisionError: "), ("{{ messages + 1 }}", "TypeError: ")):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=rf"^f:1: the tokenizer's chat template refuses this row \({error}"):
            render(tokenizer, HI, where="f:1")


def test_a_tokenizer_without_eos_is_an_error():
    tokenizer = default()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        render(tokenizer, HI, "Hello.")


# -- earlier answers ---------------------------------------------------------------------------------------


def earlier_texts(tokenizer, turns) -> list[str]:
    text, _ = render(tokenizer, turns)
    return [text[start:stop] for start, stop in earlier_answers(tokenizer, turns, text, where="f.jsonl:3")]


@pytest.mark.parametrize(
    "tokenizer, written",
    [
        (default(), " {}</s>"),
        (default(adds_bos=True), " {}</s>"),
        (chatml(), "{}<|im_end|>"),
        (chatml(TAGGED), "{}<|im_end|>"),
    ],
    ids=["default", "BOS", "ChatML", "tags"],
)
@pytest.mark.parametrize("answers", [["Hello"], ["Hi", "Hi"], ["日本 🙂", " two\n\nHuman: ", "{{ x }}"]], ids=len)
def test_earlier_answers_are_found_with_their_eos_and_nothing_else(tokenizer, written, answers):
    turns = list(DIALOGUE[:1])
    for answer in answers:
        turns += [{"role": "user", "content": f"Say {answer}"}, {"role": "assistant", "content": answer}]
    assert earlier_texts(tokenizer, [*turns, *HI]) == [written.format(answer) for answer in answers]


def test_a_turn_that_opens_the_dialogue_answers_nothing_and_is_left_out():
    turns = [{"role": "assistant", "content": "Welcome"}, *HI, {"role": "assistant", "content": "Hello"}, *HI]
    assert earlier_texts(default(), turns) == [" Hello</s>"]


def test_no_answer_before_gives_none():
    assert earlier_texts(default(), HI) == earlier_texts(chatml(TAGGED), HI) == []


def test_the_tags_of_a_template_are_believed_where_they_leave_out_part_of_an_answer():
    template = TAGGED.replace("{% generation %}", "{{ m['content'][:2] }}{% generation %}").replace(
        "{{ m['content'] + eos_token", "{{ m['content'][2:] + eos_token"
    )
    assert earlier_texts(chatml(template), [*HI, {"role": "assistant", "content": "Hello"}, *HI]) == ["llo<|im_end|>"]


def test_a_template_may_rewrite_what_is_not_there():
    assert earlier_texts(chatml(FORGETS), [*HI, {"role": "assistant", "content": "Hello"}, *HI]) == ["Hello<|im_end|>"]


@pytest.mark.parametrize(
    "template", [FORGETS, "{{ '(open)' if add_generation_prompt }}" + TAGGED], ids=["no tags", "tags"]
)
def test_a_template_that_rewrites_history_is_refused_with_the_row_and_the_fix(template):
    turns = [*HI, {"role": "assistant", "content": "<think>hm</think>Hello"}, *HI]
    with pytest.raises(UserError, match="^f.jsonl:3: .*differently once others.*`data.train_on: last_answer`"):
        earlier_texts(chatml(template), turns)


# -- fingerprint and `data.template` -----------------------------------------------------------------------


def test_the_fingerprint_tells_template_eos_and_vocabulary_apart():
    renamed = default()
    renamed.eos_token = "<s>"
    others = (chatml(), renamed, default(pad_token="<x>"), default(adds_bos=True))
    prints = [template_fingerprint(tokenizer) for tokenizer in (default(), *others)]
    assert len(set(prints)) == len(prints)
    assert template_fingerprint(default()) == prints[0]


def with_core(model: models.Model, pre_tokenizer=None, normalizer=None) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizer
    core.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    ensure_template(tokenizer)
    return tokenizer


PIECES = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}


@pytest.mark.parametrize(
    "one, other",
    [
        (models.BPE(PIECES, [("a", "b"), ("b", "c")]), models.BPE(PIECES, [("b", "c"), ("a", "b")])),
        (
            models.Unigram([("a", -1.0), ("bc", -1.0), ("ab", -9.0), ("c", -1.0)], 0),
            models.Unigram([("a", -9.0), ("bc", -1.0), ("ab", -1.0), ("c", -1.0)], 0),
        ),
    ],
    ids=["order of merges", "scores of pieces"],
)
def test_the_fingerprint_tells_apart_equal_vocabularies_that_cut_text_differently(one, other):
    first, second = with_core(one), with_core(other)
    assert first.get_vocab() == second.get_vocab()
    assert first("abc")["input_ids"] != second("abc")["input_ids"]
    assert template_fingerprint(first) != template_fingerprint(second)


def test_the_fingerprint_tells_normalizers_and_pre_tokenizers_apart():
    word = models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    plain, split = with_core(word), with_core(word, pre_tokenizers.WhitespaceSplit())
    lower = with_core(word, normalizer=normalizers.Lowercase())
    assert len({template_fingerprint(tokenizer) for tokenizer in (plain, split, lower)}) == 3


def template_settings(file: Path | None) -> RunSettings:
    return RunSettings(output="runs", data={"train": "rows.jsonl", "template": file and str(file)})


@pytest.mark.parametrize("template", [CHATML, TAGGED, "{% for m in messages %}{% break %}{% endfor %}"])
def test_a_template_file_is_read_as_it_is(tmp_path, template):
    (tmp_path / "chat.jinja").write_text(template)
    assert read_template(template_settings(tmp_path / "chat.jinja")) == template
    assert read_template(template_settings(None)) is None


def test_a_template_file_that_is_not_there_is_an_error_that_names_the_key(tmp_path):
    with pytest.raises(UserError, match="key `data.template`: no file .*missing.jinja"):
        read_template(template_settings(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    "text, line, problem",
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", 2, "unexpected '}'"),
        ("a\n{% generation %}\n{% if %}{% endgeneration %}", 3, "Expected an expression"),
    ],
)
def test_a_template_file_with_a_mistake_is_an_error_that_names_its_line(tmp_path, text, line, problem):
    (tmp_path / "chat.jinja").write_text(text)
    with pytest.raises(UserError, match=f"chat.jinja:{line}: not a Jinja template \\({problem}"):
        read_template(template_settings(tmp_path / "chat.jinja"))


def test_a_template_file_that_is_no_text_is_an_error_that_names_it(tmp_path):
    (tmp_path / "chat.jinja").write_bytes(b"\xff{{ x }}")
    with pytest.raises(UserError, match="chat.jinja: .*UTF-8"):
        read_template(template_settings(tmp_path / "chat.jinja"))
