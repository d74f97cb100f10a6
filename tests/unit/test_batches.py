"""Batches move as a whole; trimming cuts only what is padding in every row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tristage.batches import PreferenceBatch, PromptBatch, SFTBatch, trim_columns


@pytest.mark.parametrize("batch_type", [SFTBatch, PreferenceBatch, PromptBatch])
def test_to_moves_every_field_and_keeps_the_type(batch_type):
    fields = [field.name for field in dataclasses.fields(batch_type)]
    batch = batch_type(**{name: torch.zeros(2) for name in fields})
    moved = batch.to("meta")
    assert type(moved) is batch_type
    assert [getattr(moved, name).device.type for name in fields] == ["meta"] * len(fields)
    assert batch.input_ids.device.type == "cpu"


def test_batches_are_frozen():
    batch = SFTBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.input_ids = torch.ones(1)


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([[0, 1, 1, 0], [0, 0, 1, 0]], slice(1, 3)),
        ([[1, 1, 0, 0], [1, 0, 0, 0]], slice(0, 2)),
        ([[0, 0, 0, 1], [0, 0, 1, 1]], slice(2, 4)),
        ([[1, 0, 0, 1]], slice(0, 4)),
        ([[0, 0, 0, 0], [0, 1, 0, 0]], slice(1, 2)),
    ],
)
def test_trim_keeps_the_smallest_range_with_all_real_tokens(rows, expected):
    assert trim_columns(torch.tensor(rows, dtype=torch.bool)) == expected
