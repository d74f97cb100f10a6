"""Each layout reads as documented, each bad row is one sentence that names it, real data reads whole."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest

from tests.helpers.real_data import real_file
from tristage.config import SourceSettings
from tristage.data.rows import (
    PromptRow,
    RankingRow,
    Row,
    SFTRow,
    TextRow,
    Unusable,
    prompt_hash,
    read_row,
    row_hash,
)
from tristage.data.sources import open_source
from tristage.errors import UserError

WHERE = "rows.jsonl:7"
KINDS = ("ranking", "sft", "prompt")

USER_HI = ({"role": "user", "content": "Hi"},)
HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye"
HH_TURNS = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
BRIEF = {"system": "Be brief."}
PAIR = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
DEMONSTRATION = {"prompt": "Hi", "response": "there"}
DEMONSTRATION_COLUMNS = {"prompt": "prompt", "response": "response"}


def read(raw: object, kind, **source) -> Row:
    return read_row((WHERE, raw), SourceSettings(path="rows.jsonl", **source), kind)


def refusal(raw: object, kind, **source) -> str:
    """The sentence about a malformed row, without its place."""
    with pytest.raises(UserError) as caught:
        read(raw, kind, **source)
    place, _, sentence = str(caught.value).partition(f"{WHERE}: ")
    assert place == "" and "\n" not in sentence
    return sentence


def says(speaker: str, text: str) -> dict[str, str]:
    """A message as ShareGPT writes it."""
    return {"from": speaker, "value": text}


def hh(answer: str) -> str:
    return f"{HH_PROMPT}\n\nAssistant: {answer}"


def parts(*texts: str) -> list[dict[str, str]]:
    """A content as OpenAI's API writes it."""
    return [{"type": "text", "text": text} for text in texts]


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# -- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, prompt, answers, ranks",
    [
        (PAIR, USER_HI, ("good", "bad"), (0, 1)),
        ({"prompt": "Hi", "responses": ["c", "a", "b"], "ranks": [2, 0, 1]}, USER_HI, ("c", "a", "b"), (2, 0, 1)),
        ({"prompt": "Hi", "responses": ["b", "a"], "scores": [-3, 0.5]}, USER_HI, ("b", "a"), (1, 0)),
        (  # the highest score is the best, equal scores are equal ranks
            {"prompt": "Hi", "responses": ["c", "a", "b", "as b"], "scores": [1, 7.5, 2, 2]},
            USER_HI,
            ("c", "a", "b", "as b"),
            (2, 0, 1, 1),
        ),
        ({"chosen": hh("good"), "rejected": hh("bad")}, HH_TURNS, ("good", "bad"), (0, 1)),
        (
            {"chosen": [SYSTEM, *HH_TURNS, assistant("good")], "rejected": [SYSTEM, *HH_TURNS, assistant("bad")]},
            (SYSTEM, *HH_TURNS),
            ("good", "bad"),
            (0, 1),
        ),
        (
            {"prompt": list(HH_TURNS), "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            HH_TURNS,
            ("good", "bad"),
            (0, 1),
        ),
        ({"instruction": "Hi", "output": ["a", "b", "c"]}, USER_HI, ("a", "b", "c"), (0, 1, 2)),
        (  # LLaMA-Factory's pairs: ShareGPT's messages, OpenAI's, Alpaca's columns
            {"conversations": [says("human", "Hi")], "chosen": says("gpt", "good"), "rejected": says("gpt", "bad")},
            USER_HI,
            ("good", "bad"),
            (0, 1),
        ),
        (
            {"messages": list(HH_TURNS), "chosen": assistant("good"), "rejected": assistant("bad")} | BRIEF,
            (SYSTEM, *HH_TURNS),
            ("good", "bad"),
            (0, 1),
        ),
        (
            {"instruction": "Add.", "input": "1 + 2", "chosen": "3", "rejected": "4"},
            (user("Add.\n1 + 2"),),
            ("3", "4"),
            (0, 1),
        ),
        (  # as in ultrafeedback_binarized: whole dialogues, and their prompt once more
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("good")],
                "rejected": [user("Hi"), assistant("bad")],
                "messages": [user("Hi"), assistant("good")],
            },
            USER_HI,
            ("good", "bad"),
            (0, 1),
        ),
    ],
)
def test_ranking_layouts_give_a_prompt_with_ranked_answers(raw, prompt, answers, ranks):
    assert read(raw, "ranking") == RankingRow(prompt, answers, ranks, WHERE)


