"""Log-probabilities of given tokens, and entropy, in float32.

Letters: V vocabulary, H hidden size, N rows (the leading dimensions flattened), ... any leading shape.

Nothing is shifted here: logits[...] are those that predict ids[...]. V is 32,000 to 256,000, so [...,V] is
the tensor that runs a card out of memory; `linear_token_logprobs` never holds it whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
    chunk_tokens: int = 1024,
    entropy_grad: bool = False,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """hidden [...,H], weight [V,H], ids [...], bias [V] -> (logprobs [...], entropy [...]), both float32.

    What token_logprobs and entropy give for (hidden @ weight.T + bias) / temperature, in chunks of
    `chunk_tokens` rows. Backward computes a chunk's logits again, so only one chunk's logits live at a time.
    The product is in the dtype of hidden and weight. `weight` is used as it is, never copied or cast, for it
    may be a parameter that ZeRO-3 has gathered. The entropy carries a gradient only if `entropy_grad`;
    with_entropy=False saves the passes over [chunk,V] that it costs and gives nan in its place.
    No rows are allowed and still join hidden and weight to the graph: a rank with nothing to score must run
    backward like the others.
    """

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias).float() / temperature  # [chunk,V]
        found = token_logprobs(logits, ids)
        if not with_entropy:
            return found, torch.full_like(found, torch.nan, requires_grad=False)
        return found, entropy(logits if entropy_grad else logits.detach())

    # Without rows, split gives one chunk of no rows, so that case needs no branch.
    hidden_chunks = torch.split(hidden.reshape(-1, hidden.shape[-1]), chunk_tokens)
    ids_chunks = torch.split(ids.reshape(-1), chunk_tokens)
    recompute = torch.is_grad_enabled() and len(hidden_chunks) > 1
    results: list[tuple[Tensor, Tensor]] = []
    for h, i in zip(hidden_chunks, ids_chunks, strict=True):
        if recompute:  # nothing random happens inside, so no random state is kept
            results.append(
                checkpoint(score, h, weight, i, bias, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            results.append(score(h, weight, i, bias))
    logprobs, entropies = zip(*results, strict=True)
    return torch.cat(logprobs).view(ids.shape), torch.cat(entropies).view(ids.shape)
