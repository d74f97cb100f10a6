"""`tristage data show` prints what is learned; `data check` finds what must be fixed, and says so by its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny
from tristage.cli import main as cli

PROMPT = "Name two animals."
GOOD = [{"prompt": f"Name two animals {'please ' * i}.", "response": "fox, lion."} for i in range(12)]
HELD_OUT = [{"prompt": f"Give two fruits {'please ' * i}.", "response": "fig, kiwi."} for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("command") / "model")


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, model, capsys):
    """run(command, training rows, *words) -> (exit code, what it printed)."""

    def run(command: str, rows: list[object], *words: str, step: str = "sft") -> tuple[int, str]:
        train = write_jsonl(tmp_path / "train.jsonl", rows)
        heldout = write_jsonl(tmp_path / "heldout.jsonl", HELD_OUT if step == "sft" else rows[:1])
        make = tiny.sft_config if step == "sft" else tiny.reward_model_config
        config = make(tmp_path, model, train).file
        name = {"sft": "step1_sft", "reward": "step2_reward_model"}[step]
        code = cli.main(["data", command, config, f"data.heldout={heldout}", "--step", name, *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_show_marks_what_is_learned_and_shows_special_tokens(run):
    rows = [{"messages": [
        {"role": "user", "content": "Name two animals."},
        {"role": "assistant", "content": "fox, lion."},
        {"role": "user", "content": "Give two fruits."},
        {"role": "assistant", "content": "fig, kiwi."},
    ]}]  # fmt: skip
    code, printed = run("show", rows, "--rows", "5")
    assert code == 0 and re.findall("⟦(.*?)⟧", printed) == ["fox, lion.<eos>", "fig, kiwi.<eos>"]
    assert "train.jsonl:1   " in printed
    code, printed = run("show", rows, "data.train_on=last_answer")
    assert re.findall("⟦(.*?)⟧", printed) == ["fig, kiwi.<eos>"]


def test_show_prints_as_many_rows_as_asked_and_the_other_set(run):
    _, printed = run("show", GOOD, "--rows", "2")
    assert printed.count("⟦") == 2 and "Name two" in printed
    _, printed = run("show", GOOD, "--rows", "9", "--heldout")
    assert printed.count("⟦") == 3 and "heldout.jsonl:3" in printed and "Name two" not in printed


def test_show_prints_ranked_answers_best_first(run):
    row = {"prompt": PROMPT, "responses": ["fox.", "fox, lion.", "lion."], "ranks": [2, 0, 1]}
    _, printed = run("show", [row], "data.heldout_overlap=allow", step="reward")
    assert re.findall(r"rank (\d)|⟦(.*?)<eos>⟧", printed) == [
        ("0", ""), ("", "fox, lion."), ("1", ""), ("", "lion."), ("2", ""), ("", "fox."),
    ]  # fmt: skip


def test_check_of_good_data_says_that_nothing_is_to_fix(run):
    code, printed = run("check", GOOD)
    assert code == 0 and printed.strip().endswith("nothing to fix")
    assert re.search(r"training +│ train.jsonl +│ +12 │", printed)


def test_check_finds_every_malformed_row_at_once(run):
    bad = [GOOD[0], '{"prompt": "x", ', {"prompt": "Hi", "response": ""}, {"prompt": "Hi", "response": 3}, *GOOD[1:]]
    code, printed = run("check", bad)
    assert code == 1
    assert [int(line) for line in re.findall(r"malformed: \S*train.jsonl:(\d+):", printed)] == [2, 3, 4]
    assert "not JSON" in printed and "`response` is empty" in printed and "must be text, found int" in printed
    assert "to fix: " in printed and "3 malformed rows; fix them, or set `data.on_bad_row: skip`" in printed
    code, printed = run("check", bad, "data.on_bad_row=skip")
    assert code == 0 and "malformed: " in printed


def test_check_finds_prompts_on_both_sides(run):
    code, printed = run("check", [*GOOD, HELD_OUT[1]])
    assert code == 1 and "1 training rows have a prompt that is held out" in printed and "train.jsonl:13" in printed
    assert run("check", [*GOOD, HELD_OUT[1]], "data.heldout_overlap=drop")[0] == 0


def test_check_counts_duplicates_with_their_places(run):
    code, printed = run("check", [*GOOD, GOOD[2], GOOD[4] | {"response": "lion."}])
    assert code == 0
    assert re.search(r"training: 1 rows repeat an earlier row \(\S*train.jsonl:13\)", printed)
    assert re.search(r"training: 2 rows repeat an earlier prompt \(\S*train.jsonl:13, \S*train.jsonl:14\)", printed)


def test_check_names_identical_pairs_and_long_rows(run):
    rows = [{"prompt": f"{PROMPT} {i}", "chosen": "fox.", "rejected": "lion."} for i in range(4)]
    rows[2]["rejected"] = "fox."
    rows[3]["chosen"] = "fox, " * 60
    code, printed = run("check", rows, "data.heldout_overlap=allow", step="reward")
    assert code == 0 and "1 dropped: identical answers (:3)" in printed
    assert "1 dropped: longer than 64 tokens (:4)" in printed


def test_check_counts_truncated_rows(run):
    long = {"prompt": PROMPT, "response": "fox, " * 60}
    _, printed = run("check", [*GOOD, long], "data.too_long=truncate_right")
    row = next(line for line in printed.splitlines() if "train.jsonl" in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][-1] == "1"


def test_an_empty_set_is_to_fix(run):
    code, printed = run("check", GOOD, "data.heldout=null", "data.heldout_fraction=1e-9")
    assert code == 1 and "to fix: the held-out set is empty: no prompt of `data.train` falls in" in printed
    code, printed = run("show", GOOD, "data.heldout=null", "data.heldout_fraction=1e-9", "--rows", "2")
    assert code == 0 and printed.count("⟦") == 2
    code, printed = run("show", GOOD, "data.heldout=null", "data.heldout_fraction=1e-9", "--heldout")
    assert code == 0 and "`data.heldout_fraction`, 1e-09; raise it" in printed


def test_rows_that_fail_alike_are_said_once_with_a_guess_of_the_setting(run):
    rows = [{"question": row["prompt"], "answer": row["response"]} for row in GOOD]
    code, printed = run("check", rows)
    assert code == 1 and printed.count("not understood") == 1
    (problem,) = re.findall("to fix: (.*)", printed)
    assert "train.jsonl: no row can be read, 12 rows (:1, :2, :3, ...): the columns ['answer', 'question']" in problem
    assert "set `columns: {prompt: question, response: answer}`" in problem and "on_bad_row" not in problem
    code, printed = run("check", [*GOOD, *rows, '{"prompt": '])
    assert printed.count("not understood") == 1 and "malformed: 12 rows (:13, :14, :15, ...): the columns" in printed
    assert "13 malformed rows; fix them, or set `data.on_bad_row: skip`" in printed


def test_check_and_show_say_what_is_not_read(run):
    rows = [row | {"id": i} for i, row in enumerate(GOOD)]
    for command in ("check", "show"):
        assert "train.jsonl: columns that are not read: `id` (12 rows)" in run(command, rows)[1]


def test_what_stops_a_step_stops_the_command_with_2(run, tmp_path):
    code, printed = run("check", GOOD, "data.train=missing.jsonl")
    assert code == 2 and "error: missing.jsonl: there is no such file or folder" in printed
    assert cli.main(["data", "check", str(tmp_path / "any.yaml")]) == 2


def test_the_step_is_told_by_the_name_of_the_yaml():
    assert cli.settings_class("configs/opt-1.3b/step3_ppo.yaml", None).__name__ == "PPOConfig"
    assert cli.settings_class("mine.yaml", "step2_reward_model").__name__ == "RewardModelConfig"


def test_the_command_runs_as_a_program_and_draws_colours(model, tmp_path):
    rows = write_jsonl(tmp_path / "train.jsonl", GOOD)
    config = tiny.sft_config(tmp_path, model, rows).file
    words = ["data", "show", config, "--step", "step1_sft", "--rows", "1"]
    command = [sys.executable, "-X", "importtime", "-m", "tristage.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "\x1b[32mfox, lion.\x1b[0m\x1b[1;35m<eos>" in done.stdout and "⟦" not in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "transformers" in imported
    assert not imported & {"deepspeed", "peft", "datasets", "transformers.generation.utils"}  # seconds each