def test_best_first_ranks_responses_by_their_order_unless_they_have_ranks_or_scores():
    raw = {"prompt": "Hi", "responses": ["a", "b", "c"]}
    assert read(raw, "ranking", best_first=True) == RankingRow(USER_HI, ("a", "b", "c"), (0, 1, 2), WHERE)
    assert read(raw | {"scores": [1, 2, 3]}, "ranking", best_first=True).ranks == (2, 1, 0)
    assert read(raw | {"ranks": [1, 0, 1]}, "ranking", best_first=True).ranks == (1, 0, 1)
    assert "found only a prompt" in refusal(raw, "ranking")


@pytest.mark.parametrize(
    "raw, prompt, response",
    [
        ({"prompt": "Hi", "response": " there\n"}, USER_HI, " there\n"),
        ({"prompt": "Hi", "response": [assistant("there")]}, USER_HI, "there"),
        ({"prompt": list(HH_TURNS), "response": "Ciao"}, HH_TURNS, "Ciao"),
        ({"prompt": "Hi", "completion": "there"}, USER_HI, "there"),
        ({"prompt": [user("Hi")], "completion": [assistant("there")]}, USER_HI, "there"),
        ({"messages": [*HH_TURNS, assistant("Ciao")]}, HH_TURNS, "Ciao"),
        ({"conversations": [*HH_TURNS, assistant("Ciao")]}, HH_TURNS, "Ciao"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "user", "value": "Bye"},
                    {"from": "assistant", "value": "Ciao"},
                ]
            },
            (SYSTEM, *HH_TURNS),
            "Ciao",
        ),
        ({"prompt": "Hi", "response": "there", "system": "Be brief."}, (SYSTEM, *USER_HI), "there"),
        ({"messages": [SYSTEM, user("Hi"), assistant("there")], "system": "Be long."}, (SYSTEM, *USER_HI), "there"),
        ({"messages": [user(parts("H", "i")), assistant(parts("there"))]}, USER_HI, "there"),
        ({"prompt": [says("human", "Hi")], "response": says("gpt", "there")}, USER_HI, "there"),
        ({"instruction": "Hi", "output": "there"}, USER_HI, "there"),
        ({"instruction": "Hi", "input": " ", "output": "there", "history": [], "system": ""}, USER_HI, "there"),
        ({"instruction": "Add.", "input": "1 + 2", "output": "3"}, (user("Add.\n1 + 2"),), "3"),
        (
            {"instruction": "Bye", "output": "Ciao", "history": [["Hi", "Hello"]], "system": "Be brief."},
            (SYSTEM, *HH_TURNS),
            "Ciao",
        ),
        (
            {"instruction": "3", "input": None, "output": "c", "history": [["1", "a"], ["2", "b"]]},
            (user("1"), assistant("a"), user("2"), assistant("b"), user("3")),
            "c",
        ),
    ],
)
def test_demonstration_layouts_give_a_prompt_with_an_answer(raw, prompt, response):
    assert read(raw, "sft") == SFTRow(prompt, response, WHERE)


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("Hi", USER_HI),
        (HH_PROMPT, HH_TURNS),
        (HH_PROMPT + "\n\nAssistant:", HH_TURNS),
        (HH_PROMPT.lstrip() + "\n\nAssistant:", HH_TURNS),  # as published by some: the first blank line is lost
        (" \n" + HH_PROMPT.lstrip(), HH_TURNS),
        ("Human: error or not?", (user("Human: error or not?"),)),
        ("What does\n\nHuman: mean?", (user("What does\n\nHuman: mean?"),)),
        ("\n\nHuman:  two spaces \n", (user(" two spaces \n"),)),
        ([SYSTEM, *HH_TURNS], (SYSTEM, *HH_TURNS)),
    ],
)
def test_prompt_text_is_one_user_turn_unless_it_is_a_dialogue(prompt, turns):
    assert read({"prompt": prompt}, "prompt") == PromptRow(turns, WHERE)


def test_text_is_kept_as_it_stands():
    assert read({"text": " One.\n\nHuman: Two.\n"}, "text") == TextRow(" One.\n\nHuman: Two.\n", WHERE)


def test_a_json_line_reads_as_its_decoded_row():
    assert read(json.dumps(PAIR).encode(), "ranking") == read(PAIR, "ranking")


