"""Step 2 from end to end: every loss trains, scores are normalised in the folder, and it is evaluated and asked."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import step2_reward_model.evaluate
from step2_reward_model.config import RewardModelConfig
from step2_reward_model.heldout import evaluate
from step2_reward_model.train import best_answer, main, normalize_scores
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.data.sets import load_sets
from tristage.engine import frozen_engine
from tristage.models.reward_model import RewardModel, last_token_scores, load_reward_model
from tristage.models.tokenizer import load_tokenizer
from tristage.training import setup
from tristage.training.metrics import read_metrics

# What trains: (loss and its options, ZeRO stage).
RUNS = {
    "pairs": (["loss=pairs", "margin=0.1", "label_smoothing=0.05", "centering=0.01"], 2),
    "best": (["loss=best"], 0),
    "tokens": (["loss=tokens", "centering=0.01"], 3),
    "elo": (["loss=elo"], 3),
    "raw": (["loss=pairs", "normalize=false"], 2),
}
SAMPLE = 20  # fewer prompts than the training set has


def config(folder: Path, name: str, model: str, *words: str, stage: int = 0) -> RewardModelConfig:
    return tiny.reward_model_config(folder / name, model, str(folder / "rows/ranking.jsonl"), stage, *words)


def train_all(rank: int, folder: str) -> None:
    """Every loss on two ranks; then on from a normalised folder, without learning (rate 1e-30), at two ZeRO stages."""
    here = Path(folder)
    for name, (words, stage) in RUNS.items():
        settings = config(here, name, str(here / "model"), *words, stage=stage)
        main(["--config", settings.file, "epochs=5", *words])
    for stage in (2, 3):
        words = ["max_steps=1", "optimizer.learning_rate=1.0e-30", f"normalize_prompts={SAMPLE}"]
        settings = config(here, f"on{stage}", str(here / "tokens/reward/final"), stage=stage)
        main(["--config", settings.file, *words])


def measured(rank: int, folder: str) -> dict[str, Any]:
    """Scale and offset of "tokens" when normalised again over few rows, and what an evaluation measures."""
    here = Path(folder)
    settings = config(here, f"measured{rank}", str(here / "tokens/reward/final"), f"normalize_prompts={SAMPLE}")
    _, engine_config, tokenizer = setup.check_training(settings)
    rows, heldout = load_sets(settings, tokenizer)
    device = dist.init("cpu")
    engine = frozen_engine(load_reward_model(settings.model, tokenizer, dtype=torch.float32), engine_config)
    found = evaluate(engine, heldout, settings, tokenizer, device)
    normalize_scores(engine, rows, settings, tokenizer, device)
    arrays = {name: np.sort(getattr(found, name)) for name in ("losses", "margins", "length_gaps", "scores", "lengths")}
    return {"normal": (engine.module.score_offset, engine.module.score_scale), "metrics": found.metrics(), **arrays}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("reward model")
    rows = tiny.write_rows(base / "rows")
    tiny.teach(tiny.write_model(base / "model", "gpt2"), rows["sft"], steps=10)
    run_ranks(2, train_all, str(base), timeout=400)
    return base


def final(folder: Path, name: str) -> Path:
    return folder / name / "reward/final"


def open_final(folder: Path, name: str) -> RewardModel:
    path = str(final(folder, name))
    return load_reward_model(path, load_tokenizer(path), dtype=torch.float32)


@torch.no_grad()
def training_scores(folder: Path, name: str) -> torch.Tensor:
    """Of the best answers of all training prompts, one row at a time."""
    path = str(final(folder, name))
    rows, _ = load_sets(config(folder, "scores", path), load_tokenizer(path))
    model, scores = open_final(folder, name), []
    for item in rows:
        ids = torch.tensor([best_answer(item).ids])
        mask = torch.ones_like(ids).bool()
        scores.append(last_token_scores(model(ids, mask), mask))
    return torch.cat(scores).double()


def heldout_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = read_metrics(folder / name / "reward/metrics.jsonl")
    return [line for line in lines if line["split"] == "heldout"]


@pytest.mark.parametrize("name", RUNS)
def test_every_loss_falls_and_reports_intervals_calibration_and_length(name: str, folder: Path) -> None:
    lines = read_metrics(folder / name / "reward/metrics.jsonl")
    losses = [line["reward_model/loss"] for line in lines if line["split"] == "train"]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])  # 51 rows are soon known by heart
    _, after = heldout_lines(folder, name)
    assert after["reward_model/accuracy_low"] < after["reward_model/accuracy"] < after["reward_model/accuracy_high"]
    assert 0 < after["reward_model/calibration_error"] < 1 and abs(after["reward_model/length_correlation"]) <= 1


@pytest.mark.parametrize("name", [name for name in RUNS if name != "raw"])
def test_an_exported_folder_scores_its_best_training_answers_with_mean_0_and_deviation_1(
    name: str, folder: Path
) -> None:
    values = json.loads((final(folder, name) / "config.json").read_text())
    assert values["score_scale"] > 0 and values["score_scale"] != 1 and values["score_offset"] != 0
    scores = training_scores(folder, name)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_transformers_alone_gives_raw_scores_which_the_two_numbers_explain(folder: Path) -> None:
    ours = open_final(folder, "pairs")
    theirs = AutoModelForSequenceClassification.from_pretrained(final(folder, "pairs"), dtype=torch.float32).eval()
    ids = torch.randint(4, 50, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    raw = torch.cat([theirs(row[None]).logits[:, 0] for row in ids])
    torch.testing.assert_close((raw - ours.score_offset) / ours.score_scale, last_token_scores(ours(ids, mask), mask))


@torch.no_grad()
def test_without_normalisation_the_folder_has_no_such_keys_and_scores_are_the_heads(folder: Path) -> None:
    values = json.loads((final(folder, "raw") / "config.json").read_text())
    assert not {"score_offset", "score_scale"} & set(values)
    model = open_final(folder, "raw")
    ids = torch.tensor([[5, 6, 7]])
    expected = model.model.score(model.model.base_model(ids).last_hidden_state)[..., 0]
    assert torch.equal(model(ids, torch.ones_like(ids).bool()), expected)


def test_a_critic_that_is_saved_again_keeps_its_normalisation(folder: Path, tmp_path: Path) -> None:
    model = open_final(folder, "pairs")
    model.model.save_pretrained(tmp_path)
    again = load_reward_model(str(tmp_path), load_tokenizer(str(final(folder, "pairs"))), dtype=torch.float32)
    assert (again.score_offset, again.score_scale) == (model.score_offset, model.score_scale) != (0.0, 1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_training_on_from_a_normalised_folder_starts_from_its_head_and_its_scores(stage: int, folder: Path) -> None:
    name = f"on{stage}"
    old, new = (load_file(final(folder, which) / "model.safetensors") for which in ("tokens", name))
    scale = open_final(folder, "tokens").score_scale
    torch.testing.assert_close(new["score.weight"], old["score.weight"] / scale)
    assert all(torch.equal(new[key], old[key]) for key in old if key != "score.weight")
    (before, after), settings = heldout_lines(folder, name), config(folder, "again", str(final(folder, "tokens")))
    with tiny.one_rank():
        expected = measured(0, str(folder))["metrics"]
    assert expected["reward_model/margin"] == pytest.approx(before["reward_model/margin"], rel=1e-4)
    assert expected["reward_model/score"] == pytest.approx(before["reward_model/score"], rel=1e-4, abs=1e-5)
    assert expected["reward_model/accuracy"] == before["reward_model/accuracy"] == after["reward_model/accuracy"]
    # Normalised again over fewer rows: of those, mean 0 and deviation 1.
    rows, _ = load_sets(settings, load_tokenizer(settings.model))
    sample = np.random.default_rng(settings.seed).permutation(len(rows))[:SAMPLE]
    scores = training_scores(folder, name)[sample]
    assert len(rows) > SAMPLE
    assert (scores.mean().item(), scores.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)


def test_normalisation_and_evaluation_do_not_depend_on_the_number_of_ranks(folder: Path) -> None:
    with tiny.one_rank():
        alone = measured(0, str(folder))
    for found in run_ranks(2, measured, str(folder)):
        assert found["normal"] == alone["normal"]  # to the last bit
        for name in ("losses", "margins", "length_gaps", "scores", "lengths"):
            assert np.array_equal(found[name], alone[name])
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-12, abs=1e-12)


# ---- commands -------------------------------------------------------------------------------------------------------


def evaluation(folder: Path, *words: str) -> list[str]:
    settings = config(folder, "evaluated", str(final(folder, "pairs")))
    return ["--config", settings.file, "loss=pairs", *words]


def test_the_evaluation_prints_tables_of_the_held_out_rows(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tiny.one_rank():
        step2_reward_model.evaluate.main(evaluation(folder))
    said = capfd.readouterr().out
    last = heldout_lines(folder, "pairs")[-1]
    (line,) = [line for line in said.splitlines() if line.startswith("│ accuracy ")]
    low, high = last["reward_model/accuracy_low"], last["reward_model/accuracy_high"]
    assert f"{last['reward_model/accuracy']:.3f}" in line and f"{low:.3f} to {high:.3f}" in line
    (line,) = [line for line in said.splitlines() if line.startswith("│ expected calibration error")]
    assert f"{last['reward_model/calibration_error']:.3f}" in line  # of a normalised model as of the one that trained
    assert "Accuracy by margin" in said and "Accuracy by length" in said


def test_the_evaluation_takes_any_data_set(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"prompt": "a prompt of its own", "chosen": "yes", "rejected": "no no"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    with tiny.one_rank():
        step2_reward_model.evaluate.main(evaluation(folder, f"data.heldout={tmp_path}/mine.jsonl"))
    said = capfd.readouterr().out
    assert "1, 2, 1" in said  # prompts, answers, pairs
    assert "warning: accuracy" in said and "these 1 pairs" in said


def test_typed_answers_are_scored_best_first(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = load_tokenizer(str(final(folder, "pairs"))), open_final(folder, "pairs")
    answers = ["one two", "three", "four five six"]
    typed = ["a prompt", *answers, "", "another", f"yes {tokenizer.eos_token}", "", "third", "same"]  # no blank line
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    with tiny.one_rank():
        step2_reward_model.evaluate.main(evaluation(folder, "--interactive"))
    said = capfd.readouterr().out.splitlines()
    scored = [line.split("  ")[-2:] for line in said if line.split("  ")[-1] in answers]
    assert sorted(answer for _, answer in scored) == sorted(answers)
    assert [float(score) for score, _ in scored] == sorted((float(score) for score, _ in scored), reverse=True)
    assert sum("not scored: what you typed: the answer holds the EOS token" in line for line in said) == 1
    assert said[-1].startswith("prompt>") and any(line.endswith("  same") for line in said)
    for score, answer in scored:
        turns = [{"role": "user", "content": "a prompt"}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]])
        mask = torch.ones_like(whole).bool()
        assert last_token_scores(model(whole, mask), mask).item() == pytest.approx(float(score), abs=6e-4)
