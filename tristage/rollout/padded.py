"""The plainest backend: transformers' `generate` on left-padded prompts. It knows every family and is the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.rollout import SamplingConfig
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList

from tristage import dist
from tristage.batches import trim_columns
from tristage.rollout.base import RolloutBackend, SampledBatch, SeededRequest
from tristage.rollout.sampling import InverseTransformSampler


class PaddedRollout(RolloutBackend):
    """Samples with the training weights in place; rows that have ended go on computing until all of a call have."""

    name = "padded"

    @torch.no_grad()
    def generate(self, request: SeededRequest, sampling: SamplingConfig) -> SampledBatch:
        prompt_mask = request.prompt_attention_mask.bool()
        # Prompts of similar length share a call: fewer padding columns to attend to.
        order = prompt_mask.sum(dim=1).argsort(descending=True, stable=True)
        shape, device = (len(order), sampling.max_new_tokens), order.device
        responses = torch.empty(shape, dtype=torch.long, device=device)
        logprobs, entropy = torch.empty(shape, device=device), torch.empty(shape, device=device)
        with self.weights() as whole:
            for rows in order.split(self.rows_at_once):
                columns = trim_columns(prompt_mask[rows])
                responses[rows], logprobs[rows], entropy[rows] = generate_padded(
                    self.engine.module.model, request.prompt_ids[rows][:, columns], prompt_mask[rows][:, columns],
                    request.uniforms[rows.cpu()], sampling, self.stop_ids, self.tokenizer.pad_token_id,
                    ranks_in_step=not whole,
                )  # fmt: skip
        return self.batch(request, responses, logprobs, entropy)


def generate_padded(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    uniforms: torch.Tensor,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    ranks_in_step: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask [b,P] left padded -> tokens, log-probabilities, entropy, each [b, max_new_tokens]; what follows a
    stop id is not defined.
    """
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        # A complete config of our own: a model folder's defaults (top_k 50, penalties) must not leak in.
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
        )
        sampler = InverseTransformSampler(uniforms.to(ids.device), sampling)
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
    missing = (0, sampling.max_new_tokens - found.shape[1])
    tokens = F.pad(found, missing, value=pad_id)
    logprobs, entropy = (F.pad(torch.stack(each, dim=1), missing) for each in sampler.recorded())
    return tokens, logprobs, entropy
