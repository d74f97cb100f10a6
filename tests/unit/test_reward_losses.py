"""The reward model's other losses: every divergent token, Elo ratings, and the options of comparisons."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tristage.algo.losses import (
    ELO_K_FACTOR,
    ELO_ROUNDS,
    comparison_loss,
    elo_ratings,
    ranking_loss,
    token_ranking_loss,
)

OPTIONS = {"margin": 0.3, "label_smoothing": 0.1, "centering": 0.05}
NO_OPTIONS = dict.fromkeys(OPTIONS, 0.0)
A = math.log(3)  # a lead of ln 3 is a win probability of 3/4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_prompts(seed: int) -> tuple[Tensor, Tensor]:
    """(prompt index, ranks) of 1 to 6 prompts with 2 to 6 answers each, some tied."""
    g = generator(seed)
    sizes = torch.randint(2, 7, (int(torch.randint(1, 7, (1,), generator=g)),), generator=g)
    index = torch.arange(len(sizes)).repeat_interleave(sizes)
    return index, torch.randint(0, 4, (len(index),), generator=g).float()


def random_rows(index: Tensor, seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, values) without padding: prompts shared by their answers, ids of two kinds so that answers begin alike.

    Answers are of 1 to 7 tokens; some are the beginning of another, or the same.
    """
    g = generator(seed)
    prompts = {int(p): torch.randint(5, 9, (int(p) % 3 + 1,), generator=g).tolist() for p in index.unique()}
    ids = [
        prompts[int(p)] + torch.randint(0, 2, (int(torch.randint(1, 8, (1,), generator=g)),), generator=g).tolist()
        for p in index
    ]
    return ids, [torch.randn(len(row), generator=g).tolist() for row in ids]


def padded(rows: list[list[float]] | list[list[int]], fill: float, columns: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (columns - len(row))] for row in rows])


def token_loss(
    ids: list[list[int]], values: list[list[float]], index: Tensor, ranks: Tensor, fill: float = 99.0, **options: float
) -> Tensor:
    columns = max(map(len, ids)) + 2
    mask = padded([[True] * len(row) for row in ids], False, columns)
    return token_ranking_loss(padded(values, fill, columns), padded(ids, 0, columns), mask, index, ranks, **options)


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_a_margin_is_worth_one_rank_and_is_taken_off_inside_the_sigmoid() -> None:
    # Ranks 0 and 2: two ranks apart, margin 2 * ln 3 / 2 off a lead of 2 ln 3 leaves ln 3.
    result = ranking_loss(torch.tensor([2 * A, 0.0]), torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 2.0]),
                          margin=A / 2)  # fmt: skip
    assert result.tolist() == pytest.approx([math.log(4 / 3)])


def test_label_smoothing_and_centering_of_a_pair_by_hand() -> None:
    # Scores ln 3 and 0: 0.9 * ln(4/3) + 0.1 * ln 4, and 0.5 * (ln 3)^2.
    result = ranking_loss(torch.tensor([A, 0.0]), torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 1.0]),
                          label_smoothing=0.1, centering=0.5)  # fmt: skip
    assert result.tolist() == pytest.approx([0.9 * math.log(4 / 3) + 0.1 * math.log(4) + 0.5 * A**2])


def test_centering_alone_pulls_both_scores_to_opposite_numbers() -> None:
    scores = torch.tensor([3.0, 1.0], requires_grad=True)
    centred = comparison_loss(scores[:1], scores[1:], torch.zeros(1), centering=0.01)
    (centred - comparison_loss(scores[:1], scores[1:], torch.zeros(1))).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx([0.08, 0.08])  # 2 * 0.01 * (3 + 1)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_with_options_match_the_oracle(seed: int) -> None:
    index, ranks = random_prompts(seed)
    scores = torch.randn(len(index), generator=generator(seed + 50)) * 2
    expected = oracles.ranking_loss_options(scores, index, ranks, **OPTIONS)
    assert ranking_loss(scores, index, ranks, **OPTIONS).tolist() == pytest.approx(expected, abs=1e-5)


