"""DPO, IPO and SimPO: hand-worked numbers, the slow twins, where the losses lie lowest, and how pairs make a prompt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from step2_dpo.config import DPOConfig, ReferenceModel
from step2_dpo.loss import implicit_rewards, pair_metrics, prompt_losses
from step2_dpo.reference import PrecomputedReference
from tests.helpers import oracles
from tristage.algo.losses import dpo_loss, simpo_loss
from tristage.batches import PreferenceBatch
from tristage.config import DataSettings, OptimizerSettings
from tristage.data.collate import collate_ranking
from tristage.data.tokenize import Example
from tristage.training.metrics import Averages

LN3 = math.log(3)
NOTHING = torch.zeros(1)


def logprobs(seed: int, count: int = 20) -> list[Tensor]:
    """Four columns of log-probabilities of whole answers."""
    return list(-10 * torch.rand(4, count, generator=torch.Generator().manual_seed(seed)))


def loss_of_gap(gap: Tensor, beta: float, label_smoothing: float = 0.0, form: Any = "sigmoid") -> Tensor:
    zero = torch.zeros_like(gap)
    return dpo_loss(gap, zero, zero, zero, beta, label_smoothing, form)


# -- by hand -----------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # The policy gained 2 ln 3 on the better answer and lost 2 ln 3 on the worse: beta * gap = ln 3, a chance of 3/4.
    gained = [torch.tensor([x]) for x in (-1.0, -5.0, -1.0 - 2 * LN3, -5.0 + 2 * LN3)]
    assert dpo_loss(*gained, beta=0.25).item() == pytest.approx(math.log(4 / 3))
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert dpo_loss(*gained, beta=0.25, label_smoothing=0.1).item() == pytest.approx(smoothed)


def test_ipo_by_hand() -> None:
    # The better answer's log-ratio is 2, the worse one's -1: a gap of 3, where 1 / (2 * 0.25) = 2 is wanted.
    columns = [torch.tensor([x]) for x in (-3.0, -8.0, -5.0, -7.0)]
    assert dpo_loss(*columns, beta=0.25, form="ipo").item() == pytest.approx(1.0)


def test_simpo_by_hand() -> None:
    # beta * (difference of means) = 2 ln 3, of which the margin ln 3 takes half.
    found = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.0 - LN3]), beta=2.0, gamma=LN3)
    assert found.item() == pytest.approx(math.log(4 / 3))


def test_a_policy_that_is_its_reference_has_the_loss_of_knowing_nothing() -> None:
    chosen, rejected, *_ = logprobs(0)
    same = (chosen, rejected, chosen, rejected)
    torch.testing.assert_close(dpo_loss(*same, beta=0.1), torch.full((20,), math.log(2)))
    torch.testing.assert_close(dpo_loss(*same, beta=0.1, label_smoothing=0.3), torch.full((20,), math.log(2)))
    torch.testing.assert_close(dpo_loss(*same, beta=0.1, form="ipo"), torch.full((20,), 25.0))


# -- against the slow twins --------------------------------------------------------------------------------


@pytest.mark.parametrize("beta, label_smoothing", [(0.1, 0.0), (0.5, 0.0), (0.1, 0.1), (1.0, 0.4)])
def test_dpo_matches_the_oracle(beta: float, label_smoothing: float) -> None:
    columns = logprobs(1)
    rows = zip(*map(oracles.numbers, columns), strict=True)
    expected = torch.tensor([oracles.dpo_loss(*row, beta, label_smoothing) for row in rows])
    torch.testing.assert_close(dpo_loss(*columns, beta, label_smoothing), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_matches_the_oracle(beta: float) -> None:
    columns = logprobs(2)
    expected = torch.tensor([oracles.ipo_loss(*row, beta) for row in zip(*map(oracles.numbers, columns), strict=True)])
    torch.testing.assert_close(dpo_loss(*columns, beta, form="ipo"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 0.0), (10.0, 3.0)])
def test_simpo_matches_the_oracle(beta: float, gamma: float) -> None:
    chosen, rejected = (column / 5 for column in logprobs(3)[:2])
    rows = zip(oracles.numbers(chosen), oracles.numbers(rejected), strict=True)
    expected = torch.tensor([oracles.simpo_loss(*row, beta, gamma) for row in rows])
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta, gamma), expected, atol=1e-5, rtol=1e-5)


# -- gradients and limits ----------------------------------------------------------------------------------


def slopes(loss: Any, gap: float) -> tuple[float, float]:
    """d loss / d (better answer), d loss / d (worse answer) where they are `gap` apart."""
    chosen, rejected = torch.tensor([gap], requires_grad=True), torch.zeros(1, requires_grad=True)
    loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    return chosen.grad.item(), rejected.grad.item()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_dpo_at_gap_0_pulls_by_half_of_beta_less_what_smoothing_takes(label_smoothing: float) -> None:
    pull = 0.3 / 2 * (1 - 2 * label_smoothing)
    found = slopes(lambda c, r: dpo_loss(c, r, NOTHING, NOTHING, 0.3, label_smoothing), 0.0)
    assert found == pytest.approx((-pull, pull))


def test_ipo_at_gap_0_pulls_by_1_over_beta() -> None:
    found = slopes(lambda c, r: dpo_loss(c, r, NOTHING, NOTHING, 0.25, form="ipo"), 0.0)
    assert found == pytest.approx((-4.0, 4.0))


def test_simpo_at_gap_0_pulls_by_beta_times_the_chance_of_missing_the_margin() -> None:
    found = slopes(lambda c, r: simpo_loss(c, r, 2.0, LN3), 0.0)
    assert found == pytest.approx((-2 * 0.75, 2 * 0.75))


def test_smoothing_by_half_makes_both_orders_alike_and_a_gap_of_0_best() -> None:
    gaps = torch.linspace(-8, 8, 17)
    losses = loss_of_gap(gaps, 0.5, 0.5)
    torch.testing.assert_close(losses, losses.flip(0))
    assert losses.argmin() == 8


@pytest.mark.parametrize("label_smoothing", [0.01, 0.1, 0.3])
def test_smoothing_stops_where_the_win_chance_is_that_of_a_right_label(label_smoothing: float) -> None:
    best = math.log((1 - label_smoothing) / label_smoothing) / 0.5  # sigmoid(0.5 * best) = 1 - label_smoothing
    found = slopes(lambda c, r: dpo_loss(c, r, NOTHING, NOTHING, 0.5, label_smoothing), best)
    assert found == pytest.approx((0.0, 0.0), abs=1e-6)


def test_ipo_is_0_at_a_gap_of_1_over_twice_beta_and_pushes_back_beyond() -> None:
    gaps = torch.tensor([4.0, 5.0, 6.0])
    torch.testing.assert_close(loss_of_gap(gaps, 0.1, form="ipo"), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
def test_only_the_ratio_to_the_reference_counts(form: Any) -> None:
    columns = logprobs(4)
    shift_chosen, shift_rejected, *_ = logprobs(5)
    shifted = [x + s for x, s in zip(columns, (shift_chosen, shift_rejected) * 2, strict=True)]
    torch.testing.assert_close(dpo_loss(*shifted, 0.3, form=form), dpo_loss(*columns, 0.3, form=form))


def test_huge_gaps_have_finite_losses() -> None:
    huge = torch.tensor([1e4, -1e4])
    torch.testing.assert_close(loss_of_gap(huge, 1.0), torch.tensor([0.0, 1e4]))
    torch.testing.assert_close(simpo_loss(huge, torch.zeros(2), 1.0, 0.0), torch.tensor([0.0, 1e4]))


def test_losses_are_float32_for_bfloat16_and_leave_their_inputs_alone() -> None:
    columns = [column.bfloat16() for column in logprobs(6)]
    before = [column.clone() for column in columns]
    for found, exact in (
        (dpo_loss(*columns, 0.1), dpo_loss(*(column.float() for column in columns), 0.1)),
        (simpo_loss(*columns[:2], 2.0, 1.0), simpo_loss(*(column.float() for column in columns[:2]), 2.0, 1.0)),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, exact)
    assert all(torch.equal(x, y) for x, y in zip(columns, before, strict=True))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="DPO form must be 'sigmoid' or 'ipo', got 'hinge'"):
        loss_of_gap(NOTHING, 0.1, form="hinge")


# -- from pairs to prompts ---------------------------------------------------------------------------------

# Three prompts of 4 (with a tie), 2 and 3 answers (all tied), and a filler.
ANSWER_LENGTHS = [[1, 4, 2, 3], [5, 2], [2, 2, 1]]
RANKS = [(1.0, 0.0, 1.0, 2.0), (1.0, 0.0), (0.0, 0.0, 0.0)]
PAIRS = [[(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)], [(5, 4)], []]  # (better, worse) among the 9 answers


def preference_batch() -> PreferenceBatch:
    items: list[Any] = [
        ([Example([5, 6, *[7] * (length - 1), 1], 2) for length in lengths], ranks)
        for lengths, ranks in zip(ANSWER_LENGTHS, RANKS, strict=True)
    ]
    return collate_ranking([*items, None], 0)


def settings(**values: Any) -> DPOConfig:
    if values.get("loss") != "simpo":
        values["reference"] = ReferenceModel(deepspeed="unused")
    return DPOConfig(
        output="unused",
        data=DataSettings(train=({"path": "unused"},)),  # type: ignore[arg-type]
        model="unused",
        global_batch=1,
        micro_batch=1,
        optimizer=OptimizerSettings(learning_rate=1.0),
        deepspeed="unused",
        **values,
    )


def answers(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(policy [13], reference [13]): the filler repeats the first prompt's four answers."""
    policy, reference, *_ = logprobs(seed, 13)
    return policy, reference


