"""What every rollout backend takes and gives: DeepSpeed's `RolloutEngine` with seeded rows and log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import PreTrainedTokenizerBase

from tristage import dist
from tristage.algo.masking import response_mask
from tristage.engine import generation_mode, parameters_fit
from tristage.errors import UserError


class RolloutError(UserError):
    """What sampling raised on some rank; raised on all of them, so that they can write a checkpoint before they end."""


@dataclass
class SeededRequest(RolloutRequest):
    """A request whose randomness is given: `uniforms` [B, max_new_tokens], see sampling.row_uniforms."""

    uniforms: torch.Tensor


@dataclass
class SampledBatch(RolloutBatch):
    """Sequences, what their tokens were sampled with, and of which weights."""

    logprobs: torch.Tensor  # [B,R] float32, of the whole distribution at the temperature, before top_p and top_k
    entropy: torch.Tensor | None  # [B,R] of the same; None where the backend does not give it
    weights_version: int  # the last `sync_weights`


class RolloutBackend(RolloutEngine):
    """Base of the backends.

    Args:
        engine: the actor's DeepSpeed engine; its module is a `CausalLM`.
        rows_at_once: rows that decode together. Decoding many rows costs little more than decoding a few, so this is
            independent of (and usually larger than) the micro-batch of training.
        gather: under ZeRO-3, "auto" gathers the parameters once for all of a request when they fit in half of the free
            memory, "never" samples with partitioned parameters (slow: all of them travel once a token).
        stop_token_ids: tokens that end a response like the tokenizer's EOS.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows_at_once: int,
        gather: str = "auto",
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.rows_at_once, self.gather = engine, tokenizer, rows_at_once, gather
        self.stop_ids = (int(tokenizer.eos_token_id), *(stop_token_ids or ()))
        self.weights_version = 0

    def sync_weights(self, step: int) -> None:
        """Sample from now on with the engine's weights as they are, after `step` iterations; call it before every
        request that follows a change. Backends that read the training weights need do no more. A collective.
        """
        self.weights_version = step

    def generate(self, request: SeededRequest, sampling: SamplingConfig) -> SampledBatch:
        """[B,P] prompts -> [B,P+R] sequences, R = max_new_tokens, right-padded after each row's first stop id."""
        raise NotImplementedError

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """What any rank raises inside ends the block on every rank with one sentence. A collective.

        A rank that raises inside a collective of the block leaves the others there, for the watchdog to find.

        Raises:
            RolloutError: on every rank.
        """
        problem = None
        try:
            yield
        except Exception as error:
            what = str(error).strip().partition("\n")[0]
            problem = what if isinstance(error, UserError) else f"{type(error).__name__}: {what}"
        problems = dist.gather_objects(problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise RolloutError(f"rollout backend {self.name} failed on rank {rank}: {found}")

    @contextlib.contextmanager
    def weights(self) -> Iterator[bool]:
        """The training weights ready to decode with; yields whether they are whole on this rank. A collective.

        With whole weights ranks need not wait for each other; with partitioned ones they must all run the same number
        of forwards.
        """
        gather = self.gather != "never" and self._fit_when_gathered()
        with generation_mode(self.engine, gather) as whole:
            yield whole

    def _fit_when_gathered(self) -> bool:
        """One answer for all ranks: gather only if the parameters fit everywhere."""
        if self.engine.zero_optimization_stage() != 3:
            return False
        device = next(self.engine.module.parameters()).device
        short = 0.0 if parameters_fit(self.engine, device) else 1.0
        if dist.sum_over_ranks({"short": short}, device)["short"] == 0:
            return True
        dist.print0("rollout: the gathered parameters don't fit in memory; sampling with partitioned ones (slow)")
        return False

    def batch(
        self, request: RolloutRequest, responses: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor | None
    ) -> SampledBatch:
        """Join prompts and what was sampled, each [B,R]; what follows a row's first stop id does not count."""
        mask = response_mask(responses, self.stop_ids)
        responses = responses.masked_fill(~mask, self.tokenizer.pad_token_id)
        rows, columns = request.prompt_ids.shape
        return SampledBatch(
            torch.cat([request.prompt_ids, responses], dim=1),
            torch.cat([request.prompt_attention_mask.bool(), mask], dim=1),
            torch.full((rows,), columns, dtype=torch.long, device=responses.device),
            logprobs.masked_fill(~mask, 0.0),
            None if entropy is None else entropy.masked_fill(~mask, 0.0),
            self.weights_version,
        )
