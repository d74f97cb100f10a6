"""Ids to tensors: one micro-batch, padded to its own longest row, with masks made from lengths.

A filler (None) keeps every rank at the same number of forwards when rows run out. It repeats the first real
row, or is one pad token when the micro-batch has none, so a model can run on it; its loss_mask or is_real is
False, so it counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from tristage.batches import PreferenceBatch, PromptBatch, SFTBatch
from tristage.data.rows import Turn
from tristage.data.tokenize import Example, RankedExamples

Item = TypeVar("Item")


def pick(items: Sequence[Item], rows: Sequence[int | None]) -> list[Item | None]:
    """The items of one micro-batch of the loader; a filler stays None."""
    return [None if row is None else items[row] for row in rows]


def collate_sft(examples: Sequence[Example | None], pad_id: int) -> SFTBatch:
    """Right padded; the loss mask is True on answers with their EOS (and where else `also_trained` says)."""
    filled = _fill(examples, Example([pad_id], prompt_length=1))
    input_ids, attention_mask = _pad([example.ids for example in filled], pad_id)
    loss_mask, _ = _pad([_trained(example) for example in filled], 0)
    return SFTBatch(input_ids, attention_mask, loss_mask.bool() & _is_real(examples)[:, None])


def collate_packed(packs: Sequence[Sequence[Example] | None], pad_id: int) -> SFTBatch:
    """As collate_sft, with several examples in a row: positions start again at each, which keeps attention inside.

    Two examples of 3 and 2 tokens in 6 columns have positions 0 1 2 0 1 0.
    """
    filled = _fill(packs, [Example([pad_id], prompt_length=1)])
    input_ids, attention_mask = _pad([[token for example in pack for token in example.ids] for pack in filled], pad_id)
    loss_mask, _ = _pad([[place for example in pack for place in _trained(example)] for pack in filled], 0)
    position_ids, _ = _pad([[place for example in pack for place in range(len(example.ids))] for pack in filled], 0)
    return SFTBatch(input_ids, attention_mask, loss_mask.bool() & _is_real(packs)[:, None], position_ids)


def _trained(example: Example) -> list[int]:
    """1 on each token that SFT learns. A row's first token has nothing before it to be predicted from."""
    learned = _answered(example)
    for start, stop in example.also_trained:
        learned[start:stop] = [1] * (stop - start)
    return [0, *learned[1:]]


def _answered(example: Example) -> list[int]:
    """1 on each token of the answer, its EOS included."""
    return [0] * example.prompt_length + [1] * (len(example.ids) - example.prompt_length)


def collate_ranking(items: Sequence[RankedExamples | None], pad_id: int) -> PreferenceBatch:
    """All answers of all prompts, one per row, right padded; K may differ by prompt."""
    pad_answer = Example([pad_id], prompt_length=1)
    filled = _fill(items, ([pad_answer, pad_answer], (0.0, 1.0)))
    answers = [example for examples, _ in filled for example in examples]
    input_ids, attention_mask = _pad([example.ids for example in answers], pad_id)
    answer_mask, _ = _pad([_answered(example) for example in answers], 0)
    prompt_index = [index for index, (examples, _) in enumerate(filled) for _ in examples]
    ranks = [rank for _, ranks in filled for rank in ranks]
    return PreferenceBatch(
        input_ids,
        attention_mask,
        answer_mask.bool(),
        torch.tensor(prompt_index),
        torch.tensor(ranks, dtype=torch.float32),
        _is_real(items),
    )


def collate_prompts(
    examples: Sequence[Example | None],
    draws: Sequence[int | None],
    pad_id: int,
    width: int | None = None,
    turns: Sequence[Sequence[Turn] | None] | None = None,
    labels: Sequence[dict[str, Any]] | None = None,
) -> PromptBatch:
    """`draws` number the responses of an iteration over all ranks: they decide the random numbers and the order.

    `width` sets the number of columns where ranks must agree on it; without it the longest prompt does.
    """
    filled = _fill(examples, Example([pad_id], prompt_length=1))
    # Left padding is right padding in a mirror.
    input_ids, attention_mask = _pad([example.ids[::-1] for example in filled], pad_id, width)
    draw_index = torch.tensor([-1 if draw is None else draw for draw in draws])
    return PromptBatch(input_ids.flip(1), attention_mask.flip(1), draw_index, _is_real(examples), turns, labels)


def _fill(items: Sequence[Item | None], empty: Item) -> list[Item]:
    filler = next((item for item in items if item is not None), empty)
    return [filler if item is None else item for item in items]


def _is_real(items: Sequence[object | None]) -> torch.Tensor:
    return torch.tensor([item is not None for item in items])


def _pad(rows: list[list[int]], pad_id: int, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B,T] long and attention mask [B,T] bool."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    width = longest if width is None else width
    assert longest <= width, f"a row of {longest} tokens in {width} columns"
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return input_ids, torch.arange(width) < lengths[:, None]
