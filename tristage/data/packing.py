"""Several short rows in one sequence: examples packed for SFT, documents cut into blocks for the pretraining mix."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from tristage.data.store import Rows
from tristage.data.tokenize import Example

_OPEN_PACKS = 1024  # more fill a little better; fewer keep the rows of a pack closer in the shuffled order


class PackedRows(Sequence[list[Example]]):
    """Rows of a set in sequences of at most `capacity` tokens. Each row is in one; a seed decides which."""

    def __init__(self, rows: Rows, capacity: int, seed: int) -> None:
        self.rows, self.packs = rows, pack(rows.lengths, capacity, seed)
        self.lengths = np.array([int(rows.lengths[members].sum()) for members in self.packs])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, i: int) -> list[Example]:  # type: ignore[override]
        return [self.rows[int(row)] for row in self.packs[i]]  # type: ignore[misc]  # SFT rows are Examples

    def where(self, i: int) -> str:
        return ", ".join(self.rows.where(int(row)) for row in self.packs[i])


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Rows dealt into packs of at most `capacity` tokens: in a seeded order, each to the fullest pack that takes it.

    Best fit (Johnson et al. 1974), but with a bounded number of packs open.
    """
    lengths = np.asarray(lengths)
    assert len(lengths) == 0 or lengths.max() <= capacity, f"a row of {lengths.max()} tokens in packs of {capacity}"
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack) of the open packs, sorted
    for row in np.random.default_rng([seed, len(lengths)]).permutation(len(lengths)).tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, index = room.pop(place)
        else:
            left, index = capacity, len(packs)
            packs.append([])
        packs[index].append(row)
        if left > length:
            bisect.insort(room, (left - length, index))
        if len(room) > _OPEN_PACKS:
            room.pop(0)
    return [np.array(members) for members in packs]


class Blocks(Sequence[Example]):
    """Documents joined end to end (an EOS after each) and cut into blocks of `block_tokens`; the last may be shorter.

    Every token is in exactly one block and is trained on, but for the first of each block, which nothing precedes.
    """

    def __init__(self, documents: Rows, block_tokens: int) -> None:
        self.documents, self.block_tokens = documents, block_tokens
        self._ends = np.cumsum(documents.lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(documents) else 0

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_tokens)

    @property
    def lengths(self) -> np.ndarray:
        """[blocks] tokens of each."""
        return np.diff(np.append(np.arange(len(self)) * self.block_tokens, self.num_tokens))

    def __getitem__(self, i: int) -> Example:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, stop = i * self.block_tokens, min((i + 1) * self.block_tokens, self.num_tokens)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        ids: list[int] = []
        for document in range(first, last + 1):
            before = int(self._ends[document - 1]) if document else 0
            ids += self.documents.tokens(document, max(start - before, 0), stop - before)
        return Example(ids, prompt_length=0)
