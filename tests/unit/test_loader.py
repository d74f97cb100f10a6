"""The rows of a step depend on the seed and the global batch alone; ranks and micro-batches share them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import tiny
from tristage.config import BatchPlan
from tristage.data.loader import (
    WIDTH,
    WINDOW_STEPS,
    Loader,
    deal,
    deal_tokens,
    evaluation_batches,
    evaluation_rows,
    fill,
)
from tristage.errors import UserError
from tristage.training import setup

LENGTHS = [(i * 37) % 101 + 1 for i in range(50)]
LAYOUTS = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)]  # ranks, micro-batch: all divide 8
SKEWED = np.random.default_rng(0).lognormal(4, 1, size=3210).astype(int) + 1  # 401.25 steps of 8: 8 windows and more

either_order = pytest.mark.parametrize("grouped", [False, True], ids=["mixed", "grouped"])
thorough = settings(max_examples=80, deadline=None, database=None, derandomize=True)
SIZES = st.integers(1, 4)


def loaders(
    world_size: int = 1, micro_batch: int = 2, *, lengths=LENGTHS, global_batch=8, seed=0, epochs=1.0, grouped=False
):
    plan = BatchPlan.make(global_batch, micro_batch, world_size)
    return [Loader(lengths, plan, rank, seed, epochs, group_by_length=grouped) for rank in range(world_size)]


def all_rows(ranks: list[Loader], step: int) -> list[int | None]:
    return [row for loader in ranks for micro_batch in loader.step_rows(step) for row in micro_batch]


def real_rows(ranks: list[Loader], steps: range) -> list[int]:
    return [row for step in steps for row in all_rows(ranks, step) if row is not None]


def step_lengths(ranks: list[Loader]) -> list[np.ndarray]:
    """Of each step, the lengths of its rows."""
    return [ranks[0].lengths[real_rows(ranks, range(step, step + 1))] for step in range(ranks[0].total_steps)]


# -- every row -------------------------------------------------------------------------------------------------------


@either_order
@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_every_row_comes_once_an_epoch(world_size, micro_batch, grouped):
    ranks = loaders(world_size, micro_batch, grouped=grouped)
    assert ranks[0].total_steps == 7
    assert sorted(real_rows(ranks, range(7))) == list(range(50))


@either_order
@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_the_rows_of_a_step_do_not_depend_on_ranks_or_micro_batches(world_size, micro_batch, grouped):
    ranks, reference = (loaders(*layout, epochs=2.3, grouped=grouped) for layout in ((world_size, micro_batch), (1, 8)))
    for step in range(reference[0].total_steps):
        assert Counter(all_rows(ranks, step)) == Counter(all_rows(reference, step))


@thorough
@given(
    num_rows=st.integers(1, 150),
    world_size=SIZES,
    micro_batch=SIZES,
    accumulation=SIZES,
    tenths=st.integers(1, 35),
    grouped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_no_layout_loses_repeats_or_moves_a_row(
    num_rows, world_size, micro_batch, accumulation, tenths, grouped, seed, data
):
    """When as many steps are done as lie in E epochs, no row has come more than E times; one step on, none fewer."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=num_rows, max_size=num_rows))
    batch = world_size * micro_batch * accumulation
    same = {"lengths": lengths, "global_batch": batch, "seed": seed, "epochs": tenths / 10, "grouped": grouped}
    ranks, reference = loaders(world_size, micro_batch, **same), loaders(1, batch, **same)
    seen: Counter[int] = Counter()
    for step in range(ranks[0].total_steps):
        rows = all_rows(ranks, step)
        assert Counter(rows) == Counter(all_rows(reference, step))
        seen.update(row for row in rows if row is not None)
        epoch, place = divmod((step + 1) * batch, num_rows)
        assert max(seen.values()) <= epoch + (place > 0)
        if (step + 1) * batch <= seen.total():
            assert min(seen[row] for row in range(num_rows)) >= epoch
    assert seen.total() == -(-tenths * num_rows // 10)
    assert set(seen[row] for row in range(num_rows)) <= {tenths // 10, -(-tenths // 10)}


@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_every_rank_runs_the_same_number_of_full_micro_batches(world_size, micro_batch):
    for loader in loaders(world_size, micro_batch):
        assert loader.plan.accumulation == 8 // (world_size * micro_batch)
        for step in range(loader.total_steps):
            assert [len(rows) for rows in loader.step_rows(step)] == [micro_batch] * loader.plan.accumulation


# -- orders ----------------------------------------------------------------------------------------------------------


@either_order
def test_each_epoch_has_its_own_order(grouped):
    lengths = [1] * 48  # equal lengths and whole steps: an epoch is six steps
    ranks = loaders(lengths=lengths, epochs=3, grouped=grouped)
    epochs = [
        [frozenset(real_rows(ranks, range(step, step + 1))) for step in range(first, first + 6)] for first in (0, 6, 12)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(frozenset().union(*epoch) == set(range(48)) for epoch in epochs)


@either_order
def test_the_seed_decides_the_order(grouped):
    first, again, other = (all_rows(loaders(seed=seed, grouped=grouped), 0) for seed in (1, 1, 2))
    assert first == again != other


@either_order
def test_any_step_can_be_asked_first(grouped):
    """So a resume needs the number of its step and nothing else."""
    ranks = loaders(epochs=3, grouped=grouped)
    forward = [all_rows(ranks, step) for step in range(19)]
    resumed = {first: loaders(epochs=3, grouped=grouped) for first in (1, 6, 7, 13, 18)}
    for first, later in resumed.items():
        assert [all_rows(later, step) for step in range(first, 19)] == forward[first:]
    assert [all_rows(ranks, step) for step in reversed(range(19))] == forward[::-1]


@either_order
def test_the_stream_runs_across_the_end_of_an_epoch(grouped):
    ranks = loaders(epochs=2, grouped=grouped)
    assert Counter(real_rows(ranks, range(ranks[0].total_steps))) == Counter(list(range(50)) * 2)
    assert len(real_rows(ranks, range(6, 7))) == 8  # two rows of the first epoch and six of the second


def test_the_last_step_is_short_and_filled():
    rows = all_rows(loaders(world_size=2), 6)
    assert len(rows) == 8 and rows.count(None) == 6


@either_order
def test_a_global_batch_above_the_set_repeats_rows_only_for_the_next_epoch(grouped):
    ranks = loaders(lengths=[1, 2, 3], epochs=2, grouped=grouped)
    assert ranks[0].total_steps == 1
    assert Counter(all_rows(ranks, 0)) == Counter([0, 1, 2, 0, 1, 2, None, None])


@pytest.mark.parametrize("epochs, rows", [(0.5, 50), (1.1, 110), (0.07, 7), (0.001, 1), (2, 200)])
def test_part_epochs_are_counted_in_whole_rows(epochs, rows):
    ranks = loaders(lengths=[1] * 100, global_batch=1, micro_batch=1, epochs=epochs)
    assert ranks[0].total_steps == rows == len(real_rows(ranks, range(rows)))


@pytest.mark.parametrize("lengths, epochs", [([], 1.0), ([1], 0.0)])
def test_nothing_to_train_on_is_an_error(lengths, epochs):
    with pytest.raises(UserError, match="leave nothing to train on"):
        Loader(lengths, BatchPlan.make(1, 1, 1), 0, 0, epochs)


# -- lengths ---------------------------------------------------------------------------------------------------------


def test_rows_of_like_length_share_a_micro_batch_over_the_ranks():
    lengths = [9, 4, 6, 8, 3, 7, 5]
    assert [loader.step_rows(0) for loader in loaders(2, 2, lengths=lengths)] == [
        [[0, 2], [6, None]],  # lengths 9 6, 5
        [[3, 5], [1, 4]],  # lengths 8 7, 4 3
    ]


@pytest.mark.parametrize("ranks, micro_batch", [(2, 4), (2, 16), (4, 2), (4, 8), (8, 1)])
def test_ranks_get_about_as_many_tokens(ranks, micro_batch):
    """No rank has more than the mean by a tenth, unless its one longest row has."""
    plan = BatchPlan.make(32, micro_batch, ranks)
    excess, in_blocks = [], []
    for start in range(0, 3200, 32):
        rows = range(start, start + 32)
        dealt = [[row for micro in deal(rows, SKEWED, plan, rank) for row in micro] for rank in range(ranks)]
        assert sorted(row for own in dealt for row in own) == [*rows]
        least = max(SKEWED[start : start + 32].sum() / ranks, SKEWED[start : start + 32].max())
        excess.append(max(SKEWED[own].sum() for own in dealt) / least)
        blocks = np.sort(SKEWED[start : start + 32])[::-1].reshape(-1, ranks, micro_batch)
        in_blocks.append(blocks.sum(axis=(0, 2)).max() / least)
    assert np.mean(excess) < 1.1 and np.mean(excess) < 0.99 * np.mean(in_blocks)


def test_rows_that_belong_together_stay_on_one_rank():
    plan = BatchPlan.make(12, 3, 2)
    lengths = [5, 6, 7, 1, 2, 3, 9, 9, 9, 4, 4, 4]
    dealt = [deal(range(12), lengths, plan, rank, together=3) for rank in (0, 1)]
    assert dealt == [[[6, 7, 8], [3, 4, 5]], [[0, 1, 2], [9, 10, 11]]]


def test_a_micro_batch_is_filled_to_its_tokens_but_never_empty():
    lengths = [9, 5, 4, 3, 2, 20]
    assert fill([5, 0, 1, 2, 3, 4], lengths, 10) == [[5], [0], [1, 2], [3, 4]]
    assert fill([0, 1, 2, 3], lengths, 100) == [[0, 1, 2, 3]]
    assert fill([0, 1, 2, 3], lengths, 100, at_least=3) == [[0], [1], [2, 3]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), st.integers(1, 4), st.integers(1, 100))
@thorough
def test_by_tokens_every_row_comes_once_in_as_many_micro_batches_on_each_rank(lengths, ranks, tokens):
    rows = list(range(len(lengths) * ranks))
    lengths = lengths * ranks
    dealt = [deal_tokens(rows, lengths, BatchPlan.make(len(rows), 1, ranks), rank, tokens) for rank in range(ranks)]
    assert sorted(row for rank in dealt for micro in rank for row in micro) == rows
    assert len({len(rank) for rank in dealt}) == 1
    for micro in (micro for rank in dealt for micro in rank):
        assert micro and (len(micro) == 1 or sum(lengths[row] for row in micro) <= tokens)


@pytest.mark.parametrize("seed", range(4))
def test_grouped_steps_are_cut_where_the_steps_of_the_run_are(seed):
    """20 rows, steps of 8. The first epoch: the 8 longest, the next 8, the last 4 begin a step.

    4 rows of the second complete it. The other 16 are two whole steps, one of which has all the longer rows.
    """
    steps = step_lengths(loaders(lengths=list(range(1, 21)), epochs=2, grouped=True, seed=seed))
    assert {frozenset(step) for step in steps[:2]} == {frozenset(range(13, 21)), frozenset(range(5, 13))}
    assert {1, 2, 3, 4} <= set(steps[2])
    shorter, longer = sorted(steps[3:], key=min)
    assert len(shorter) == len(longer) == 8 and max(shorter) < min(longer)


def test_grouping_cuts_the_padding_of_skewed_lengths_to_a_fifth():
    padding = {}
    for grouped in (False, True):
        ranks = loaders(2, 2, lengths=SKEWED, epochs=2, grouped=grouped)
        steps = [loader.step_rows(step) for loader in ranks for step in range(loader.total_steps)]
        of_rows = [[SKEWED[row] for row in rows if row is not None] for step in steps for rows in step]
        padding[grouped] = sum(max(lengths) * len(lengths) - sum(lengths) for lengths in of_rows if lengths)
    assert 0 < padding[True] < padding[False] / 5


def test_grouped_steps_come_in_no_order_of_length():
    """Neither inside a window, where a sort would leave a correlation of -1, nor over the epoch."""
    means = np.array([step.mean() for step in step_lengths(loaders(lengths=SKEWED, grouped=True))][:400])
    places = means.argsort().argsort()
    for window in places.reshape(-1, WINDOW_STEPS):
        assert abs(np.corrcoef(window, np.arange(WINDOW_STEPS))[0, 1]) < 0.5
    assert abs(np.corrcoef(places, np.arange(400))[0, 1]) < 0.2


# -- evaluation ------------------------------------------------------------------------------------------------------


@thorough
@example(num_rows=0, world_size=2, micro_batch=4)
@example(num_rows=50, world_size=4, micro_batch=2)
@given(num_rows=st.integers(0, 50), world_size=SIZES, micro_batch=st.integers(1, 8))
def test_evaluation_takes_every_row_once_in_equal_rounds(num_rows, world_size, micro_batch):
    dealt = [evaluation_rows(LENGTHS[:num_rows], micro_batch, world_size, rank) for rank in range(world_size)]
    rows = [row for rank in dealt for batch in rank for row in batch]
    assert sorted(row for row in rows if row is not None) == list(range(num_rows))
    assert {len(rank) for rank in dealt} == {-(-num_rows // (micro_batch * world_size))}
    assert {len(batch) for rank in dealt for batch in rank} <= {micro_batch}


def batches_of_all(lengths, micro_batch, world_size, device="cuda"):
    """In the order in which they were cut: round by round."""
    dealt = [evaluation_batches(lengths, micro_batch, world_size, rank, device) for rank in range(world_size)]
    assert len({len(rank) for rank in dealt}) == 1  # equal rounds: under ZeRO-3 a forward is a collective
    return [batch for of_round in zip(*dealt, strict=True) for batch in of_round]


@thorough
@example(num_rows=0, world_size=2, micro_batch=1)
@example(num_rows=1, world_size=4, micro_batch=8)
@given(num_rows=st.integers(0, 50), world_size=SIZES, micro_batch=st.integers(1, 8))
def test_wide_evaluation_takes_every_row_once_whatever_the_number_of_ranks(num_rows, world_size, micro_batch):
    lengths = LENGTHS[:num_rows]
    batches = batches_of_all(lengths, micro_batch, world_size)
    assert sorted(row for batch in batches for row in batch if row is not None) == list(range(num_rows))
    assert [batch for batch in batches if batch != [None]] == batches_of_all(lengths, micro_batch, 1)
    assert batches.count([None]) < world_size
    padded = [len(batch) * lengths[batch[0]] for batch in batches if batch != [None]]
    assert all(tokens <= WIDTH["cuda"] * micro_batch * max(lengths) for tokens in padded)


def test_evaluation_batches_are_wide_where_rows_are_short_or_many():
    assert [len(batch) for batch in batches_of_all([9] * 64, 2, 1)] == [8] * 8  # WIDTH times as wide
    assert [len(batch) for batch in batches_of_all([9] * 64, 2, 1, "cpu")] == [2] * 32
    assert [len(batch) for batch in batches_of_all([9] * 16, 2, 1)] == [2] * 8  # few rows: ranks share them
    assert [len(batch) for batch in batches_of_all([9, 9, *[1] * 30], 1, 1)] == [1, 1, 9, 9, 9, 3]


@pytest.mark.parametrize(
    "epochs, max_steps, sentence, steps",
    [
        (1.0, None, "epochs 1 over 50 rows end the run at step 7", 7),
        (1.0, 400, "epochs 1 over 50 rows end the run at step 7; max_steps 400 is not reached", 7),
        (2.5, 7, "max_steps ends the run at step 7; epochs 2.5 over 50 rows would be 16 steps", 7),
        (2.5, 16, "epochs 2.5 over 50 rows end the run at step 16", 16),
    ],
)
def test_the_limit_that_ends_a_run_is_printed_at_its_start(tmp_path, capsys, epochs, max_steps, sentence, steps):
    config = tiny.sft_config(tmp_path, "model", "rows.jsonl")
    config = config.model_copy(update={"epochs": epochs, "max_steps": max_steps})
    loader = setup.train_loader(config, LENGTHS, BatchPlan.make(8, 2, 1))
    assert (capsys.readouterr().out, loader.total_steps) == (f"{sentence}\n", steps)