def test_other_columns_are_listed_and_the_richest_layout_wins():
    row = read(DEMONSTRATION | {"id": 7, "tags": None, "label": "greeting", "images": [], "tools": "[]"}, "sft")
    assert row == SFTRow(USER_HI, "there", WHERE) and row.unused == ("id", "label")
    messages = [user("Hi") | {"name": "Ann", "tool_calls": None}, assistant("there") | {"weight": 1}]
    assert read({"messages": messages}, "sft").unused == ("messages[].name", "messages[].weight")
    assert read({"instruction": "Hi", "input": "x", "output": "y", "system": "z", "history": []}, "sft").unused == ()
    assert read({"prompt": [SYSTEM, *USER_HI], "system": "Be long."}, "prompt").unused == ("system",)
    assert read(DEMONSTRATION | {"id": 7}, "sft", columns=DEMONSTRATION_COLUMNS).unused == ()
    assert read(PAIR | DEMONSTRATION | {"text": "x"}, "ranking") == RankingRow(USER_HI, ("good", "bad"), (0, 1), WHERE)


# -- kinds -------------------------------------------------------------------------------------------------


def test_a_ranking_row_serves_the_simpler_steps_with_its_first_best_answer():
    raw = {"prompt": "Hi", "responses": ["worst", "best", "as good"], "ranks": [3, 0, 0]}
    assert read(raw, "sft") == SFTRow(USER_HI, "best", WHERE)
    assert read(raw, "prompt") == PromptRow(USER_HI, WHERE)
    assert read(DEMONSTRATION, "prompt") == PromptRow(USER_HI, WHERE)


RANKED = "ranked answers (prompt + chosen + rejected, or responses with ranks, scores or `best_first: true`)"


@pytest.mark.parametrize(
    "raw, kind, needed, found",
    [
        (DEMONSTRATION, "ranking", RANKED, "a prompt and one answer"),
        ({"prompt": "Hi"}, "ranking", RANKED, "a prompt"),
        ({"text": "Hi"}, "ranking", RANKED, "plain text"),
        ({"prompt": "Hi"}, "sft", "an answer (prompt + response)", "a prompt"),
        ({"text": "Hi"}, "sft", "an answer (prompt + response)", "plain text"),
        ({"text": "Hi"}, "prompt", "a prompt", "plain text"),
        (PAIR, "text", "plain text (text)", "ranked answers"),
        (DEMONSTRATION, "text", "plain text (text)", "a prompt and one answer"),
        ({"prompt": "Hi"}, "text", "plain text (text)", "a prompt"),
    ],
)
def test_a_row_that_is_too_poor_for_the_step_is_refused(raw, kind, needed, found):
    assert refusal(raw, kind) == f"this step needs {needed} in every row, found only {found}"


# -- columns and clean -------------------------------------------------------------------------------------

NESTED = {
    "prompt": "not mapped",
    "question": {"text": "Hi", "lang": "en"},
    "answers": [{"text": "good"}, {"text": "bad"}],
    "votes": [2, 5],
}
QUESTION = {"prompt": "question.text"}


@pytest.mark.parametrize(
    "columns, kind, row",
    [
        (QUESTION, "prompt", PromptRow(USER_HI, WHERE)),
        (QUESTION | {"response": "answers.1.text"}, "sft", SFTRow(USER_HI, "bad", WHERE)),
        (
            QUESTION | {"responses": ["answers.0.text", "answers.1.text"], "scores": "votes"},
            "ranking",
            RankingRow(USER_HI, ("good", "bad"), (1, 0), WHERE),
        ),
        (
            QUESTION | {"responses": ["answers.0.text", "question.lang"], "ranks": ["votes.1", "votes.0"]},
            "ranking",
            RankingRow(USER_HI, ("good", "en"), (5, 2), WHERE),
        ),
    ],
)
def test_columns_reach_into_objects_and_lists_and_several_make_a_list(columns, kind, row):
    assert read(NESTED, kind, columns=columns) == row


def test_with_columns_given_no_other_column_is_read():
    columns = {"prompt": "prompt", "response": "chosen"}
    assert read(PAIR | {"response": "other"}, "sft", columns=columns) == SFTRow(USER_HI, "good", WHERE)
    assert "found only a prompt and one answer" in refusal(PAIR, "ranking", columns=columns)