@pytest.mark.parametrize("loss, label_smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo_sum", 0.0)])
def test_the_loss_of_a_prompt_is_the_mean_over_its_untied_pairs(loss: str, label_smoothing: float) -> None:
    policy, reference = answers()
    found = prompt_losses(
        policy, reference, preference_batch(), settings(loss=loss, beta=0.2, label_smoothing=label_smoothing)
    )
    p, r = oracles.numbers(policy), oracles.numbers(reference)
    for prompt, pairs in enumerate(PAIRS):
        four = [(p[i], p[j], r[i], r[j], 0.2) for i, j in pairs]
        one = [oracles.ipo_loss(*x) if loss == "ipo_sum" else oracles.dpo_loss(*x, label_smoothing) for x in four]
        assert found[prompt].item() == pytest.approx(oracles.mean(one) if one else 0.0, rel=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_ipo_compares_means_per_token_in_float64(beta: float) -> None:
    """Answers of 1 to 5 tokens, given token by token to the oracle and as their sums to prompt_losses."""
    generator, batch = torch.Generator().manual_seed(7), preference_batch()
    lengths = batch.answer_mask.sum(dim=1).tolist()
    policy, reference = (
        [-3 * torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths] for _ in range(2)
    )
    sums = [torch.stack([tokens.sum() for tokens in answers]) for answers in (policy, reference)]
    found = prompt_losses(*sums, batch, settings(loss="ipo", beta=beta))
    assert found.dtype == torch.float64
    for prompt, pairs in enumerate(PAIRS):
        one = [
            oracles.ipo_loss_of_means(
                policy[i].tolist(), policy[j].tolist(), reference[i].tolist(), reference[j].tolist(), beta
            )
            for i, j in pairs
        ]
        assert found[prompt].item() == pytest.approx(oracles.mean(one) if one else 0.0, rel=1e-12)


@pytest.mark.parametrize("loss, scales", [("ipo", False), ("ipo_sum", True)])
def test_the_gap_that_ipo_reaches_does_not_scale_with_the_length_of_answers(loss: str, scales: bool) -> None:
    """The same log-ratio per token: one loss for short and for long answers by means, another by sums."""
    losses = []
    for length in (2, 20):
        answers: Any = [([Example([5, *[7] * length], 1)] * 2, (0.0, 1.0))]
        batch, per_token = collate_ranking(answers, 0), torch.tensor([0.3, -0.2])
        losses.append(prompt_losses(per_token * length, torch.zeros(2), batch, settings(loss=loss, beta=0.5)).item())
    assert (losses[0] != pytest.approx(losses[1])) is scales


def test_ipos_rewards_and_margins_are_those_that_its_loss_compares() -> None:
    policy, reference = answers()
    batch = preference_batch()
    means = 0.2 * (policy - reference) / batch.answer_mask.sum(dim=1).clamp(min=1)
    torch.testing.assert_close(implicit_rewards(policy, reference, batch, settings(loss="ipo", beta=0.2)), means)
    sums = 0.2 * (policy - reference)
    torch.testing.assert_close(implicit_rewards(policy, reference, batch, settings(loss="ipo_sum", beta=0.2)), sums)


def test_simpo_divides_by_the_tokens_of_the_answer_with_its_eos() -> None:
    policy, _ = answers()
    found = prompt_losses(policy, None, preference_batch(), settings(loss="simpo", beta=2.0, gamma=0.5))
    lengths = [length for prompt in ANSWER_LENGTHS for length in prompt]
    means = [x / length for x, length in zip(oracles.numbers(policy), lengths, strict=False)]
    for prompt, pairs in enumerate(PAIRS[:2]):
        one = [oracles.simpo_loss(means[i], means[j], 2.0, 0.5) for i, j in pairs]
        assert found[prompt].item() == pytest.approx(oracles.mean(one), rel=1e-5)


def test_two_answers_are_plain_dpo() -> None:
    policy, reference = answers()
    found = prompt_losses(policy, reference, preference_batch(), settings(beta=0.2))[1]
    expected = dpo_loss(policy[5:6], policy[4:5], reference[5:6], reference[4:5], 0.2)
    assert found.item() == expected.item()


def test_the_metrics_of_pairs_by_hand_leave_fillers_out() -> None:
    """Of the six real pairs: rewards are beta * log-ratio, an equal reward is half a win, lengths are of answers."""
    ratios = torch.tensor([1.0, 4.0, 1.0, 4.0, 2.0, 5.0, 0.0, 0.0, 0.0, 100.0, -100.0, 100.0, 100.0])
    reference = -torch.arange(13.0)
    averages = Averages()
    pair_metrics(averages, reference + ratios, reference, preference_batch(), settings(beta=0.5))
    found = averages.reduce(torch.device("cpu"))
    # (1,0) 4 > 1, (1,2) 4 > 1, (1,3) 4 = 4, (0,3) 1 < 4, (2,3) 1 < 4, (5,4) 5 > 2
    assert found == pytest.approx(
        {
            "dpo/accuracy": 3.5 / 6,
            "dpo/margin": 0.5 * (3 + 3 + 0 - 3 - 3 + 3) / 6,
            "dpo/chosen_reward": 0.5 * (4 + 4 + 4 + 1 + 1 + 5) / 6,
            "dpo/rejected_reward": 0.5 * (1 + 1 + 4 + 4 + 4 + 2) / 6,
            "dpo/chosen_logprob": (19 - (1 + 1 + 1 + 0 + 2 + 5)) / 6,
            "dpo/rejected_logprob": (16 - (0 + 2 + 3 + 3 + 3 + 4)) / 6,
            "dpo/length_baseline": 3 / 6,  # 4 > 1, 4 > 2, 4 > 3; 1 < 3, 2 < 3, 2 < 5
        }
    )


def test_simpos_rewards_are_means_a_token() -> None:
    rewards = implicit_rewards(torch.full((13,), -6.0), None, preference_batch(), settings(
        loss="simpo", beta=2.0, gamma=0.0
    ))  # fmt: skip
    assert rewards[:9].tolist() == pytest.approx([-12.0, -3.0, -6.0, -4.0, -2.4, -6.0, -6.0, -6.0, -12.0])


def test_what_the_reference_said_is_found_by_row_whatever_stands_beside_it() -> None:
    known = PrecomputedReference(np.arange(9, dtype=np.float32), np.array([0, 4, 6, 9]))  # rows of 4, 2 and 3 answers
    first, second, third = (
        ([Example([5, 1], 1)] * len(lengths), tuple(map(float, range(len(lengths))))) for lengths in ANSWER_LENGTHS
    )
    batch = collate_ranking([third, None, second, first], 0)
    assert known([2, None, 1, 0], batch).tolist() == [6, 7, 8, 0, 0, 0, 4, 5, 0, 1, 2, 3]
    assert known([None, None], collate_ranking([None, None], 0)).tolist() == [0, 0, 0, 0]
