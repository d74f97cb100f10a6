"""A key-value cache that is allocated once a rollout and written in place: a slot for each row, of its own length."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Keys and values of `slots` rows of at most `columns` tokens; a slot's row occupies columns 0 to its length.

    Before each forward, `prefill` or `decode` says where its keys and values go.
    """

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))  # type: ignore[arg-type]  # a factory does
        self.slots, self.columns = slots, columns
        self.rows: torch.Tensor | None = None  # [n] of a prefill: the prompt that each slot gets; None while decoding
        self.places = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
        self.visible = 0  # columns that decoding looks at

    def prefill(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """The next forward reads whole prompts [m,T]; slots[i] gets a copy of prompt rows[i]."""
        self.rows, self.places = rows, (slots, slots)

    def decode(self, positions: torch.Tensor, visible: int) -> None:
        """The next forward reads one token of each of the first n slots, at column positions[i] of its own."""
        self.rows, self.visible = None, visible
        self.places = (torch.arange(len(positions), device=positions.device), positions)

    def move(self, source: torch.Tensor, target: torch.Tensor, columns: int) -> None:
        """Copy rows from slots `source` to slots `target`, their first `columns` columns."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[target, :, :columns] = stored[source, :, :columns]


class SlotLayer(CacheLayerMixin):
    """One layer of a SlotCache: keys and values [slots, heads, columns, dim]."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros: a column that nothing was written to has weight 0, but 0 * nan would be nan.
        self.keys, self.values = (
            x.new_zeros(self.cache.slots, x.shape[1], self.cache.columns, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states [b,heads,T,dim] -> those that the new tokens attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        slots, positions = self.cache.places
        if self.cache.rows is not None:
            stored[slots, :, : new.shape[2]] = new[self.cache.rows]
            return new
        stored[slots, :, positions] = new.squeeze(2)
        return stored[: len(slots), :, : self.cache.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def get_seq_length(self) -> int:
        return 0  # rows have lengths of their own: positions and mask are always given

    def get_max_length(self) -> int:
        return self.cache.columns