@pytest.mark.parametrize(
    "path, there",
    [
        ("query", "the columns ['answers', 'prompt', 'question', 'votes']"),
        ("question.title", "no 'title' inside"),
        ("question.text.en", "no 'en' inside"),
        ("answers.2.text", "no '2' inside"),
        ("answers.first", "no 'first' inside"),
        ("votes.0.text", "no 'text' inside"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_names_it(path, there):
    sentence = f"`columns` names {path!r}, but the row has {there}; correct it"
    assert refusal(NESTED, "sft", columns=QUESTION | {"response": path}) == sentence
    assert refusal(NESTED, "sft", columns=QUESTION | {"responses": ["prompt", path]}) == sentence


def test_clean_rules_apply_in_order_to_their_columns_only():
    rules = [
        {"columns": ["prompt", "response"], "pattern": r"<br\s*/?>", "replacement": "\n"},
        {"columns": ["response"], "pattern": r"\n+$"},
        {"columns": ["response"], "pattern": r"\bu\b", "replacement": "you"},
        {"columns": ["response"], "pattern": r"(\w+)@(\w+)", "replacement": r"\2 at \1"},
        {"columns": ["absent"], "pattern": ".", "replacement": "x"},
    ]
    raw = {"prompt": "Hi<br>u<br/>", "response": "thank u<br >a@b<br>"}
    assert read(raw, "sft", clean=rules) == SFTRow((user("Hi\nu\n"),), "thank you\nb at a", WHERE)


def test_clean_rules_reach_into_lists_of_text_under_our_names():
    raw = {"query": "Hi", "replies": ["a</s>", "b</s>"], "votes": [1, 2]}
    columns = {"prompt": "query", "responses": "replies", "scores": "votes"}
    rule = {"columns": ["responses", "scores"], "pattern": "</s>"}
    assert read(raw, "ranking", columns=columns, clean=[rule]).answers == ("a", "b")
    assert read(raw, "ranking", columns=columns, clean=[rule | {"columns": ["replies"]}]).answers == ("a</s>", "b</s>")


# -- bad rows ----------------------------------------------------------------------------------------------

ROLES = "it must be one of system, user, assistant"
NO_TOOLS = "and tools are not supported; remove the row"


@pytest.mark.parametrize(
    "raw, sentence",
    [
        (["Hi", "there"], "a row must be an object with named columns, found list"),
        (None, "a row must be an object with named columns, found null"),
        (b'"Hi"', "a row must be an object with named columns, found str"),
        (b'{"prompt": "Hi", ', "not JSON (Expecting property name enclosed in double quotes at column"),
        (b'{"prompt": "\xff", "response": "x"}', "byte 0xff is not UTF-8"),
        (
            {"one": "Hi", "two": "there"},
            "the columns ['one', 'two'] are not understood, rename them to one of: prompt + chosen + rejected;",
        ),
        ({"prompt": "Hi", "response": 3}, "`response` must be text, found int"),
        ({"prompt": None, "response": "x"}, "`prompt` must be text, found null"),
        ({"prompt": "", "response": "x"}, "`prompt` is empty"),
        ({"prompt": "Hi", "response": " \n"}, "`response` is empty"),
        (b'{"prompt": "\\ud800", "response": "x"}', "`prompt` has half a surrogate pair at 0"),
        ({"prompt": [], "response": "x"}, "`prompt` as a list of messages must end with a user turn"),
        ({"prompt": [assistant("Hi")], "response": "x"}, "`prompt` as a list of messages must end with a user turn"),
        ({"prompt": "Hi", "response": [user("x")]}, "`response` as a list of messages must hold one assistant turn"),
        ({"prompt": "Hi", "response": []}, "`response` as a list of messages must hold one assistant turn"),
        ({"prompt": "Hi", "completion": ""}, "`response` is empty"),
        ({"messages": "Hi"}, "`messages` must be a list of messages, found str"),
        ({"messages": [user("Hi")]}, "`messages` must hold a prompt and end with an assistant turn"),
        ({"messages": [assistant("Hi")]}, "`messages` must hold a prompt and end with an assistant turn"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, f"`messages[0]` has the role 'bot', {ROLES}; correct it"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, f"`messages[0]` has the role ['user'], {ROLES}"),
        ({"messages": [{"content": "Hi"}]}, f"`messages[0]` has the role None, {ROLES}"),
        ({"messages": ["Hi"]}, "`messages[0]` must be an object with a role and a content, found str"),
        ({"messages": [{"role": "tool", "content": "3"}]}, f"`messages[0]` has the role 'tool', {NO_TOOLS}"),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
            f"`messages[1]` has `tool_calls`, {NO_TOOLS}",
        ),
        ({"conversations": [says("observation", "3")]}, f"`conversations[0]` has the role 'observation', {NO_TOOLS}"),
        (
            {"messages": [user([*parts("Hi"), {"type": "image_url", "image_url": {"url": "a.png"}}])]},
            "`messages[0].content[1]` is of type 'image_url', and only text is supported; remove the row",
        ),
        ({"messages": [user([{"type": "text", "text": 3}])]}, "`messages[0].content[0].text` must be text, found int"),
        ({"messages": [user(parts("", " "))]}, "`messages[0].content` is empty"),
        ({"messages": [user([])]}, "`messages[0].content` must be text, found list"),
        (DEMONSTRATION | {"image": {"bytes": b"x"}}, "`image` is set, and images, video and audio are not supported;"),
        (
            {"messages": [user("<image>What is it?"), assistant("A fox.")], "images": ["a.png"]},
            "`images` is set, and images, video and audio are not supported; remove the row, or set `columns` to the "
            "columns to read, which leaves this one out",
        ),
        (DEMONSTRATION | {"tools": [{"name": "add"}]}, "`tools` is set, and tools are not supported; remove the row"),
        ({"messages": [{"role": "user"}]}, "`messages[0].content` must be text, found null"),
        ({"conversations": []}, "`conversations` must hold a prompt and end with an assistant turn"),
        ({"conversations": [{"from": "gpt", "text": "Hi"}]}, "`conversations[0].content` must be text, found null"),
        ({"instruction": "", "output": "x"}, "`instruction` is empty"),
        ({"instruction": "Hi", "input": ["x"], "output": "x"}, "`input` must be text, found list"),
        ({"instruction": "Hi", "output": "x", "system": 1}, "`system` must be text, found int"),
        ({"instruction": "Hi", "output": "x", "history": 1}, "`history` must be a list of pairs, found int"),
        ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "`history[0]` must be a pair of an instruction"),
        ({"instruction": "Hi", "output": "x", "history": [["a", "b"], ["c", ""]]}, "`history[1]` is empty"),
        ({"instruction": "Hi", "output": []}, "`output` is a list of 0, give two ranked answers or one text"),
        ({"instruction": "Hi", "output": ["a", 2]}, "`output[1]` must be text, found int"),
        ({"prompt": "Hi", "responses": "ab", "ranks": [0, 1]}, "`responses` and `ranks` must be two lists of the same"),
        ({"prompt": "Hi", "responses": ["a", "b"], "scores": [0]}, "`responses` and `scores` must be two lists of the"),
        ({"prompt": "Hi", "responses": ["a"], "ranks": [0]}, "`responses` has 1 answer, give 2"),
        (
            {"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, "1"]},
            "`ranks` must be finite numbers (0 = best), found '1'",
        ),
        ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, True]}, "`ranks` must be finite numbers (0 = best)"),
        (
            b'{"prompt": "Hi", "responses": ["a", "b"], "scores": [0, NaN]}',
            "`scores` must be finite numbers (highest = best), found nan",
        ),
        ({"prompt": "Hi", "responses": ["a", None], "ranks": [0, 1]}, "`responses[1]` must be text, found null"),
        ({"chosen": "good", "rejected": "bad"}, "`chosen` without a `prompt` column must be a complete dialogue"),
        (
            {"chosen": [assistant("a")], "rejected": [assistant("b")]},
            "`chosen` without a `prompt` column must hold the prompt's turns too",
        ),
        (PAIR | {"rejected": [user("Hi"), assistant("b")]}, "`rejected` as a list of messages must hold one assistant"),
    ],
)
def test_a_malformed_row_is_one_sentence_after_its_place(raw, sentence):
    assert refusal(raw, "sft").startswith(sentence)