# ---- every divergent token ------------------------------------------------------------------------------------------


def test_tokens_are_compared_from_the_first_difference_to_the_end_of_the_shorter_answer() -> None:
    # Differ at t = 3; the worse one's last token has no counterpart. Leads there: ln 3 and 0, so 3/4 and 1/2.
    result = token_loss(
        [[5, 6, 7, 8, 2], [5, 6, 7, 9, 4, 2]],
        [[50.0, 0.0, 0.0, A, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 77.0]],
        torch.tensor([0, 0]),
        torch.tensor([0.0, 1.0]),
    )
    assert result.tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2])


@pytest.mark.parametrize("better_is_longer", [True, False])
def test_an_answer_that_is_the_beginning_of_another_is_compared_at_the_ends(better_is_longer: bool) -> None:
    ids, values = [[5, 6, 7, 8], [5, 6]], [[9.0, 9.0, 9.0, A], [9.0, 0.0]]
    ranks = torch.tensor([0.0, 1.0] if better_is_longer else [1.0, 0.0])
    lead = 4 / 3 if better_is_longer else 4
    assert token_loss(ids, values, torch.tensor([0, 0]), ranks).tolist() == pytest.approx([math.log(lead)])


def test_the_first_token_may_differ_and_answers_may_be_the_same() -> None:
    # Prompt 0: they differ at t = 0. Prompt 1: the same ids and values, ln 2.
    values = [[A, A], [0.0, 0.0], [1.0, 4.0], [1.0, 4.0]]
    result = token_loss([[1, 2], [3, 2], [1, 2], [1, 2]], values, torch.tensor([0, 0, 1, 1]),
                        torch.tensor([0.0, 1.0, 0.0, 1.0]))  # fmt: skip
    assert result.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])


@pytest.mark.parametrize("options", [NO_OPTIONS, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("seed", range(8))
def test_the_token_loss_matches_the_oracle(seed: int, options: dict[str, float]) -> None:
    index, ranks = random_prompts(seed)
    ids, values = random_rows(index, seed)
    expected = oracles.token_ranking_loss(values, ids, index, ranks, **options)
    assert token_loss(ids, values, index, ranks, **options).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_random_rows_have_prefixes_ties_and_differences() -> None:
    prefixes = ties = differences = 0
    for seed in range(8):
        index, ranks = random_prompts(seed)
        ids, _ = random_rows(index, seed)
        for i, j in oracles.ranking_pairs(index, ranks):
            shorter = min(len(ids[i]), len(ids[j]))
            prefixes += ids[i][:shorter] == ids[j][:shorter]
            differences += ids[i][:shorter] != ids[j][:shorter]
        ties += len(ranks) - len(set(zip(index.tolist(), ranks.tolist(), strict=True)))
    assert min(prefixes, ties, differences) > 10


def test_what_stands_in_padding_or_before_the_difference_touches_no_gradient() -> None:
    index, ranks = random_prompts(3)
    ids, values = random_rows(index, 3)
    columns = max(map(len, ids)) + 2
    mask = padded([[True] * len(row) for row in ids], False, columns)
    gradients = []
    for fill in (0.0, torch.nan):
        leaf = padded(values, fill, columns).requires_grad_()
        token_ranking_loss(leaf, padded(ids, 0, columns), mask, index, ranks, **OPTIONS).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].abs().sum() > 0
    assert torch.all(gradients[0][~mask] == 0) and torch.all(gradients[0][:, 0] == 0)  # the prompt's first token


def test_token_loss_gradients_agree_with_finite_differences() -> None:
    index, ranks = random_prompts(5)
    ids, values = random_rows(index, 5)
    columns = max(map(len, ids))
    mask = padded([[True] * len(row) for row in ids], False, columns)
    leaf = padded(values, 0.0, columns).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_ranking_loss(x, padded(ids, 0, columns), mask, index, ranks, **OPTIONS), leaf
    )


