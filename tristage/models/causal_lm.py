"""The policy: a causal language model that answers with log-probabilities instead of logits.

The projection to the vocabulary is the largest tensor of RLHF ([B,T,V]); here it happens only at the
positions that are asked for, in chunks (algo/logprobs.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tristage.algo.logprobs import entropy as logits_entropy
from tristage.algo.logprobs import linear_token_logprobs, token_logprobs
from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.kernels import PLAIN, Kernels
from tristage.models.loading import (
    align_special_tokens,
    check_model,
    from_pretrained,
)
from tristage.models.lora import add_adapters
from tristage.models.rows import Rows

# Config keys of families whose logits are more than weight @ hidden (Gemma 2, Cohere, Granite, ...).
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def has_plain_head(config: Any) -> bool:
    """Whether logits are weight @ hidden and no more, so that they need not be there all at once."""
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in LOGIT_TRANSFORMS)


class CausalLM(nn.Module):
    """(input_ids [B,T], attention_mask [B,T], score_mask [B,T]) -> (logprobs [B,T-1], entropy [B,T-1]).

    With `position_ids` [B,T] a row holds several examples, each starting at 0, that do not see each other.

    logprobs[b,t] is log p(input_ids[b,t+1] | the tokens before it) where score_mask[b,t+1], else 0; float32, at
    `temperature`. entropy likewise, of the whole distribution; all 0 unless `with_entropy`, since it costs several
    passes over the logits. With a value head a third: values [B,T], of the states that end in each token.
    """

    def __init__(self, model: PreTrainedModel, value_head: bool = False):
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None
        self.plain_head = has_plain_head(model.config)
        if value_head:
            if not self.plain_head:
                raise UserError(f"{model.config.model_type}: this family cannot carry `value_head`; give a `critic`")
            # Zero-initialised (Huang et al. 2024).
            width = model.get_output_embeddings().in_features
            self.value_head = nn.Linear(width, 1, bias=False, device=model.device, dtype=model.dtype)
            nn.init.zeros_(self.value_head.weight)

    def external_parameters(self) -> list[nn.Parameter]:
        """Weights that forward uses outside their own module: the output projection and the value head."""
        head = self.model.get_output_embeddings()
        values = [] if self.value_head is None else [self.value_head.weight]
        return [head.weight, *values] + ([head.bias] if getattr(head, "bias", None) is not None else [])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        score_mask: torch.Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        # position t predicts token t+1
        targets, wanted = input_ids[:, 1:], score_mask[:, 1:]
        ids = targets[wanted]
        rows = Rows.of(self.model, input_ids, attention_mask, position_ids)
        if self.plain_head:
            hidden = self.model.base_model(**rows.inputs).last_hidden_state
            head = self.model.get_output_embeddings()
            found, entropy = linear_token_logprobs(
                rows.select(hidden, wanted),
                head.weight,
                ids,
                bias=getattr(head, "bias", None),
                temperature=temperature,
                with_entropy=with_entropy,
            )
        else:
            logits = rows.select(self.model(**rows.inputs).logits, wanted).float() / temperature
            found = token_logprobs(logits, ids)
            entropy = logits_entropy(logits) if with_entropy else found
        scored = (_scatter(found, wanted), _scatter(entropy, wanted) if with_entropy else found.new_zeros(wanted.shape))
        if self.value_head is None:
            return scored
        return *scored, rows.spread(F.linear(hidden.float(), self.value_head.weight.float()).squeeze(-1))


def _scatter(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """values [n] to the n True places of `where` [B,T]; 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)


def load_causal_lm(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    engine_config: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    lora: LoraSettings | None = None,
    lora_seed: int = 0,
    max_tokens: int = 1,
    value_head: bool = False,
    kernels: Kernels = PLAIN,
    trust_remote_code: bool = False,
) -> CausalLM:
    """A policy from a Hugging Face folder or id, all dropouts 0; partitioned while loading under ZeRO-3.

    With `lora` it is frozen, and adapters drawn from `lora_seed` are added; a new value head is trained;
    `kernels.quantize` is for frozen weights.

    Raises:
        UserError: no such model, one with missing weights, one whose vocabulary is smaller than the
            tokenizer's, or with fewer positions than `max_tokens`.
    """
    config = check_model(path, max_tokens, "policy", trust_remote_code)
    align_special_tokens(config, tokenizer)
    model = from_pretrained(
        AutoModelForCausalLM, path, config, dtype, engine_config, kernels, trust_remote_code=trust_remote_code
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    if lora is not None:
        add_adapters(model, lora, path, lora_seed)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalLM(model, value_head)
