"""What an evaluation says: intervals, calibration, correlation, buckets, the warning; every pair counted once."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from step2_reward_model.heldout import evaluate
from step2_reward_model.measures import (
    LENGTH_EDGES,
    MARGIN_EDGES,
    Measurements,
    accuracy_by,
    calibration_error,
    length_warning,
)
from step2_reward_model.report import tables
from tests.helpers import oracles, tiny
from tristage.data.sets import load_sets
from tristage.errors import UserError
from tristage.intervals import wilson_interval
from tristage.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def measurements(margins: list[float], length_gaps: list[float], **others: Any) -> Measurements:
    numbers = {"losses": [0.5], "scores": [1.0, 2.0], "lengths": [3.0, 4.0], "scale": 1.0} | others
    found = {"margins": margins, "length_gaps": length_gaps} | numbers
    return Measurements(**{k: v if k == "scale" else np.array(v, dtype=float) for k, v in found.items()})


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # Chances 0.75 three times, right twice: a bin of 3 with |2/3 - 0.75|. Chance 0.5 (a tie), half right: 0.
    margins = np.array([math.log(3), math.log(3), -math.log(3), 0.0])
    assert calibration_error(margins) == pytest.approx(3 / 4 * abs(2 / 3 - 0.75))


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    margins = rng.uniform(0, 5, 200_000)
    is_right = rng.random(len(margins)) < 1 / (1 + np.exp(-margins))
    signed = np.where(is_right, margins, -margins)
    assert calibration_error(signed) < 0.01
    assert calibration_error(3 * signed) > 0.05 and calibration_error(signed / 3) > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_calibration_error_matches_a_slow_twin(seed: int) -> None:
    margins = np.random.default_rng(seed).normal(0.5, 2, 57)
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    for margin in margins.tolist():
        chance = oracles.sigmoid(abs(margin))
        bins[int((chance - 0.5) / 0.05)].append((chance, margin > 0))
    expected = sum(
        len(own) / 57 * abs(oracles.mean([float(right) for _, right in own]) - oracles.mean([c for c, _ in own]))
        for own in bins
        if own
    )
    assert calibration_error(margins) == pytest.approx(expected)


def test_calibration_of_scores_that_are_not_numbers_is_not_a_number() -> None:
    assert math.isnan(calibration_error(np.array([1.0, math.nan])))


def test_calibration_and_margins_are_told_in_the_units_of_training_whatever_the_scale() -> None:
    raw = measurements([4.0, -1.0, 2.0], [0, 0, 0])
    scaled = dataclasses.replace(raw, margins=raw.margins / 8, scale=8.0)
    name = "reward_model/calibration_error"
    assert scaled.metrics()[name] == pytest.approx(raw.metrics()[name])
    assert text(scaled).count("2 to 4") == 1 and text(scaled).splitlines()[20:] == text(raw).splitlines()[20:]


def test_buckets_hold_every_pair_once() -> None:
    gaps = np.array([-500, -65, -64, -17, -16, -1, 0, 1, 16, 17, 64, 65, 500.0])
    buckets = accuracy_by(gaps, gaps > 0, LENGTH_EDGES)
    assert [bucket.pairs for bucket in buckets] == [2, 2, 2, 1, 2, 2, 2]
    assert [bucket.accuracy for bucket in buckets] == [0, 0, 0, 0, 1, 1, 1]
    assert buckets[-1].interval == wilson_interval(2, 2)
    margins = np.random.default_rng(0).exponential(2, 300)
    assert sum(bucket.pairs for bucket in accuracy_by(margins, margins > 1, MARGIN_EDGES)) == 300


def test_metrics_of_a_data_set_by_hand() -> None:
    found = measurements([2.0, -1.0, 0.0, 3.0], [5, 0, -2, 1]).metrics()
    assert found["reward_model/accuracy"] == 0.5  # a tie is wrong
    assert found["reward_model/margin"] == 1.0 and found["reward_model/score"] == 1.5
    assert found["reward_model/length_baseline"] == 2.5 / 4
    assert (found["reward_model/accuracy_low"], found["reward_model/accuracy_high"]) == wilson_interval(2, 4)
    assert found["reward_model/length_correlation"] == pytest.approx(1.0)


# ---- the report -----------------------------------------------------------------------------------------------------


def text(measured: Measurements) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    for table in tables(measured):
        console.print(table)
    return out.getvalue()


def test_the_report_names_buckets_and_leaves_empty_ones_blank() -> None:
    said = text(measurements([2.5, -1.0, 0.25], [5, 0, -80]))
    assert [line.split("│")[1:4] for line in said.splitlines() if "│ 2 to 4" in line][0][1].strip() == "1"
    for words in ("accuracy ", "0.667", "0.208 to 0.939", "4 and more", "-65 and less", "-64 to -17", "65 and more"):
        assert words in said
    (line,) = [line for line in said.splitlines() if line.startswith("│ 17 to 64")]
    assert line.split("│")[2:4] == ["     0 ", "        - "]


@pytest.mark.parametrize(
    "right, longer, warned",
    [(90, 50, False), (90, 88, True), (60, 55, True), (90, 12, True), (90, 40, False)],
    ids=["clearly better", "as good as longer", "few pairs", "as good as shorter", "better than shorter"],
)
def test_a_warning_tells_when_length_would_do_as_well(right: int, longer: int, warned: bool) -> None:
    margins = [1.0] * right + [-1.0] * (100 - right)
    warning = length_warning(measurements(margins, [1] * longer + [-1] * (100 - longer)))
    assert (warning is not None) == warned
    if warning:
        assert ("shorter" if longer < 50 else "longer") in warning and "100 pairs" in warning


# ---- every pair once ------------------------------------------------------------------------------------------------


class Lengths:
    """An engine whose value at every position is a known function of the tokens so far."""

    module = SimpleNamespace(score_scale=2.0)

    def eval(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (input_ids * attention_mask).cumsum(dim=1).float() % 13 - 6


@pytest.mark.parametrize("loss", ["pairs", "best", "tokens", "elo"])
def test_an_evaluation_counts_every_pair_and_answer_once(loss: str, tmp_path: Path) -> None:
    model, rows = tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows")
    tokenizer = load_tokenizer(model)
    settings = tiny.reward_model_config(tmp_path, model, rows["ranking"], 0, f"loss={loss}", "micro_batch=5",
                                        "global_batch=5")  # fmt: skip
    heldout, _ = load_sets(settings, tokenizer)
    measured = evaluate(Lengths(), heldout, settings, tokenizer, CPU)
    margins, gaps, scores, lengths = [], [], [], []
    for examples, ranks in heldout:
        own = [float(sum(example.ids) % 13 - 6) for example in examples]
        scores += own
        lengths += [float(len(example.ids) - example.prompt_length) for example in examples]
        for i, j in oracles.ranking_pairs(torch.zeros(len(ranks)), torch.tensor(ranks)):
            margins.append(own[i] - own[j])
            gaps.append(float(len(examples[i].ids) - len(examples[j].ids)))
    assert len(heldout) % 5 and len(margins) > len(heldout)  # fillers; prompts with several pairs
    assert sorted(zip(measured.margins, measured.length_gaps, strict=True)) == sorted(zip(margins, gaps, strict=True))
    assert sorted(zip(measured.scores, measured.lengths, strict=True)) == sorted(zip(scores, lengths, strict=True))
    assert len(measured.losses) == len(heldout) and measured.losses.min() >= 0 and measured.scale == 2.0


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["best", "elo"])
@pytest.mark.parametrize("option", ["margin", "label_smoothing", "centering"])
def test_an_option_of_pairs_with_another_loss_is_one_sentence(loss: str, option: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        tiny.reward_model_config(tmp_path, "model", "rows", 0, f"loss={loss}", f"{option}=0.1")
    assert str(error.value) == (
        f"{tmp_path}/reward.yaml: key `{option}`: `loss: {loss}` has no pairs; set `{option}` to 0, "
        "or `loss` to pairs or tokens"
    )


@pytest.mark.parametrize("loss", ["pairs", "tokens"])
def test_pairs_and_tokens_take_all_options(loss: str, tmp_path: Path) -> None:
    words = (f"loss={loss}", "margin=0.1", "label_smoothing=0.1", "centering=0.01")
    settings = tiny.reward_model_config(tmp_path, "model", "rows", 0, *words)
    assert (settings.margin, settings.label_smoothing, settings.centering) == (0.1, 0.1, 0.01)
