"""Log-probabilities of given tokens, and entropy, in float32.

Letters: V vocabulary, H hidden size, N rows (the leading dimensions flattened), ... any leading shape.

Nothing is shifted here: logits[...] are those that predict ids[...]. V is 32,000 to 256,000, so [...,V] is
the tensor that runs a card out of memory; `linear_token_logprobs` holds a chunk of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = -1000.0  # of a log-probability: its exp is 0 in any precision, and 0 times it is 0, not nan as with -inf


class LogitLimits(NamedTuple):
    """Bytes that linear_token_logprobs may take."""

    chunk: int  # logits that exist at a time, in the dtype of hidden and weight
    block: int  # float32 copy that is worked on at a time: what a core's cache holds; enough to keep a GPU busy


ON_CPU, ON_GPU = LogitLimits(2**27, 2**20), LogitLimits(2**29, 2**25)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """logits [...,V], ids [...] -> [...] float32: log softmax(logits) at ids.

    Gather minus logsumexp: a log_softmax would allocate, and keep for backward, one more [...,V].
    """
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """logits [...,V] -> [...] float32: -sum p log p over the whole vocabulary, exact."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    # A token with logit -inf has p = 0 and contributes 0, but 0 * -inf is nan: hence the floor.
    floored = logprobs.clamp(min=torch.finfo(torch.float32).min)
    return -(logprobs.exp() * floored).sum(dim=-1)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    limits: LogitLimits | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [...,H], weight [V,H], ids [...], bias [V] -> (logprobs [...], entropy [...]), both float32.

    What token_logprobs and entropy give for (hidden @ weight.T + bias) / temperature, in chunks within `limits` (the
    device's, if None). Backward finds the last chunk's logits kept and computes those of the others again: nothing is
    computed twice where one chunk holds all. The product is in the dtype of hidden and weight. `weight` is used as it
    is, never copied or cast, for it may be a parameter that ZeRO-3 has gathered. with_entropy=False saves the passes
    over the logits that the entropy costs and gives nan in its place.
    No rows are allowed and still join hidden and weight to the graph: a rank with nothing to score must run
    backward like the others.
    """
    rows, learns = hidden.reshape(-1, hidden.shape[-1]), torch.is_grad_enabled()
    limits = limits or (ON_CPU if hidden.device.type == "cpu" else ON_GPU)
    apply: Any = _LinearTokenLogprobs.apply
    logprobs, entropies = apply(rows, weight, bias, ids.reshape(-1), temperature, with_entropy, limits, learns)
    return logprobs.float().view(ids.shape), entropies.float().view(ids.shape)


def chunk_rows(rows: int, row_bytes: int, limit: int) -> int:
    """Rows per chunk: the fewest chunks of at most `limit` bytes (or of one row), all of about the same size."""
    chunks = -(-rows // max(limit // row_bytes, 1))
    return -(-rows // chunks) if chunks else 1


class _LinearTokenLogprobs(torch.autograd.Function):
    """linear_token_logprobs of hidden [N,H] and ids [N]; float64 stays float64."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
        limits: LogitLimits,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies = (hidden.new_full((len(hidden),), torch.nan, dtype=dtype) for _ in range(2))
        for part in _chunks(hidden, weight, limits):
            ctx.logits = None  # frees those of the chunk before
            ctx.logits = F.linear(hidden[part], weight, bias)
            for block in _blocks(ctx.logits, limits):
                of_entropy = entropies[part][block] if with_entropy else None
                _score(ctx.logits[block], ids[part][block], temperature, logprobs[part][block], of_entropy)
        ctx.logits = ctx.logits if learns else None
        ctx.save_for_backward(hidden, weight, bias, ids, entropies)
        ctx.temperature, ctx.limits = temperature, limits
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, entropies = ctx.saved_tensors
        sums = [
            torch.zeros_like(x) if wanted else None
            for x, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        logits, ctx.logits = ctx.logits, None  # overwritten below: a second backward computes them again
        for part in reversed(_chunks(hidden, weight, ctx.limits)):
            logits = F.linear(hidden[part], weight, bias) if logits is None else logits
            for block in _blocks(logits, ctx.limits):
                upstream = [None if x is None else x[part][block] for x in grads]
                _differentiate(logits[block], ids[part][block], entropies[part][block], ctx.temperature, *upstream)
            _add_products(sums, logits, hidden, weight, part)
            logits = None
        return *sums, None, None, None, None, None


def _add_products(sums: list[Tensor | None], gradient: Tensor, hidden: Tensor, weight: Tensor, part: slice) -> None:
    """Add what the gradient [n,V] at the logits of `part` of hidden gives to those of hidden, weight and bias."""
    of_hidden, of_weight, of_bias = sums
    if of_hidden is not None:
        torch.mm(gradient, weight, out=of_hidden[part])
    if of_weight is not None:
        of_weight.addmm_(gradient.t(), hidden[part])
    if of_bias is not None:
        of_bias.add_(gradient.sum(dim=0))


def _chunks(hidden: Tensor, weight: Tensor, limits: LogitLimits) -> list[slice]:
    """Rows of hidden [N,H] whose logits exist at a time."""
    row_bytes = weight.shape[0] * weight.element_size()
    return _slices(len(hidden), chunk_rows(len(hidden), row_bytes, limits.chunk))


def _blocks(logits: Tensor, limits: LogitLimits) -> list[slice]:
    """Rows of logits [n,V] that are worked on at a time."""
    return _slices(len(logits), chunk_rows(len(logits), 4 * logits.shape[1], limits.block))


def _slices(rows: int, size: int) -> list[slice]:
    """At least one, which may be empty."""
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits [n,V] -> [n,V] at `temperature`, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def _score(logits: Tensor, ids: Tensor, temperature: float, chosen: Tensor, entropy: Tensor | None) -> None:
    """logits [n,V], ids [n]: write the log-probabilities into `chosen` [n], and the entropy into `entropy` [n].

    A result of each block's own would lie in what the block before has freed, and the heap would grow by every block.
    """
    logprobs = _scaled(logits, temperature).log_softmax(dim=1)
    chosen.copy_(logprobs.gather(1, ids[:, None])[:, 0])
    if entropy is not None:
        entropy.copy_(logprobs.exp().mul_(logprobs.clamp_(min=LOWEST)).sum(dim=1).neg_())


def _differentiate(
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    temperature: float,
    of_logprobs: Tensor | None,
    of_entropy: Tensor | None,
) -> None:
    """Overwrite logits [n,V] with the gradient at them, from the gradients [n] at what _score gave; None is 0.

    With p = softmax it is (of_logprobs (1[id] - p) - of_entropy p (log p + entropy)) / temperature.
    """
    scaled = _scaled(logits, temperature)
    of_logprobs = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs / temperature
    if of_entropy is None:
        gradient = scaled.softmax(dim=1).mul_(-of_logprobs[:, None])
    else:
        logprobs = scaled.log_softmax(dim=1)
        p, of_entropy = logprobs.exp(), of_entropy / temperature
        gradient = logprobs.clamp_(min=LOWEST).add_(entropy[:, None]).mul_(-of_entropy[:, None])
        gradient.sub_(of_logprobs[:, None]).mul_(p)
    logits.copy_(gradient.scatter_add_(1, ids[:, None], of_logprobs[:, None]))
