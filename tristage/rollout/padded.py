"""The default backend: transformers' `generate` on left-padded prompts, many rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from tristage import dist
from tristage.algo.masking import response_mask
from tristage.batches import trim_columns
from tristage.engine import generation_mode, parameters_fit
from tristage.rollout.sampling import InverseTransformSampler


@dataclass
class SeededRequest(RolloutRequest):
    """A request whose randomness is given: `uniforms` [B, max_new_tokens], see sampling.row_uniforms."""

    uniforms: torch.Tensor


class PaddedRollout(RolloutEngine):
    """Samples with the training weights in place; under ZeRO-3 they are gathered once for all of a request.

    Args:
        rows_at_once: rows of one `generate` call. Decoding many rows costs little more than decoding a few, so
            this is independent of (and usually larger than) the micro-batch of training.
        gather: "auto" gathers when the parameters fit in half of the free memory, "never" samples with
            partitioned parameters (slow: all of them travel once a token).
        stop_token_ids: tokens that end a response like the tokenizer's EOS.
    """

    name = "padded"

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows_at_once: int,
        gather: str = "auto",
        stop_token_ids: Sequence[int] | None = None,
    ):
        self.engine, self.tokenizer, self.rows_at_once, self.gather = engine, tokenizer, rows_at_once, gather
        self.stop_ids = (int(tokenizer.eos_token_id), *(stop_token_ids or ()))

    def sync_weights(self, step: int) -> None:
        """Nothing to do: rollouts use the training weights themselves."""

    @torch.no_grad()
    def generate(self, request: SeededRequest, sampling: SamplingConfig) -> RolloutBatch:
        """[B,P] prompts -> [B,P+R] sequences, R = max_new_tokens, right-padded after each row's first stop id."""
        gather = self._agree_to_gather()
        prompt_mask = request.prompt_attention_mask.bool()
        # Prompts of similar length share a call: fewer padding columns to attend to.
        order = prompt_mask.sum(dim=1).argsort(descending=True, stable=True)
        responses = torch.empty(len(order), sampling.max_new_tokens, dtype=torch.long, device=order.device)
        with generation_mode(self.engine, gather) as whole:
            for rows in order.split(self.rows_at_once):
                columns = trim_columns(prompt_mask[rows])
                responses[rows] = self._generate_rows(
                    request.prompt_ids[rows][:, columns], prompt_mask[rows][:, columns],
                    request.uniforms[rows.cpu()], sampling, ranks_in_step=not whole,
                )  # fmt: skip
        mask = response_mask(responses, self.stop_ids)
        responses = responses.masked_fill(~mask, self.tokenizer.pad_token_id)
        start = torch.full((len(order),), prompt_mask.shape[1], dtype=torch.long, device=order.device)
        return RolloutBatch(
            torch.cat([request.prompt_ids, responses], dim=1), torch.cat([prompt_mask, mask], dim=1), start
        )

    def _agree_to_gather(self) -> bool:
        """One answer for all ranks: gather only if the parameters fit everywhere."""
        if self.gather == "never" or self.engine.zero_optimization_stage() != 3:
            return False
        device = next(self.engine.module.parameters()).device
        short = 0.0 if parameters_fit(self.engine, device) else 1.0
        if dist.sum_over_ranks({"short": short}, device)["short"] == 0:
            return True
        dist.print0("rollout: the gathered parameters don't fit in memory; sampling with partitioned ones (slow)")
        return False

    def _generate_rows(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        uniforms: torch.Tensor,
        sampling: SamplingConfig,
        ranks_in_step: bool,
    ) -> torch.Tensor:
        """ids, mask [b,P] left padded -> responses [b, max_new_tokens]; what follows a stop id is not defined."""
        model = self.engine.module.model
        own_config, model.generation_config = model.generation_config, GenerationConfig()
        try:
            # A complete config of our own: a model folder's defaults (top_k 50, penalties) must not leak in.
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(self.stop_ids),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
            )
            sampler = InverseTransformSampler(uniforms, sampling.temperature, sampling.top_p, max(sampling.top_k, 0))
            sequences = model.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                synced_gpus=ranks_in_step and dist.world_size() > 1,
            )
        finally:
            model.generation_config = own_config
        found = sequences[:, ids.shape[1] :]
        return F.pad(found, (0, sampling.max_new_tokens - found.shape[1]), value=self.tokenizer.pad_token_id)
