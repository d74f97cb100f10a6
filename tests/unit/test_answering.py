"""Models answer in their own template, the same with the same seed however they are asked; chat, comparison, errors."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.helpers import tiny
from tristage.answering import chat as chat_module
from tristage.answering.chat import Chat, coloured, keyboard, run
from tristage.answering.compare import compare, read_prompts, summary, table, write
from tristage.answering.models import Answer, Judge, Speaker, name_of, unique_names
from tristage.cli.main import main as tristage
from tristage.errors import UserError
from tristage.intervals import win_rate
from tristage.models.reward_model import last_token_scores
from tristage.rollout import SamplingConfig

SAMPLING = SamplingConfig(12, 1.0, 1.0, 0)
ASKED = ["Name two fruits.", "List three birds, please.", "Give 4 tools."]
DIALOGUES = [[{"role": "user", "content": text}] for text in ASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds sft/final, ppo/final and scorer."""
    folder = tmp_path_factory.mktemp("answering")
    rows = tiny.write_rows(folder / "rows")
    tiny.teach(tiny.write_model(folder / "sft/final"), rows["sft"])
    tiny.write_model(folder / "ppo/final", seed=3, gain=2.0)
    tiny.write_reward_model(folder / "scorer", str(folder / "sft/final"))
    return folder


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Speaker:
    return Speaker(str(folder / "sft/final"))


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return Judge(str(folder / "scorer"))


# -- answers and scores -----------------------------------------------------------------------------------------


def test_a_batch_answers_as_one_by_one_and_as_a_stream(speaker: Speaker) -> None:
    together = speaker.answers(DIALOGUES, SAMPLING, seed=5)
    assert len({answer.text for answer in together}) == 3
    for row, dialogue in enumerate(DIALOGUES):
        *_, last = speaker.stream(dialogue, SAMPLING, seed=5, row=row)
        assert last == together[row]
    assert speaker.answers(DIALOGUES[:1], SAMPLING, seed=5) == together[:1]
    assert speaker.answers(DIALOGUES, SAMPLING, seed=6) != together


def test_a_stream_grows_to_its_answer(speaker: Speaker) -> None:
    parts = list(speaker.stream(DIALOGUES[0], SAMPLING, seed=1))
    assert [part.tokens for part in parts] == list(range(1, len(parts) + 1))
    assert all(later.text.startswith(earlier.text) for earlier, later in zip(parts, parts[1:], strict=False))
    assert parts[-1].ended or parts[-1].tokens == 12


def test_a_prompt_is_the_dialogue_in_the_model_s_template(speaker: Speaker) -> None:
    answer, question = {"role": "assistant", "content": "fig."}, {"role": "user", "content": "Name one fruit."}
    turns = [*DIALOGUES[0], answer, question]
    text = speaker.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert speaker.prompt(turns, 12).ids == speaker.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_long_dialogue_loses_its_oldest_tokens_and_answers_stay_within_half(speaker: Speaker) -> None:
    turns = [{"role": "user", "content": "Name two fruits. " * 200}]
    assert len(speaker.prompt(turns, 20).ids) == speaker.positions - 20
    assert speaker.limited(SamplingConfig(10_000, 1.0, 1.0, 0)).max_new_tokens == speaker.positions // 2
    (answer,) = speaker.answers([turns], SamplingConfig(10_000, 1.0, 1.0, 0), seed=0)
    assert 0 < answer.tokens <= speaker.positions // 2