@pytest.mark.parametrize("label", [{"label": False}, {"label": 0}, {"label": "false"}, {"kto_tag": False}])
def test_an_answer_that_its_row_labels_as_bad_is_not_learned(label):
    name = next(iter(label))
    sentence = refusal({"prompt": "Hi", "completion": "no"} | label, "sft")
    assert sentence.startswith(f"`{name}` is ") and "must not be learned" in sentence and "on_bad_row: skip" in sentence
    assert read({"prompt": "Hi", "completion": "no"} | label, "prompt").prompt == USER_HI  # of no matter to a rollout
    good = read({"prompt": "Hi", "completion": "there", name: True}, "sft")
    assert good == SFTRow(USER_HI, "there", WHERE) and good.unused == ()
    assert read(PAIR | label, "ranking").answers == ("good", "bad")


@pytest.mark.parametrize(
    "raw, kind, setting",
    [
        ({"question": "Hi", "answer": "there"}, "sft", "{prompt: question, response: answer}"),
        ({"Question": "Hi", "Answer": "there", "id": 1}, "sft", "{prompt: Question, response: Answer}"),
        ({"prompt": "Hi", "answer": "there"}, "sft", "{prompt: prompt, response: answer}"),
        (
            BRIEF | {"question": "Hi", "chosen": "a", "rejected": "b"},
            "ranking",
            "{prompt: question, chosen: chosen, rejected: rejected, system: system}",
        ),
        ({"query": "Hi"}, "prompt", "{prompt: query}"),
        ({"content": "Hi"}, "text", "{text: content}"),
        ({"dialog": [user("Hi"), assistant("there")]}, "sft", "{messages: dialog}"),
    ],
)
def test_unknown_columns_come_with_a_guess_of_the_setting_that_reads_them(raw, kind, setting):
    assert f"set `columns: {setting}` next to the `path` of this source" in refusal(raw, kind)


