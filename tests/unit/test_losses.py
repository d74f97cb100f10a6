"""tristage.algo.losses: hand-worked numbers, the slow twins, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tristage.algo.losses import lm_loss, pairwise_loss, ranking_loss, ranking_pairs

B, T, V = 4, 6, 7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lm_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    logits = torch.randn(B, T, V, generator=g) * 2
    return logits, torch.randint(0, V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.5


# Three prompts with 4, 2 and 3 answers, interleaved; ties in prompts 0 and 2, several best in 0.
PROMPTS = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0, 2])
RANKS = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0, 3.0, 0.0])


def test_lm_loss_predicts_each_token_from_the_position_before() -> None:
    # Position t gives token t+1 probability 1/2, 1/4, 1/8; the rest goes to the other token.
    logits = torch.tensor([[[1.0, 1.0], [1.0, 3.0], [7.0, 1.0], [0.5, 0.5]]]).log()
    ids = torch.tensor([[1, 0, 0, 1]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    expected = torch.tensor([[math.log(2), math.log(4), math.log(8)]])
    torch.testing.assert_close(lm_loss(logits, ids, everything), expected)


def test_lm_loss_mask_names_the_predicted_token() -> None:
    # Trained on tokens 0 and 2: nothing predicts token 0; token 2 is predicted at position 1, column 1.
    logits = torch.tensor([[[1.0, 1.0], [1.0, 3.0], [7.0, 1.0], [0.5, 0.5]]]).log()
    loss_mask = torch.tensor([[True, False, True, False]])
    result = lm_loss(logits, torch.tensor([[1, 0, 0, 1]]), loss_mask)
    torch.testing.assert_close(result, torch.tensor([[0.0, math.log(4), 0.0]]))


@pytest.mark.parametrize("seed", range(4))
def test_lm_loss_matches_the_oracle(seed: int) -> None:
    logits, ids, loss_mask = lm_case(seed)
    expected = torch.tensor(oracles.lm_loss(logits, ids, loss_mask))
    torch.testing.assert_close(lm_loss(logits, ids, loss_mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_lm_loss_ignores_logits_that_predict_no_trained_token_even_when_nan(poison: float) -> None:
    logits, ids, loss_mask = lm_case(0)
    used = torch.zeros_like(loss_mask)
    used[:, :-1] = loss_mask[:, 1:]
    results, gradients = [], []
    for fill in (0.0, poison):
        leaf = torch.where(used.unsqueeze(-1), logits, fill).requires_grad_()
        result = lm_loss(leaf, ids, loss_mask)
        result.sum().backward()
        results.append(result.detach())
        gradients.append(leaf.grad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.all(gradients[1][~used] == 0) and torch.all(gradients[1][used].abs().sum(-1) > 0)


def test_lm_loss_with_nothing_to_train_on_is_zero_and_can_run_backward() -> None:
    logits, ids, loss_mask = lm_case(0)
    logits.requires_grad_()
    result = lm_loss(logits, ids, torch.zeros_like(loss_mask))
    result.sum().backward()
    assert torch.equal(result, torch.zeros(B, T - 1))
    assert logits.grad is not None and torch.all(logits.grad == 0)


def test_lm_loss_is_float32_for_bfloat16_and_leaves_its_inputs_alone() -> None:
    logits, ids, loss_mask = lm_case(0)
    logits = logits.bfloat16()
    before = [x.clone() for x in (logits, ids, loss_mask)]
    result = lm_loss(logits, ids, loss_mask)
    assert result.dtype == torch.float32 and result.shape == (B, T - 1)
    assert torch.equal(result, lm_loss(logits.float(), ids, loss_mask))
    assert all(torch.equal(x, y) for x, y in zip((logits, ids, loss_mask), before, strict=True))


def test_pairwise_loss_is_minus_log_of_the_win_probability() -> None:
    # A gap of ln 3 is a win probability of 3/4; of 0, 1/2; of -ln 3, 1/4.
    chosen, rejected = torch.tensor([math.log(3), 1.0, 0.0]), torch.tensor([0.0, 1.0, math.log(3)])
    expected = torch.tensor([math.log(4 / 3), math.log(2), math.log(4)])
    torch.testing.assert_close(pairwise_loss(chosen, rejected), expected)


def test_pairwise_margin_is_taken_off_the_gap() -> None:
    # Gap 2 ln 3 with margin ln 3 leaves ln 3.
    result = pairwise_loss(torch.tensor([2 * math.log(3)]), torch.zeros(1), torch.tensor([math.log(3)]))
    assert result.item() == pytest.approx(math.log(4 / 3))


def test_pairwise_label_smoothing_mixes_both_orders() -> None:
    # 0.9 * -ln(3/4) + 0.1 * -ln(1/4)
    result = pairwise_loss(torch.tensor([math.log(3)]), torch.zeros(1), label_smoothing=0.1)
    assert result.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_pairwise_loss_matches_the_oracle(label_smoothing: float) -> None:
    chosen, rejected, margin = torch.randn(3, 20, generator=generator(0)) * 3
    result = pairwise_loss(chosen, rejected, margin, label_smoothing)
    expected = torch.tensor(oracles.pairwise_loss(chosen, rejected, margin, label_smoothing))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_pairwise_loss_is_finite_for_huge_gaps() -> None:
    # -log sigmoid(x) tends to -x on one side and to 0 on the other
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    result = pairwise_loss(chosen, torch.zeros(2))
    result.sum().backward()
    assert result.tolist() == [0, 1000]
    assert chosen.grad is not None and chosen.grad.tolist() == [0, -1]


def test_pairwise_gradient_raises_chosen_and_lowers_rejected() -> None:
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    pairwise_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == [-0.5] * 3
    assert rejected.grad is not None and rejected.grad.tolist() == [0.5] * 3


def test_bfloat16_scores_give_float32_losses() -> None:
    scores = torch.tensor([1.0, 0.0, 2.0], dtype=torch.bfloat16)
    assert pairwise_loss(scores, scores).dtype == torch.float32
    for form in ("pairs", "best", "elo"):
        result = ranking_loss(scores, torch.zeros(3, dtype=torch.long), torch.arange(3.0), form)
        assert result.dtype == torch.float32


def test_ranking_pairs_are_the_untied_pairs_of_a_prompt() -> None:
    better, worse = ranking_pairs(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 3)]


@pytest.mark.parametrize("seed", range(4))
def test_ranking_pairs_match_the_oracle(seed: int) -> None:
    prompts = torch.randint(0, 4, (15,), generator=generator(seed))
    ranks = torch.randint(0, 3, (15,), generator=generator(seed + 100)).float()
    better, worse = ranking_pairs(prompts, ranks)
    pairs = list(zip(better.tolist(), worse.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == oracles.ranking_pairs(prompts, ranks)


def test_ranking_loss_pairs_averages_over_the_pairs_of_each_prompt() -> None:
    # Prompt 0: scores 2 ln 3, ln 3, 0, best first. Gaps ln 3, ln 3, 2 ln 3: win probabilities 3/4, 3/4, 9/10.
    # Prompt 1: the better answer is ln 3 below: 1/4.
    a = math.log(3)
    scores, prompts = torch.tensor([2 * a, a, 0.0, a, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    result = ranking_loss(scores, prompts, torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0]))
    expected = [(2 * math.log(4 / 3) + math.log(10 / 9)) / 3, math.log(4)]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_ranking_loss_pairs_counts_ties_neither_in_the_sum_nor_in_the_number() -> None:
    # Prompt 0: one best answer at ln 3 and two tied at 0: both pairs have 3/4; the mean is over two pairs.
    # Prompt 1: all tied, loss 0. Prompt 2: a single answer, loss 0.
    scores = torch.tensor([math.log(3), 0.0, 0.0, 5.0, 7.0, 1.0])
    prompts = torch.tensor([0, 0, 0, 1, 1, 2])
    result = ranking_loss(scores, prompts, torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(result, torch.tensor([math.log(4 / 3), 0.0, 0.0]))


def test_ranking_loss_best_is_the_cross_entropy_of_the_best_answer() -> None:
    # Prompt 0: weights 1, 2, 5 of 8, the second is best: 2/8. Prompt 1: weights 1, 3, the first is best: 1/4.
    scores = torch.tensor([1.0, 2.0, 5.0, 1.0, 3.0]).log()
    result = ranking_loss(
        scores, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0]), form="best"
    )
    torch.testing.assert_close(result, torch.tensor([math.log(4), math.log(4)]))


def test_ranking_loss_best_averages_several_best_answers() -> None:
    # Weights 1, 2, 5 of 8; the first two are best: the mean of -ln(1/8) and -ln(2/8).
    result = ranking_loss(
        torch.tensor([1.0, 2.0, 5.0]).log(),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([0.0, 0.0, 1.0]),
        "best",
    )
    assert result.item() == pytest.approx((math.log(8) + math.log(4)) / 2)


def test_ranking_loss_best_of_a_single_answer_is_zero() -> None:
    result = ranking_loss(torch.tensor([3.0]), torch.tensor([0]), torch.tensor([0.0]), "best")
    assert result.item() == 0


@pytest.mark.parametrize("seed", range(4))
def test_ranking_loss_matches_the_oracle_for_different_numbers_of_answers_and_ties(seed: int) -> None:
    scores = torch.randn(len(PROMPTS), generator=generator(seed)) * 2
    expected = torch.tensor(oracles.ranking_loss_pairs(scores, PROMPTS, RANKS))
    torch.testing.assert_close(ranking_loss(scores, PROMPTS, RANKS), expected, atol=1e-5, rtol=1e-5)
    expected = torch.tensor(oracles.ranking_loss_best(scores, PROMPTS, RANKS))
    torch.testing.assert_close(ranking_loss(scores, PROMPTS, RANKS, "best"), expected, atol=1e-5, rtol=1e-5)


def test_both_ranking_forms_equal_pairwise_loss_for_two_answers() -> None:
    chosen, rejected = torch.randn(2, 6, generator=generator(0))
    scores, prompts = torch.cat([chosen, rejected]), torch.arange(6).repeat(2)
    ranks = torch.tensor([0.0, 1.0]).repeat_interleave(6)
    for form in ("pairs", "best"):
        torch.testing.assert_close(
            ranking_loss(scores, prompts, ranks, form), pairwise_loss(chosen, rejected)
        )


@pytest.mark.parametrize("form", ["pairs", "best", "elo"])
def test_ranking_loss_of_a_prompt_does_not_depend_on_the_others_or_on_the_order(form: str) -> None:
    scores = torch.randn(len(PROMPTS), generator=generator(1))
    together = ranking_loss(scores, PROMPTS, RANKS, form)
    for prompt in range(3):
        own = PROMPTS == prompt
        alone = ranking_loss(scores[own], torch.zeros_like(PROMPTS[own]), RANKS[own], form)
        torch.testing.assert_close(alone[0], together[prompt])
    order = torch.randperm(len(PROMPTS), generator=generator(2))
    torch.testing.assert_close(ranking_loss(scores[order], PROMPTS[order], RANKS[order], form), together)


@pytest.mark.parametrize("form", ["pairs", "best", "elo"])
def test_ranking_loss_gradients_agree_with_finite_differences(form: str) -> None:
    scores = torch.randn(len(PROMPTS), generator=generator(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, PROMPTS, RANKS, form), scores)


@pytest.mark.parametrize("form", ["pairs", "best", "elo"])
def test_a_broken_prompt_does_not_touch_the_gradient_of_the_others(form: str) -> None:
    scores = torch.randn(len(PROMPTS), generator=generator(4))
    broken = torch.where(PROMPTS == 1, torch.nan, scores)
    gradients = []
    for values in (scores, broken):
        leaf = values.clone().requires_grad_()
        ranking_loss(leaf, PROMPTS, RANKS, form)[[0, 2]].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0][PROMPTS != 1], gradients[1][PROMPTS != 1])


def test_an_unknown_ranking_form_names_the_choices() -> None:
    with pytest.raises(ValueError, match="must be 'pairs', 'best' or 'elo', got 'all'"):
        ranking_loss(torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.arange(2.0), "all")  # type: ignore[arg-type]
