"""Sampling by inverse transform: one uniform number decides one token of one row.

The numbers of a row depend on (seed, iteration, row) alone, so a prompt gets the same response whatever rank,
batch or padding it was sampled in, and a resumed run samples what the interrupted one would have.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def row_uniforms(seed: int, iteration: int, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Uniform numbers in [0,1), float64 [B, num_tokens], row b's from (seed, iteration, rows[b]); -1 is a filler."""
    drawn = [np.random.default_rng([seed, iteration, int(row) + 1]).random(num_tokens) for row in rows]
    return torch.from_numpy(np.stack(drawn))


class InverseTransformSampler(LogitsProcessor):
    """Turns logits [B,V] into a one-hot choice, so that transformers' greedy decoding loop samples.

    Token v of row b is chosen when its interval of the cumulative distribution, after temperature, top-k and
    top-p, holds the row's uniform number of this position.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0):
        self.uniforms = uniforms
        self.position = 0
        self.warpers: list[LogitsProcessor] = []
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        cumulative = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        # The last interval ends at the sum itself, so rounding cannot leave a number without a token.
        target = self.uniforms[:, self.position].to(cumulative.device) * cumulative[:, -1]
        chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.clamp(max=scores.shape[1] - 1), 0.0)