def test_malformed_text_is_one_sentence_after_its_place():
    assert refusal({"text": "\n"}, "text") == "`text` is empty, fill it or remove the row"
    assert refusal({"text": 3}, "text") == "`text` must be text, found int"


# -- dropped rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "x"}, "identical answers"),
        ({"instruction": "Hi", "output": ["x", "x", "x"]}, "identical answers"),
        ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 1]}, "all answers ranked equal"),
        ({"prompt": "Hi", "responses": ["a", "b"], "scores": [0.5, 0.5]}, "all answers ranked equal"),
        ({"chosen": hh("same"), "rejected": hh("same")}, "identical answers"),
        (
            {"chosen": hh("a"), "rejected": "\n\nHuman: Else\n\nAssistant: b"},
            "dialogues differ before the last turn",
        ),
        (
            {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
            "dialogues differ before the last turn",
        ),
        ({"chosen": hh("a"), "rejected": hh("")}, "dialogue with an empty turn"),
        ({"chosen": HH_PROMPT, "rejected": HH_PROMPT}, "dialogue does not end with an answer"),
        (PAIR | {"prompt": "\n\nHuman: \n\nAssistant: a\n\nHuman: Hi"}, "dialogue with an empty turn"),
        (PAIR | {"prompt": "Human: \n\nAssistant: a\n\nHuman: Hi"}, "dialogue with an empty turn"),
    ],
)
def test_a_row_that_teaches_nothing_is_unusable_alike_in_every_step(raw, reason, kind):
    with pytest.raises(Unusable) as caught:
        read(raw, kind)
    assert str(caught.value) == reason


# -- hashes ------------------------------------------------------------------------------------------------


def test_rows_of_every_kind_with_one_prompt_share_its_hash():
    rows = [read(PAIR, kind) for kind in KINDS]
    rows += [read({"messages": [user("Hi"), assistant("x")]}, "sft"), PromptRow(USER_HI, "elsewhere")]
    assert len({prompt_hash(row) for row in rows}) == 1
    others = [PromptRow(turns, WHERE) for turns in (USER_HI, (SYSTEM, *USER_HI), ({**USER_HI[0], "role": "system"},))]
    others += [TextRow("Hi", WHERE), TextRow("Hi.", WHERE)]
    hashes = [prompt_hash(row) for row in others]
    assert len(set(hashes)) == 5 and all(0 <= each < 2**63 for each in hashes)


def test_rows_share_a_row_hash_when_all_but_their_places_is_equal():
    different = [
        PromptRow(USER_HI, "a"),
        SFTRow(USER_HI, "x", "a"),
        SFTRow(USER_HI, "y", "a"),
        RankingRow(USER_HI, ("x", "y"), (0, 1), "a"),
        RankingRow(USER_HI, ("y", "x"), (0, 1), "a"),
        RankingRow(USER_HI, ("x", "y"), (1, 0), "a"),
    ]
    assert len({row_hash(row) for row in different}) == 6
    for row in different:
        assert row_hash(dataclasses.replace(row, where="b")) == row_hash(row)