def test_two_answers_that_differ_in_their_last_token_alone_have_the_loss_of_pairs() -> None:
    index, ranks = torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    ids, values = [[4, 1], [4, 2], [4, 2], [4, 1]], torch.randn(4, 2, generator=generator(0))
    expected = ranking_loss(values[:, 1], index, ranks, **OPTIONS)
    torch.testing.assert_close(token_loss(ids, values.tolist(), index, ranks, **OPTIONS), expected)


# ---- Elo ------------------------------------------------------------------------------------------------------------


def test_one_round_of_elo_by_hand() -> None:
    # From 0 all chances are 1/2. Best: two wins, +K. Middle: one of each, 0. Last: -K. Two tied answers draw: 0.
    index, ranks = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0])
    unit = 32 * math.log(10) / 400
    result = elo_ratings(index, ranks, k_factor=32, rounds=1)
    assert result.tolist() == pytest.approx([0.0, unit, -unit, 0.0, 0.0])
    # Second round, best of prompt 0: chances 10^(32/400) : 1 against the middle, 10^(64/400) : 1 against the last.
    again = elo_ratings(index, ranks, k_factor=32, rounds=2)
    chances = [1 / (1 + 10 ** (-32 / 400)), 1 / (1 + 10 ** (-64 / 400))]
    assert again[1].item() == pytest.approx(unit + unit * (2 - sum(chances)))


@pytest.mark.parametrize("seed", range(6))
def test_elo_ratings_and_their_loss_match_the_oracle(seed: int) -> None:
    index, ranks = random_prompts(seed)
    ratings = elo_ratings(index, ranks)
    assert ratings.tolist() == pytest.approx(oracles.elo_ratings(index, ranks, ELO_K_FACTOR, ELO_ROUNDS), abs=1e-5)
    scores = torch.randn(len(index), generator=generator(seed)) * 2
    expected = oracles.ranking_loss_elo(scores, index, ranks, ELO_K_FACTOR, ELO_ROUNDS)
    assert ranking_loss(scores, index, ranks, "elo").tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("answers", [2, 3, 9, 64])
def test_elo_ratings_fall_with_the_rank_and_have_mean_zero(answers: int) -> None:
    order = torch.randperm(answers, generator=generator(answers))
    ratings = elo_ratings(torch.zeros(answers, dtype=torch.long), order.float())
    assert torch.all(ratings[order.argsort()].diff() < 0)
    assert ratings.mean().item() == pytest.approx(0.0, abs=1e-5)


def test_tied_answers_have_the_same_elo_and_ranks_count_only_by_their_order() -> None:
    index = torch.zeros(4, dtype=torch.long)
    ratings = elo_ratings(index, torch.tensor([0.0, 1.0, 1.0, 2.0]))
    assert ratings[1].item() == pytest.approx(ratings[2].item(), abs=1e-6)
    torch.testing.assert_close(ratings, elo_ratings(index, torch.tensor([-7.0, 2.0, 2.0, 90.0])))


def test_elo_of_two_answers_is_a_chance_of_87_percent() -> None:
    ratings = elo_ratings(torch.tensor([0, 0]), torch.tensor([0.0, 1.0]))
    assert (ratings[0] - ratings[1]).item() == pytest.approx(1.90, abs=0.01)
    assert (ratings[0] - ratings[1]).sigmoid().item() == pytest.approx(0.87, abs=0.005)


@pytest.mark.parametrize("form", ["best", "elo"])
def test_options_of_comparisons_are_refused_where_nothing_is_compared(form: str) -> None:
    with pytest.raises(AssertionError, match=f"margin, label_smoothing and centering are not of '{form}'"):
        ranking_loss(torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.arange(2.0), form, margin=1.0)  # type: ignore[arg-type]
