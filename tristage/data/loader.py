"""Which rows are in a step: a pure function of (settings, step), so that resuming needs no saved position.

The rows of optimizer step k depend on the seed and the global batch alone; the number of ranks and the
micro-batch only decide which rank runs them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from tristage.config import BatchPlan
from tristage.errors import UserError

WINDOW_STEPS = 50  # group_by_length: longer windows waste less padding and mix less
# Tokens of an evaluation batch per token of training's largest micro-batch, by device type. A forward alone keeps
# nothing for a backward, so on a GPU more rows fit. On a CPU wider batches are slower: tensors above malloc's limit for
# reuse (32 MiB) take fresh pages at every layer.
WIDTH = {"cpu": 1, "cuda": 4}
FEWEST_BATCHES = 8  # of an evaluation, where training's micro-batch allows, so that this many ranks have one
RowNumbers = list[int | None]  # of a micro-batch; None: a filler that keeps the ranks in step and is not counted


class Loader:
    """Epoch after epoch, each in a fresh order, cut into steps of `plan.global_batch` rows; the last is short.

    `lengths` has the number of tokens of each row: rows of similar length share a micro-batch, to save padding. With
    `group_by_length` they also share a step: each window of 50 steps' rows is sorted, and its steps shuffled.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        plan: BatchPlan,
        rank: int,
        seed: int,
        epochs: float,
        max_steps: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.lengths, self.plan, self.rank, self.seed = np.asarray(lengths), plan, rank, seed
        self.group_by_length = group_by_length
        self._orders: dict[int, np.ndarray] = {}
        # Rounded first: 0.07 epochs of 100 rows are 7 rows, not the 8 that 7.000000000000001 would give.
        self.total_rows = math.ceil(round(epochs * len(lengths), 6))
        self.epochs, self.max_steps = epochs, max_steps
        self.steps_of_epochs = math.ceil(self.total_rows / plan.global_batch)
        self.total_steps = self.steps_of_epochs if max_steps is None else min(self.steps_of_epochs, max_steps)
        if not self.total_steps:
            raise UserError(f"{len(lengths)} rows x {epochs} epochs leave nothing to train on, give more")

    def which_limit(self) -> str:
        """A sentence on which of `epochs` and `max_steps` ends the run, and on the other one."""
        epochs = f"epochs {self.epochs:g} over {len(self.lengths)} rows"
        if self.total_steps < self.steps_of_epochs:
            return f"max_steps ends the run at step {self.total_steps}; {epochs} would be {self.steps_of_epochs} steps"
        unreached = self.max_steps is not None and self.max_steps > self.total_steps
        more = f"; max_steps {self.max_steps} is not reached" if unreached else ""
        return f"{epochs} end the run at step {self.total_steps}{more}"

    def step_rows(self, step: int) -> list[RowNumbers]:
        """This rank's share of step `step` (0-based): `accumulation` lists of `micro_batch` rows."""
        return deal(self.all_rows(step), self.lengths, self.plan, self.rank)

    def all_rows(self, step: int) -> list[int]:
        """All ranks' rows of a step, in drawing order; a row can appear twice in a step that spans two epochs."""
        assert 0 <= step < self.total_steps, f"step {step} of {self.total_steps}"
        start = step * self.plan.global_batch
        stop = min(start + self.plan.global_batch, self.total_rows)
        return [self._row_at(position) for position in range(start, stop)]

    def _row_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.lengths))
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = self._epoch_order(epoch)
        return int(self._orders[epoch][place])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        return self._grouped(order, epoch, rng) if self.group_by_length else order

    def _grouped(self, order: np.ndarray, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """`order` with rows of similar length next to each other, in pieces that are the epoch's steps."""
        batch = self.plan.global_batch
        head = -epoch * len(order) % batch  # rows that complete the step which the epoch before began
        window = WINDOW_STEPS * batch
        windows = [order[start : start + window] for start in range(head, len(order), window)]
        ordered = [rows[np.argsort(-self.lengths[rows], kind="stable")] for rows in windows]
        steps = [rows[start : start + batch] for rows in ordered for start in range(0, len(rows), batch)]
        whole = [step for step in steps if len(step) == batch]
        short = [step for step in steps if len(step) < batch]  # at most one, and last: the next epoch completes it
        return np.concatenate([order[:head], *(whole[i] for i in rng.permutation(len(whole))), *short])


def evaluation_rows(
    lengths: Sequence[int] | np.ndarray, micro_batch: int, world_size: int, rank: int
) -> list[RowNumbers]:
    """Every row exactly once over all ranks, in the same number of micro-batches on each rank."""
    accumulation = math.ceil(len(lengths) / (micro_batch * world_size))
    plan = BatchPlan.make(accumulation * micro_batch * world_size, micro_batch, world_size)
    return deal(list(range(len(lengths))), lengths, plan, rank)


def evaluation_batches(
    lengths: Sequence[int] | np.ndarray, micro_batch: int, world_size: int, rank: int, device_type: str
) -> list[RowNumbers]:
    """`rank`'s batches for forward passes alone: every row exactly once over all ranks, the longest first.

    Which rows share a batch does not depend on the number of ranks. A batch has as many rows as fit WIDTH times the
    tokens of `micro_batch` rows of the longest, fewer where the set is small. Fillers complete the last round: all
    ranks run the same number of forwards. On a CPU, micro_batch 1, lengths 9 9 1 1 ...: [9] [9] [1 x 9] [1 x 9] ...
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return []
    narrow = micro_batch * int(lengths.max())
    tokens = min(max(narrow, int(lengths.sum()) // FEWEST_BATCHES), WIDTH[device_type] * narrow)
    batches = _cut(np.argsort(-lengths, kind="stable").tolist(), lengths, tokens)
    rounds = math.ceil(len(batches) / world_size)
    fillers: list[RowNumbers] = [[None]] * (rounds * world_size - len(batches))
    return [*batches, *fillers][rank::world_size]


def _cut(rows: list[int], lengths: np.ndarray, tokens: int) -> list[RowNumbers]:
    """`rows`, longest first, in batches of at most `tokens` tokens when padded to their longest."""
    batches: list[RowNumbers] = []
    while rows:
        count = max(1, tokens // max(1, int(lengths[rows[0]])))
        batches.append([*rows[:count]])
        rows = rows[count:]
    return batches


def deal(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, plan: BatchPlan, rank: int, together: int = 1
) -> list[RowNumbers]:
    """`rank`'s micro-batches of one step's `rows`, which may be fewer than the plan's (fillers complete them).

    Sorted, longest first (so that out-of-memory shows on the first micro-batch), and each dealt to the rank with the
    fewest tokens that has room (Graham 1969): micro_batch 2, 2 ranks, lengths 9 8 7 6 5 4 3:
    rank 0: [9 6] [5 None]   rank 1: [8 7] [4 3]

    Each `together` rows that follow each other in `rows` stay on one rank; they must divide its share.
    """
    own = [row for unit in _shares(rows, lengths, plan, together)[rank] for row in unit]
    return [own[start : start + plan.micro_batch] for start in range(0, len(own), plan.micro_batch)]


def deal_tokens(
    rows: Sequence[int],
    lengths: Sequence[int] | np.ndarray,
    plan: BatchPlan,
    rank: int,
    tokens: int,
    together: int = 1,
) -> list[list[int]]:
    """As `deal` of as many rows as the plan has, with as many in a micro-batch as fit `tokens`, but at least one; each
    rank has as many micro-batches.
    """
    dealt = _shares(rows, lengths, plan, together)
    shares = [[row for unit in share for row in unit if row is not None] for share in dealt]
    needed = [len(fill(share, lengths, tokens)) for share in shares]
    return fill(shares[rank], lengths, tokens, at_least=max(needed))


def fill(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, tokens: int, at_least: int = 1
) -> list[list[int]]:
    """`rows` in their order, in micro-batches of at most `tokens` unless one row has more; `at_least` so many."""
    filled: list[list[int]] = []
    left = 0
    for row in rows:
        if not filled or lengths[row] > left:
            filled.append([])
            left = tokens
        filled[-1].append(row)
        left -= int(lengths[row])
    while len(filled) < at_least:  # the most rows are halved: there are as many rows as micro-batches, or more
        place = max(range(len(filled)), key=lambda i: len(filled[i]))
        half = len(filled[place]) // 2
        filled[place : place + 1] = [filled[place][:half], filled[place][half:]]
    return filled


def _shares(
    rows: Sequence[int], lengths: Sequence[int] | np.ndarray, plan: BatchPlan, together: int
) -> list[list[RowNumbers]]:
    """Each rank's units of `together` rows, the longest first."""
    real = [rows[start : start + together] for start in range(0, len(rows), together)]
    real.sort(key=lambda unit: (-sum(int(lengths[row]) for row in unit), unit[0]))
    units: list[RowNumbers] = [[*unit] for unit in real]
    units += [[None] * together] * (plan.global_batch // together - len(units))
    room, remainder = divmod(len(units), plan.world_size)
    assert not remainder, f"{len(units)} units of {together} rows on {plan.world_size} ranks"
    shares: list[list[RowNumbers]] = [[] for _ in range(plan.world_size)]
    fewest = [(0, rank) for rank in range(plan.world_size)]  # a heap of (tokens, rank) of the ranks with room
    for unit in units:
        tokens, rank = heapq.heappop(fewest)
        shares[rank].append(unit)
        if len(shares[rank]) < room:
            heapq.heappush(fewest, (tokens + sum(int(lengths[row]) for row in unit if row is not None), rank))
    return shares