# -- real data ---------------------------------------------------------------------------------------------
# The numbers were counted in the files themselves, without the code under test.


def read_all(path: str, kind, **settings) -> tuple[list[Row], dict[str, int]]:
    """(rows, number of dropped rows by reason)."""
    source = SourceSettings(path=real_file(path), **settings)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for place in open_source(source).rows():
        try:
            rows.append(read_row(place, source, kind))
        except Unusable as reason:
            dropped[str(reason)] += 1
    return rows, dict(dropped)


def turns_of(rows) -> dict[int, int]:
    assert all(row.prompt[-1]["role"] == "user" for row in rows)
    return dict(Counter(len(row.prompt) for row in rows))


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_the_real_hh_set_is_read_or_counted(kind):
    rows, dropped = read_all("hh_helpful/helpful-base-test.jsonl.gz", kind)
    assert len(rows) == 2354 - 15
    assert dropped == {
        "dialogues differ before the last turn": 9,
        "dialogue with an empty turn": 4,
        "identical answers": 2,
    }
    assert rows[0].prompt == (user("Do you know why turkeys became the official food of thanksgiving?"),)
    if kind == "ranking":
        assert rows[0].answers[0].startswith("To be honest") and rows[0].answers[1].startswith("I know that")


def test_english_oasst_prompts_that_lost_their_first_blank_line_are_dialogues():
    rows, dropped = read_all("oasst_en/oasst_en.ranked.jsonl", "ranking", best_first=True)
    assert len(rows) == 212 and dropped == {}
    assert turns_of(rows) == {1: 99, 3: 111, 5: 2}
    assert Counter(len(row.answers) for row in rows) == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert rows[0].prompt == (user("How can I find the best 401k plan for my needs?"),)
    assert rows[0].answers[0].startswith("The first step is to research your options.") and rows[0].ranks == (0, 1, 2)
    assert rows[2].prompt[2] == user("Are blue light blocking glasses also effective?")


def test_chinese_oasst_rankings_are_read_or_counted():
    rows, dropped = read_all("oasst_zh/oaast_rm_zh.json", "ranking")
    assert len(rows) == 775 - 3 and dropped == {"identical answers": 3}
    assert turns_of(rows) == {1: 382, 3: 365, 5: 25}
    assert Counter(len(row.answers) for row in rows) == {2: 431, 3: 263, 4: 63, 5: 12, 6: 1, 8: 1, 10: 1}
    assert rows[0].prompt == (user("布洛芬和对乙酰氨基酚的区别是？"),)
    assert rows[0].answers[0].startswith("根据维基百科，") and rows[0].ranks[:2] == (0, 1)


def test_chinese_oasst_demonstrations_keep_their_history():
    rows, dropped = read_all("oasst_zh/oaast_sft_zh.json", "sft")
    assert len(rows) == 766 and dropped == {}
    assert turns_of(rows) == {1: 242, 3: 432, 5: 92}
    first, second, third = rows[10].prompt
    assert first == user("我需要举办6人晚宴。你能帮我推荐三道不包括坚果或海鲜的菜吗？")
    assert second["role"] == "assistant" and second["content"].endswith("3. 土豆炖豆角")
    assert third == user("谢谢") and rows[10].response == "不客气！祝您晚宴愉快！"


def test_seed_tasks_are_read_through_a_columns_map():
    path, columns = "seed_tasks/seed_tasks.jsonl", {"instruction": "instruction", "output": "instances.0.output"}
    bare, _ = read_all(path, "sft", columns=columns)
    rows, dropped = read_all(path, "sft", columns=columns | {"input": "instances.0.input"})
    assert len(bare) == len(rows) == 175 and dropped == {}
    assert sum(row.prompt != without.prompt for row, without in zip(rows, bare, strict=True)) == 125  # with an input
    assert bare[1].prompt == (user("What is the relation between the given pairs?"),)
    assert rows[1].prompt == (user("What is the relation between the given pairs?\nNight : Day :: Right : Left"),)
    assert rows[1].response == "The relation between the given pairs is that they are opposites."


def test_shakespeare_is_one_row_of_text():
    (row,), dropped = read_all("ptx/tinyshakespeare.txt", "text")
    assert len(row.text) == 1115394 and dropped == {}
    assert row.text.startswith("First Citizen:\nBefore we") and row.text.endswith("Whiles thou art waking.\n")
