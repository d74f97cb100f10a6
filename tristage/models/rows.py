"""Rows laid end to end in one sequence, so that a forward computes no padding, and what rows share only once.

A forward of [B,T] rows becomes one of [1,N] tokens, N the real ones, whose positions count from each row's start. Only
attention needs the rows: there queries, keys and values are gathered into S right-padded rows of L columns, where the
causal mask alone keeps padding unseen, and the result is laid end to end again. Rows that begin with the same tokens
(answers to one prompt) hold these once: each row gathers them from the first.

The index for gathering reaches every layer as its attention mask: transformers hands a four-dimensional mask to the
attention function unchanged, through activation checkpointing too, and the function registered here as "sdpa" knows it
by its dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tristage.models.loading import backbone_inputs, takes_positions

SHARED_TOKENS = 8  # fewer in common are computed in each row
WORTHWHILE = 0.9  # share of [B,T] that is left to compute: above it, gathering costs more than it saves


@dataclass(frozen=True, eq=False)
class Rows:
    """[B,T] rows as a forward takes them, and how to find what it gives for each."""

    inputs: dict[str, Any]  # of the model's forward
    mask: torch.Tensor  # [B,T] bool
    place: torch.Tensor | None = None  # [B,T] long: of each real token among the N; None where rows stay as they are

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> Rows:
        """Rows padded on either side. With `position_ids` [B,T] a row holds several examples, each starting at 0, that
        do not see each other.
        """
        mask = attention_mask.bool()
        if (flat := lay_out(model, input_ids, mask, position_ids)) is None:
            return cls(backbone_inputs(model.base_model, input_ids, attention_mask, position_ids), mask)
        inputs = {"input_ids": flat.ids, "position_ids": flat.positions, "attention_mask": flat.layout}
        return cls(inputs | {"use_cache": False}, mask, flat.place)

    def select(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """states [1,N,...] or [B,T,...], wanted [B,T-1] -> [n,...] of the tokens before those that are wanted."""
        if self.place is None:
            return states[:, :-1][wanted]
        return states[0].index_select(0, self.place[:, :-1][wanted])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """values [1,N] or [B,T] -> [B,T]; rows that were laid end to end have 0 at padding."""
        if self.place is None:
            return values
        return values[0].index_select(0, self.place.reshape(-1)).view_as(self.place).masked_fill(~self.mask, 0.0)


@dataclass(frozen=True, eq=False)
class FlatRows:
    """N tokens that stand for [B,T] rows."""

    ids: torch.Tensor  # [1,N]
    positions: torch.Tensor  # [1,N]
    layout: torch.Tensor  # [1,1 or 2,S,L+W] long: where columns come from, and in W = N/S where tokens go; 2: shared
    place: torch.Tensor  # [B,T] long: of each real token among the N; 0 at padding


def unknown_attention(model: Any, tokens: int) -> str | None:
    """Why a model's rows cannot be told apart by an attention function of ours, as the end of a sentence; None if not.

    They can in families whose layers all attend to the whole row, of at most `tokens`, through transformers' interface.
    """
    config = model.config.get_text_config()
    if not takes_positions(model):
        return "it takes no position_ids"
    if not model._supports_attention_backend or model._is_stateful:
        return "its layers do not attend through transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    slides = kinds != {"full_attention"} or not hasattr(config, "layer_types")
    if slides and window is not None and window < tokens and getattr(config, "use_sliding_window", True):
        return f"its attention slides over {window} tokens, and a row has up to {tokens}"
    return None


def lay_out(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> FlatRows | None:
    """The rows of `Rows.of` end to end; None where the model does not know it or it does not pay."""
    if model.config._attn_implementation != "sdpa" or unknown_attention(model, input_ids.shape[1]) is not None:
        return None
    positions = None if position_ids is None else position_ids.cpu().numpy()
    rows = list(_examples(attention_mask.bool().cpu().numpy(), positions))
    ids = input_ids.cpu().numpy()
    tokens = [tuple(ids[row, columns].tolist()) for row, columns in rows]
    shared = share_beginnings(tokens)
    length = sum(len(own) - common for own, (_, common) in zip(tokens, shared, strict=True))
    longest = max(map(len, tokens))
    if position_ids is None and length > WORTHWHILE * ids.size:
        return None
    flat, place = np.empty((2, length), dtype=np.int64), np.zeros(ids.shape, dtype=np.int64)
    pad = np.zeros((len(rows), longest), dtype=np.int64)
    unpad = np.zeros(len(rows) * -(-length // len(rows)), dtype=np.int64)
    end = 0
    for number in sorted(range(len(rows)), key=lambda number: shared[number][0] != number):  # leaders first
        (row, columns), own, (leader, common) = rows[number], tokens[number], shared[number]
        start, end = end, end + len(own) - common
        pad[number, :common] = pad[leader, :common]
        pad[number, common : len(own)] = np.arange(start, end)
        place[row, columns] = pad[number, : len(own)]
        unpad[start:end] = number * longest + np.arange(common, len(own))
        flat[:, start:end] = own[common:], np.arange(common, len(own))
    kinds = 2 if any(common for _, common in shared) else 1
    layout = np.concatenate([pad, unpad.reshape(len(rows), -1)], axis=1)[None, None].repeat(kinds, axis=1)
    device = input_ids.device
    moved = (torch.from_numpy(x).to(device) for x in (flat[:1], flat[1:], layout, place))
    return FlatRows(*moved)


def _examples(mask: np.ndarray, positions: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """(row, columns) of every example."""
    for row in range(len(mask)):
        columns = np.flatnonzero(mask[row])
        starts: Any = [] if positions is None else np.flatnonzero(positions[row, columns] == 0)[1:]
        for part in np.split(columns, starts):
            yield row, part


def share_beginnings(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(leader, tokens in common) of each row: the row itself and 0, or another whose first tokens it shares.

    In sorted order a row joins the leader before it, unless it has more than twice as much in common with the row after
    it: then two rows that share that much are the better pair.
    """
    found = [(number, 0) for number in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda number: rows[number])
    leader = order[0]
    for number, after in itertools.zip_longest(order[1:], order[2:]):
        common = _in_common(rows[leader], rows[number])
        next_common = 0 if after is None else _in_common(rows[number], rows[after])
        if common >= SHARED_TOKENS and 2 * common >= next_common:
            found[number] = (leader, common)
        else:
            leader = number
    return found


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two rows begin with."""
    if one[:SHARED_TOKENS] != other[:SHARED_TOKENS]:
        return 0
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class _Gather(torch.autograd.Function):
    """x [N,...], pad [S,L], unpad [N] -> x[pad] [S,L,...]; backward needs no scatter where no token is in two rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pad: torch.Tensor, unpad: torch.Tensor, shared: bool) -> torch.Tensor:
        ctx.save_for_backward(pad, unpad)
        ctx.shared = shared
        return x.index_select(0, pad.reshape(-1)).view(*pad.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pad, unpad = ctx.saved_tensors
        grad = grads[0].reshape(pad.numel(), *grads[0].shape[2:])
        if not ctx.shared:  # nothing reaches padding: no real token sees it
            return grad.index_select(0, unpad), None, None, None
        sums = grad.new_zeros(len(unpad), *grad.shape[1:])
        return sums.index_add_(0, pad.reshape(-1), grad), None, None, None


class _Scatter(torch.autograd.Function):
    """x [S*L,...], unpad [N] -> x[unpad] [N,...], each at most once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unpad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpad)
        ctx.rows = len(x)
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (unpad,) = ctx.saved_tensors
        grad = grads[0].new_zeros(ctx.rows, *grads[0].shape[1:])
        return grad.index_copy_(0, unpad, grads[0]), None


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa_attention_forward, but for a mask that is a layout: then each row attends to itself.

    query [1,heads,N,dim], key and value [1,key heads,N,dim] -> [1,N,heads,dim].
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tokens, rows = query.shape[2], attention_mask.shape[2]
    longest = attention_mask.shape[3] - -(-tokens // rows)
    pad, unpad = attention_mask[0, 0, :, :longest], attention_mask[0, 0, :, longest:].reshape(-1)[:tokens]
    shared = attention_mask.shape[1] == 2
    gathered = [_Gather.apply(x[0].transpose(0, 1), pad, unpad, shared).transpose(1, 2) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        gathered[1:] = [x.repeat_interleave(groups, dim=1) for x in gathered[1:]]
    q, k, v = gathered
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
    return _Scatter.apply(found.transpose(1, 2).flatten(0, 1), unpad)[None], None


AttentionInterface.register("sdpa", attend)
