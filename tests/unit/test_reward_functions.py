"""What reward functions get and give: columns of the rows, extra numbers, normalisation, timeouts and retries."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step3_ppo.config import PPOConfig, RewardFunction
from step3_ppo.rewards import RewardError, RewardTerm, function_scores, load_functions
from step3_ppo.rollout import Control, _normalized
from tests.helpers import tiny
from tristage.answering.scorers import Calls, score_texts
from tristage.batches import PromptBatch, Sequences
from tristage.data.sets import load_sets
from tristage.errors import UserError
from tristage.models.tokenizer import load_tokenizer
from tristage.runs.changes import changed_settings


def settings_of(folder: Path, *overrides: str, rows: str = "rows.jsonl") -> PPOConfig:
    return tiny.ppo_config(folder, "actor", "reward", rows, 0, *overrides)


# -- the call ----------------------------------------------------------------------------------------------


def test_rows_reach_a_function_that_names_them_and_are_its_own() -> None:
    def by_rows(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [float(row.pop("answer")[0] == response) for row, response in zip(rows, responses, strict=True)]

    rows = [{"answer": ["4"]}, {"answer": ["5"]}]
    assert score_texts(by_rows, ["a", "b"], ["4", "4"], "f", rows).scores.tolist() == [1, 0]
    assert rows == [{"answer": ["4"]}, {"answer": ["5"]}]
    assert score_texts(lambda prompts, responses: [0, 1], ["a", "b"], ["4", "4"], "f", rows).scores.tolist() == [0, 1]
    assert score_texts(max_of_both, ["a", "b"], ["4", "4"], "f").scores.tolist() == [1, 1]


def max_of_both(prompts: list[str], responses: list[str]) -> list[int]:
    return [max(len(prompt), len(response)) for prompt, response in zip(prompts, responses, strict=True)]


def test_extra_numbers_may_be_missing_for_some() -> None:
    found = score_texts(lambda p, r: ([1, 2], {"format": [True, None], 3: [0.5, 1]}), ["a", "b"], ["c", "d"], "f")
    assert found.scores.tolist() == [1, 2] and list(found.extra) == ["format", "3"]
    assert found.extra["format"][0] == 1 and found.extra["format"][1].isnan()


@pytest.mark.parametrize(
    "gives, sentence",
    [
        (([1, 2], {"format": [1]}), "f must give a number or None as `format` for each of 2 responses, gave [1.0]"),
        (([1, 2], {"a": ["inf", 1]}), "f must give a number or None as `a` for each of 2 responses, gave [inf, 1.0]"),
        (([1], {"a": [1, 1]}), "f must give one finite number for each of 2 responses, gave [1.0]"),
        (([1, 2], {"a": 3}), "f: a gave what is not a list of numbers (TypeError: 'int' object is not iterable)"),
        (None, "f gave what is not a list of numbers (TypeError: 'NoneType' object is not iterable)"),
    ],
)
def test_what_a_function_must_give_is_said(gives: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        score_texts(lambda prompts, responses: gives, ["a", "b"], ["c", "d"], "f")
    assert str(caught.value) == sentence


def test_a_call_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(prompts: list[str], responses: list[str]) -> list[float]:
        time.sleep(600)
        return [0.0]

    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        score_texts(hangs, ["a"], ["b"], "f", calls=Calls(timeout_seconds=0.05))
    assert str(caught.value) == "f failed on 1 responses (TimeoutError: no answer in 0.05 s)"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_call_is_tried_again_after_longer_and_longer(monkeypatch: pytest.MonkeyPatch, timeout: float | None) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tristage.answering.scorers.time.sleep", waited.append)
    calls = []

    def flaky(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(list(prompts))
        prompts.clear()
        if len(calls) < 4:
            raise ConnectionError("refused")
        return [7.0]

    assert score_texts(flaky, ["a"], ["b"], "f", calls=Calls(timeout, retries=3)).scores.tolist() == [7]
    assert calls == [["a"]] * 4 and waited == [1, 2, 4]
    calls.clear()
    with pytest.raises(UserError) as caught:
        score_texts(flaky, ["a"], ["b"], "f", calls=Calls(timeout, retries=1))
    assert str(caught.value) == "f failed 2 times on 1 responses (ConnectionError: refused)"


# -- in step 3 ---------------------------------------------------------------------------------------------


def batch_of(real: list[bool], labels: list[dict[str, Any]] | None, tokenizer: Any) -> tuple[Sequences, PromptBatch]:
    """Prompts "2", "3", ... answered by themselves."""
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([str(2 + i)] * 2) for i in range(len(real))])
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = PromptBatch(ids[:, :1], mask[:, :1], torch.arange(len(real)), torch.tensor(real), labels=labels)
    return Sequences(ids, mask, (1,), 1), batch


def term_of(function: Any, **settings: Any) -> RewardTerm:
    return RewardTerm(RewardFunction(function=f"m:{function.__name__}", **settings), function)


def test_functions_see_real_rows_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.write_model(tmp_path / "model"))
    seen: list[Any] = []

    def watching(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> Any:
        seen.append((prompts, rows))
        return [5.0] * len(prompts), {"extra": [1.5] * len(prompts)}

    sequences, batch = batch_of([True, False, True], [{"n": 0}, {}, {"n": 2}], tokenizer)
    scores, extra = function_scores([term_of(watching)], tokenizer, sequences, batch)
    assert len(seen) == 1 and seen[0][1] == [{"n": 0}, {"n": 2}] and len(seen[0][0]) == 2
    assert scores["watching"].tolist() == [5, 0, 5]
    assert extra["watching/extra"][[0, 2]].tolist() == [1.5, 1.5] and extra["watching/extra"][1].isnan()


def test_a_rank_of_fillers_has_the_extra_numbers_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny.write_model(tmp_path / "model"))
    others = [(None, ["watching/extra"])]
    monkeypatch.setattr("step3_ppo.rewards.dist.gather_objects", lambda mine: [mine, *others])

    def watching(prompts: list[str], responses: list[str]) -> list[float]:
        raise AssertionError("called with nothing to score")

    sequences, batch = batch_of([False], None, tokenizer)
    scores, extra = function_scores([term_of(watching)], tokenizer, sequences, batch)
    assert scores["watching"].tolist() == [0] and extra["watching/extra"].isnan().all()
    others[0] = ("reward function watching failed", [])
    with pytest.raises(RewardError, match="^rank 1: reward function watching failed$"):
        function_scores([term_of(watching)], tokenizer, sequences, batch)


def test_scores_are_normalised_each_on_their_own_over_all_so_far(tmp_path: Path) -> None:
    functions = "[{function: 'm:a', weight: 2, normalize: true}, {function: 'm:b'}, {function: 'm:c', normalize: true}]"
    settings = settings_of(tmp_path, f"reward.functions={functions}")
    rng, control, seen = np.random.default_rng(0), Control.of(settings.ppo), np.zeros((2, 0))
    for size in (5, 9):
        terms = rng.normal(3, 4, size=(3, size))
        seen = np.concatenate([seen, terms[[0, 2]]], axis=1)
        raw = 2 * terms[0] + terms[1] + terms[2]
        means, deviations = seen.mean(axis=1), seen.std(axis=1, ddof=1)
        expected = 2 * (terms[0] - means[0]) / deviations[0] + terms[1] + (terms[2] - means[1]) / deviations[1]
        change = _normalized(dict(zip("abc", torch.from_numpy(terms), strict=True)), settings, control)
        torch.testing.assert_close(torch.from_numpy(raw) + change, torch.from_numpy(expected))
        resumed = Control.of(settings.ppo)
        resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
        control = resumed  # as after a restart
    old = {key: value for key, value in control.state_dict().items() if key != "terms"}
    Control.of(settings.ppo).load_state_dict(old)  # a checkpoint of before there were any


def test_without_normalisation_nothing_changes(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "reward.functions=[{function: 'm:a'}]")
    assert _normalized({"a": torch.ones(3)}, settings, Control.of(settings.ppo)) == 0


# -- columns of the rows -----------------------------------------------------------------------------------


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = "def plain(prompts, responses): ...\ndef by_rows(prompts, responses, rows): ...\n"
    (tmp_path / "functions_of_a_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "functions_of_a_test"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["reward.functions=[{function: '%s:by_rows'}]"], "%s:by_rows reads `rows`; name the columns that it needs in"),
        (["grader=%s:by_rows"], "%s:by_rows reads `rows`; name the columns that it needs in `reward.labels`"),
        (
            ["reward.functions=[{function: '%s:plain'}]", "reward.labels=[answer]"],
            "key `reward.labels` has no effect: no function has a parameter `rows`; remove it",
        ),
    ],
)
def test_columns_and_functions_must_fit(tmp_path: Path, functions: str, words: list[str], sentence: str) -> None:
    settings = settings_of(tmp_path, *(word.replace("%s", functions) for word in words))
    with pytest.raises(UserError) as caught:
        load_functions(settings)
    assert f"{settings.file}: {sentence.replace('%s', functions)}" in str(caught.value)


def test_labels_are_kept_with_the_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, file = tiny.write_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = [{"q": f"Name {i % 7} fruits.", "id": i, "answer": {"n": [i, None]}, "idle": "x"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.train={{path: '{file}', columns: {{prompt: q}}}}"
    settings = settings_of(tmp_path, source, f"actor.model={model}", "reward.labels=[answer, id]", "data.workers=1")
    train, heldout = load_sets(settings, load_tokenizer(model))
    found = [each.labels(i) for each in (train, heldout) for i in range(len(each))]
    assert sorted(label["id"] for label in found) == list(range(40))
    assert all(label == {"answer": {"n": [label["id"], None]}, "id": label["id"]} for label in found)
    plain = settings_of(tmp_path, source, f"actor.model={model}", "data.workers=1")
    without, _ = load_sets(plain, load_tokenizer(model))
    assert without.labels(0) == {}


def test_a_row_without_the_column_is_one_sentence(tmp_path: Path) -> None:
    model, file = tiny.write_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Name 2 fruits.", "answer": 1}\n{"prompt": "Name 3 fruits.", "anwser": 1}\n')
    settings = settings_of(tmp_path, f"data.train={file}", f"actor.model={model}", "reward.labels=[answer]")
    with pytest.raises(UserError) as caught:
        load_sets(settings, load_tokenizer(model))
    columns = "['anwser', 'prompt']"
    expected = f"{file}:2: `reward.labels` names 'answer', but the row has the columns {columns}; correct it"
    assert str(caught.value) == expected


def test_a_resumed_run_may_be_more_patient_and_nothing_else(tmp_path: Path) -> None:
    before = settings_of(tmp_path, "reward.functions=[{function: 'm:a'}]").model_dump(mode="json")
    patient = settings_of(tmp_path, "reward.functions=[{function: 'm:a', timeout_seconds: 9, retries: 2}]")
    free, changed = changed_settings(before, patient)
    assert not changed and free == {
        "reward.functions[0].retries": "0 -> 2",
        "reward.functions[0].timeout_seconds": "None -> 9.0",
    }
    heavier = settings_of(tmp_path, "reward.functions=[{function: 'm:a', weight: 2}]")
    assert changed_settings(before, heavier)[1] == {"reward.functions[0].weight": "1.0 -> 2.0"}
    for added in ("normalize", "timeout_seconds", "retries"):  # a run of before these settings
        del before["reward"]["functions"][0][added]
    assert changed_settings(before, settings_of(tmp_path, "reward.functions=[{function: 'm:a'}]")) == ({}, {})
