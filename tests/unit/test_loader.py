"""The rows of a step depend on the seed and the global batch alone; ranks and micro-batches share them."""

from __future__ import annotations

from collections import Counter

import pytest

from tristage.config import BatchPlan
from tristage.data.loader import Loader, evaluation_rows
from tristage.errors import UserError

LENGTHS = [(i * 37) % 101 + 1 for i in range(50)]
LAYOUTS = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)]  # ranks, micro-batch: all divide 8


def loaders(
    world_size: int = 1, micro_batch: int = 2, *, lengths=LENGTHS, global_batch=8, seed=0, epochs=1.0
):
    return [
        Loader(lengths, BatchPlan.make(global_batch, micro_batch, world_size), rank, seed, epochs)
        for rank in range(world_size)
    ]


def all_rows(ranks: list[Loader], step: int) -> list[int | None]:
    return [row for loader in ranks for micro_batch in loader.step_rows(step) for row in micro_batch]


def real_rows(ranks: list[Loader], steps: range) -> list[int]:
    return [row for step in steps for row in all_rows(ranks, step) if row is not None]


@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_every_row_comes_once_an_epoch(world_size, micro_batch):
    ranks = loaders(world_size, micro_batch)
    assert ranks[0].total_steps == 7
    assert sorted(real_rows(ranks, range(7))) == list(range(50))


@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_the_rows_of_a_step_do_not_depend_on_ranks_or_micro_batches(world_size, micro_batch):
    ranks, reference = loaders(world_size, micro_batch, epochs=2.3), loaders(1, 8, epochs=2.3)
    for step in range(reference[0].total_steps):
        assert Counter(all_rows(ranks, step)) == Counter(all_rows(reference, step))


@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_every_rank_runs_the_same_number_of_full_micro_batches(world_size, micro_batch):
    for loader in loaders(world_size, micro_batch):
        assert loader.plan.accumulation == 8 // (world_size * micro_batch)
        for step in range(loader.total_steps):
            assert [len(rows) for rows in loader.step_rows(step)] == [micro_batch] * loader.plan.accumulation


def test_each_epoch_has_its_own_order():
    lengths = [1] * 48  # equal lengths and whole steps: an epoch is six steps
    ranks = loaders(lengths=lengths, epochs=3)
    epochs = [
        [frozenset(real_rows(ranks, range(step, step + 1))) for step in range(first, first + 6)]
        for first in (0, 6, 12)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(frozenset().union(*epoch) == set(range(48)) for epoch in epochs)


def test_the_seed_decides_the_order():
    assert all_rows(loaders(seed=1), 0) == all_rows(loaders(seed=1), 0) != all_rows(loaders(seed=2), 0)


def test_any_step_can_be_asked_first():
    forward = [all_rows(loaders(epochs=3), step) for step in range(19)]
    loader = loaders(epochs=3)
    assert [all_rows(loader, step) for step in reversed(range(19))] == forward[::-1]


def test_the_stream_runs_across_the_end_of_an_epoch():
    ranks = loaders(epochs=2)
    assert Counter(real_rows(ranks, range(ranks[0].total_steps))) == Counter(list(range(50)) * 2)
    assert len(real_rows(ranks, range(6, 7))) == 8  # two rows of the first epoch and six of the second


def test_the_last_step_is_short_and_filled():
    rows = all_rows(loaders(world_size=2), 6)
    assert len(rows) == 8 and rows.count(None) == 6


def test_a_global_batch_above_the_set_repeats_rows_only_for_the_next_epoch():
    ranks = loaders(lengths=[1, 2, 3], epochs=2)
    assert ranks[0].total_steps == 1 and Counter(all_rows(ranks, 0)) == Counter(
        [0, 1, 2, 0, 1, 2, None, None]
    )


@pytest.mark.parametrize("epochs, rows", [(0.5, 50), (1.1, 110), (0.07, 7), (0.001, 1), (2, 200)])
def test_part_epochs_are_counted_in_whole_rows(epochs, rows):
    ranks = loaders(lengths=[1] * 100, global_batch=1, micro_batch=1, epochs=epochs)
    assert ranks[0].total_steps == rows == len(real_rows(ranks, range(rows)))


def test_rows_of_like_length_share_a_micro_batch_over_the_ranks():
    lengths = [9, 4, 6, 8, 3, 7, 5]
    assert [loader.step_rows(0) for loader in loaders(2, 2, lengths=lengths)] == [
        [[0, 3], [6, 1]],  # lengths 9 8, 5 4
        [[5, 2], [4, None]],  # lengths 7 6, 3
    ]


@pytest.mark.parametrize("lengths, epochs", [([], 1.0), ([1], 0.0)])
def test_nothing_to_train_on_is_an_error(lengths, epochs):
    with pytest.raises(UserError, match="leave nothing to train on"):
        Loader(lengths, BatchPlan.make(1, 1, 1), 0, 0, epochs)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 50])
@pytest.mark.parametrize("world_size, micro_batch", LAYOUTS)
def test_evaluation_takes_every_row_once_in_equal_rounds(world_size, micro_batch, num_rows):
    dealt = [evaluation_rows(LENGTHS[:num_rows], micro_batch, world_size, rank) for rank in range(world_size)]
    rows = [row for rank in dealt for batch in rank for row in batch]
    assert sorted(row for row in rows if row is not None) == list(range(num_rows))
    assert {len(rank) for rank in dealt} == {-(-num_rows // (micro_batch * world_size))}
    assert {len(batch) for rank in dealt for batch in rank} <= {micro_batch}
