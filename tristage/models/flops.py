"""Model FLOPs: the arithmetic that a model's matrix products need, as counted by Chowdhery et al. 2022 (PaLM), app. B.

Two differences: attention is counted for the keys that a token sees, which causal kernels need, not for all; and the
output projection for the tokens whose logits are asked for. Recomputed activations do not count, nor do padding and the
sharing of prompts: each row counts as computed once, alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tristage.config import EngineSpec
from tristage.models.sizes import ModelShape, model_shape


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one model's forward, and how many forwards its backward costs."""

    per_token: float  # of the linear layers
    per_pair: float  # of attention, for a query and a key
    per_logits: float  # of the head, for a token whose logits are asked for
    backward: float  # in forwards

    def forward(self, work: Work) -> float:
        return self.per_token * work.tokens + self.per_pair * work.pairs + self.per_logits * work.scored

    def forward_and_backward(self, work: Work) -> float:
        return (1 + self.backward) * self.forward(work)


@dataclass(frozen=True)
class Work:
    """What forwards are made of."""

    rows: float
    tokens: float
    pairs: float  # of a token and one that it sees, itself included
    scored: float  # tokens whose logits are asked for

    @classmethod
    def of(cls, mask: torch.Tensor, scored: torch.Tensor, positions: torch.Tensor | None = None) -> Work:
        """mask [B,T] bool, True on real tokens; scored [B,...] bool; positions [B,T], if rows are packed.

        A row of which nothing is scored is a filler, and no work.
        """
        mask = mask & scored.any(dim=1, keepdim=True)
        positions = mask.long().cumsum(dim=1) - 1 if positions is None else positions
        seen = positions[mask].double() + 1
        return cls(float((seen == 1).sum()), float(len(seen)), float(seen.sum()), float(scored.sum()))


def model_flops(spec: EngineSpec) -> ModelFlops | None:
    """Of an engine's model, from its config; None for a family whose products are not known: without attention, or with
    experts of which a token takes some.

    With adapters the backward has the gradients of activations alone, which cost as much as the forward.
    """
    shape = _shape(spec.path, spec.scalar_head, spec.trust_remote_code)
    if shape is None or shape.experts:
        return None
    backward = 2.0 if spec.lora is None else 1.0
    return ModelFlops(2.0 * shape.linear, 4.0 * shape.layers * shape.query, 2.0 * shape.head, backward)


@functools.cache  # actor and reference often start from one folder
def _shape(path: str, scalar_head: bool, trust_remote_code: bool) -> ModelShape | None:
    try:
        return model_shape(path, scalar_head, None, trust_remote_code)
    except Exception:  # whatever an unusual model raises: a number that informs must not end a run
        return None
