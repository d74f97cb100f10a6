"""Sampling by inverse transform: one uniform number decides one token of one row.

The numbers of a row depend on (seed, iteration, row) alone, so a prompt gets the same response whatever rank,
batch or padding it was sampled in, and a resumed run samples what the interrupted one would have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from deepspeed.runtime.rollout import SamplingConfig
from torch.nn import functional as F
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

BLOCK = 32  # neighbouring tokens whose probabilities are added up first


class Choice(NamedTuple):
    """One token for each row, and what the distribution at the temperature says of it."""

    tokens: torch.Tensor  # [B] long
    logprobs: torch.Tensor  # [B] float32, before top_p and top_k
    entropy: torch.Tensor  # [B] float32


def row_uniforms(seed: int, iteration: int, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Uniform numbers in [0,1), float64 [B, num_tokens], row b's from (seed, iteration, rows[b]); -1 is a filler."""
    drawn = [np.random.default_rng([seed, iteration, int(row) + 1]).random(num_tokens) for row in rows]
    return torch.from_numpy(np.stack(drawn))


def choose(logits: torch.Tensor, uniforms: torch.Tensor, sampling: SamplingConfig) -> Choice:
    """logits [B,V], uniforms [B] float64 -> the token whose interval of the cumulative distribution holds the number.

    Exponentials are float32 and sums float64, so that no interval of a large vocabulary is lost to rounding.
    """
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    top = logits.amax(dim=-1, keepdim=True)
    weights = (logits - top).exp_()
    blocks = _block_sums(weights)
    total = blocks.sum(dim=-1)
    entropy = total.log() - ((logits - top).clamp_(min=-1e30).mul_(weights)).sum(dim=-1) / total
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        weights = weights * _kept(logits, sampling)
        blocks = _block_sums(weights)
    tokens = _invert(weights, blocks, uniforms)
    logprobs = (logits.gather(1, tokens[:, None]) - top).squeeze(1) - total.log()
    return Choice(tokens, logprobs.float(), entropy.float())


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """[B,V] -> [B, blocks] float64."""
    rows, width = weights.shape
    padded = F.pad(weights, (0, -width % BLOCK)) if width % BLOCK else weights
    return padded.view(rows, -1, BLOCK).sum(dim=-1, dtype=torch.float64)


def _kept(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """[B,V] bool: the tokens that top_k and, of those, top_p leave."""
    nothing = logits.new_empty(0)
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(nothing, logits)
    if sampling.top_p < 1.0:
        logits = TopPLogitsWarper(sampling.top_p)(nothing, logits)
    return logits > -torch.inf


def _invert(weights: torch.Tensor, blocks: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """weights [B,V], their block sums, uniforms [B] -> [B], the token: first its block, then its place there."""
    ends = blocks.cumsum(dim=-1)
    target = _below(uniforms.to(ends.device) * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, target[:, None], right=True)  # [B,1]; never past the end: target < the last
    before = ends.gather(1, block) - blocks.gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = weights.gather(1, places.clamp(max=weights.shape[1] - 1)).double()
    inside = inside.masked_fill_(places >= weights.shape[1], 0.0).cumsum(dim=-1)
    rest = _below((target[:, None] - before).clamp(min=0.0), inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(1)


def _below(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """x, or the largest number below `limit`: rounding must not leave a number without a token."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))


class InverseTransformSampler(LogitsProcessor):
    """Turns logits [B,V] into a one-hot choice, so that transformers' greedy decoding loop samples; keeps a record.

    Token v of row b is chosen when its interval of the cumulative distribution, after temperature, top-k and
    top-p, holds the row's uniform number of this position.
    """

    def __init__(self, uniforms: torch.Tensor, sampling: SamplingConfig) -> None:
        self.uniforms, self.sampling = uniforms, sampling
        self.choices: list[Choice] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choice = choose(scores, self.uniforms[:, len(self.choices)], self.sampling)
        self.choices.append(choice)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice.tokens[:, None], 0.0)

    def recorded(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(log-probabilities, entropies), each [B] for every token that was sampled."""
        return [choice.logprobs for choice in self.choices], [choice.entropy for choice in self.choices]