def test_a_score_is_the_reward_model_s_number_at_the_end_of_the_rendered_text(judge: Judge) -> None:
    answers = [Answer("fig, kiwi.", 5, True), Answer("owl", 1, True), Answer("saw, axe, drill", 5, False)]
    scores = judge.scores(DIALOGUES, answers)
    for dialogue, answer, score in zip(DIALOGUES, answers, scores, strict=True):
        prompt = judge.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        turns = [*dialogue, {"role": "assistant", "content": answer.text}]
        whole = judge.tokenizer.apply_chat_template(turns, tokenize=False)
        assert whole.startswith(prompt)
        end = whole.index(answer.text) + len(answer.text)
        text = whole[:end] + (judge.tokenizer.eos_token if answer.ended else "")
        ids = torch.tensor([judge.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            mask = torch.ones_like(ids, dtype=torch.bool)
            expected = last_token_scores(judge.model(ids, mask), mask)
        assert score == pytest.approx(float(expected), abs=1e-5)
        assert judge.token_values(dialogue, answer)[-1][1] == pytest.approx(score, abs=1e-5)


def test_names_tell_models_apart() -> None:
    assert name_of("output/mine/step3_ppo/final") == "step3_ppo/final" and name_of("models/opt-1.3b/") == "opt-1.3b"
    assert unique_names(["a", "b", "a"]) == ["a (1)", "b", "a (2)"]


# -- chat -------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(folder: Path, speaker: Speaker, judge: Judge) -> Chat:
    return Chat([speaker, Speaker(str(folder / "ppo/final"))], judge, SAMPLING, seed=5)


def said(chat: Chat, lines: list[str], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False, **options)
    run(chat, console, lines)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_models_answer_and_remember_each_its_own_dialogue(chat: Chat, speaker: Speaker) -> None:
    printed = said(chat, [ASKED[0], "", ASKED[1]])
    first, second = chat.all
    assert [turn["role"] for turn in first.turns] == ["user", "assistant"] * 2
    assert first.turns[1]["content"] == speaker.answers(DIALOGUES[:1], SAMPLING, seed=5)[0].text
    assert first.turns[0] == second.turns[0] and first.turns[1] != second.turns[1]
    scores = chat.scores()
    assert scores is not None and f"sft/final: score {scores[0]:.3f}" in printed and "ppo/final: score " in printed
    for each in chat.all:
        assert each.turns[-1]["content"] in printed


def test_commands_start_again_and_show_tokens(chat: Chat) -> None:
    printed = said(chat, ["/tokens", ASKED[0], "/new", "/unknown", "/quit", ASKED[1]])
    assert "values of tokens on" in printed and "a new conversation" in printed
    assert printed.count(chat_module.HELP) == 2
    assert all(each.turns == [] for each in chat.all)  # nothing after /quit was asked
    assert "[" in printed.partition("score")[2]  # no colour on this console: numbers


def test_colours_go_from_the_lowest_value_to_the_highest() -> None:
    colour = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    text = coloured([("a", -1.0), (" b", 3.0)], colour)
    assert text.plain.startswith("a b") and [str(span.style) for span in text.spans[:2]] == [
        "white on rgb(200,70,70)",
        "white on rgb(70,200,70)",
    ]


def test_wide_terminals_have_answers_side_by_side(chat: Chat) -> None:
    printed = said(chat, [ASKED[0]], force_terminal=True)
    top = next(line for line in printed.splitlines() if "sft/final" in line)
    assert "ppo/final" in top and "╭" in top


def test_ctrl_c_keeps_the_answer_so_far(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chat.all[0].speaker.answers(DIALOGUES[:1], SAMPLING, seed=5)[0]

    def interrupted(self: Speaker, *arguments: Any, **options: Any) -> Iterator[Answer]:
        yield Answer(whole.text[:3], 1, False)
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "stream", interrupted)
    said(chat, [ASKED[0]])
    assert chat.all[0].turns[-1] == {"role": "assistant", "content": whole.text[:3]}


def test_a_turn_that_the_template_refuses_is_one_sentence_and_forgotten(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = "{{ raise_exception('no fruit') if 'fruit' in messages[-1]['content'] }}x"
    for each in chat.all:
        monkeypatch.setattr(each.speaker.tokenizer, "chat_template", refuses)
    assert "not answered: the dialogue: the tokenizer's chat template refuses" in said(chat, ["Name a fruit"])
    assert all(each.turns == [] for each in chat.all)


def test_lines_come_from_a_pipe_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert list(keyboard(Console(file=io.StringIO()))) == ["one", "two"]


# -- comparison -------------------------------------------------------------------------------------------------


def shortest(prompts: list[str], responses: list[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def test_a_comparison_has_the_same_random_numbers_and_honest_win_rates(
    folder: Path, judge: Judge, tmp_path: Path
) -> None:
    prompts = [tuple(dialogue) for dialogue in DIALOGUES * 4]
    paths = [str(folder / "sft/final"), str(folder / "ppo/final"), str(folder / "sft/final")]
    found = compare(paths, prompts, SAMPLING, 5, judge, shortest)
    assert [each.name for each in found] == ["sft/final (1)", "ppo/final", "sft/final (2)"]
    assert found[0].answers == found[2].answers != found[1].answers
    rows = summary(found)
    assert rows[2]["score"]["win_rate"] == rows[2]["grade"]["win_rate"] == 0.5
    rate, low, high = win_rate(found[1].scores["score"], found[0].scores["score"])
    assert (rows[1]["score"]["win_rate"], rows[1]["score"]["win_interval"]) == (rate, (low, high))
    console = Console(file=io.StringIO(), width=200)
    console.print(table(rows))
    assert f"{100 * rate:.1f} % (" in console.file.getvalue()  # type: ignore[attr-defined]
    page = write(tmp_path / "out", prompts, found, rows)
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[1]["messages"][0]["content"] == ASKED[1]
    assert [each["response"] for each in lines[0]["answers"]] == [each.answers[0].text for each in found]
    assert json.loads((tmp_path / "out/compare.json").read_text())[1]["model"] == "ppo/final"
    assert "12 prompts" in page.read_text() and "<script src" not in page.read_text()


def test_prompts_come_from_any_rows_that_have_one(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "A"}, {"prompt": "B", "response": "x"}, {"prompt": [{"role": "user", "content": "C"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [turns[-1]["content"] for turns in read_prompts(str(file), None)] == ["A", "B", "C"]
    assert len(read_prompts(str(file), 2)) == 2
    file.write_text("")
    with pytest.raises(UserError, match="prompts.jsonl.*(no prompt|empty)"):
        read_prompts(str(file), None)


# -- wrong input ------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(folder: Path, tmp_path: Path) -> dict[str, str]:
    """Paths that are no models, by what is wrong."""
    plain = tmp_path / "plain"
    shutil.copytree(folder / "sft/final", plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    return {"plain": str(plain), "adapter": str(adapter), "run": str(folder / "sft"), "scorer": str(folder / "scorer")}


@pytest.mark.parametrize(
    "words, message",
    [
        (["chat", "/nowhere"], "/nowhere: there is no such folder; give the folder of a language model"),
        (["chat", "{run}"], "give the folder of a language model, such as"),
        (["chat", "{adapter}"], "is an adapter; merge it into its model"),
        (["chat", "{plain}"], "has no chat template"),
        (["chat", "{scorer}"], "holds a reward model, not a language model"),
        (["chat", "{run}/final", "--reward-model", "{run}/final"], "holds no reward model"),
        (["chat", "{run}/final", "--temperature", "0"], "--temperature 0 is out of range"),
        (["chat", "{plain}", "--template", "/nowhere.jinja"], "/nowhere.jinja: cannot be read"),
        (["compare", "{run}/final", "--prompts", "x"], "give two models or more to compare"),
        (["compare", "{run}/final", "{run}", "--prompts", "x"], "is not a model"),
        (["compare", "{run}/final", "{run}/final", "--prompts", "/no.jsonl"], "there is no such file"),
    ],
)
def test_wrong_input_is_one_sentence(bad: dict[str, str], words: list[str], message: str, capsys: Any) -> None:
    assert tristage([word.format(**bad) for word in words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed


def test_a_folder_without_a_template_answers_with_one_that_is_given(bad: dict[str, str], speaker: Speaker) -> None:
    given = Speaker(bad["plain"], speaker.tokenizer.chat_template)
    assert given.answers(DIALOGUES, SAMPLING, 5) == speaker.answers(DIALOGUES, SAMPLING, 5)
