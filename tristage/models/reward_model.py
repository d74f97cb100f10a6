"""Reward model and critic: `AutoModelForSequenceClassification` with one label, a value at every position."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from tristage.config import LoraSettings
from tristage.engine import gathered
from tristage.models.kernels import PLAIN, Kernels
from tristage.models.loading import (
    Holds,
    align_special_tokens,
    check_model,
    from_pretrained,
    has_scalar_head,
)
from tristage.models.lora import adapters_off, add_adapters
from tristage.models.rows import Rows


class RewardModel(nn.Module):
    """(input_ids [B,T], attention_mask [B,T]) -> values [B,T] float32, the scalar head at every position.

    A normalised model's config.json has `score_offset` and `score_scale`: values are (head - offset) / scale. Without
    them they are the head's own, which is what other tools read.
    """

    start_head: torch.Tensor | None  # [1,H], see keep_start

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.register_buffer("start_head", None)

    @property
    def score_offset(self) -> float:
        return float(getattr(self.model.config, "score_offset", 0.0))

    @property
    def score_scale(self) -> float:
        return float(getattr(self.model.config, "score_scale", 1.0))

    def normalize(self, mean: float, std: float) -> None:
        """Shift and scale all later values, also in the saved folder: this mean and deviation become 0 and 1."""
        offset, scale = self.score_offset + self.score_scale * mean, self.score_scale * std
        self.model.config.update({"score_offset": offset, "score_scale": scale})

    def keep_start(self, engine_config: dict[str, Any] | None) -> None:
        """Keep a copy of the head, so that forward(start=True) still scores as before any training.

        The other weights are frozen if only adapters are trained: so the critic also holds the reward model.
        """
        with gathered(list(self.model.score.parameters()), engine_config):
            head = self.model.score.weight.detach().clone()
        self.register_buffer("start_head", head, persistent=False)
        assert self.model.score.bias is None, "transformers' decoder-only reward models have no bias"

    def external_parameters(self) -> list[nn.Parameter]:
        """Weights that forward uses outside their own module: the scalar head."""
        return [self.model.score.weight] + ([self.model.score.bias] if self.model.score.bias is not None else [])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: bool = False) -> torch.Tensor:
        with adapters_off(self.model) if start else contextlib.nullcontext():
            rows = Rows.of(self.model, input_ids, attention_mask)
            hidden = self.model.base_model(**rows.inputs).last_hidden_state
        head = self.model.score
        weight = self.start_head if start else head.weight
        assert weight is not None, "keep_start comes first"
        bias = head.bias.float() if head.bias is not None else None
        # In float32: bf16 would leave a score three significant digits.
        values = F.linear(hidden.float(), weight.float(), bias).squeeze(-1)
        return rows.spread((values - self.score_offset) / self.score_scale)


def last_token_scores(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """values [B,T], attention_mask [B,T] -> [B]: the value at each row's last real token (its EOS)."""
    columns = torch.arange(values.shape[1], device=values.device)
    last = torch.where(attention_mask, columns, 0).amax(dim=1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def load_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    engine_config: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    new_head_seed: int | None = None,
    lora: LoraSettings | None = None,
    lora_seed: int = 0,
    max_tokens: int = 1,
    keep_start: bool = False,
    kernels: Kernels = PLAIN,
    trust_remote_code: bool = False,
) -> RewardModel:
    """A reward model or critic from a Hugging Face folder or id, all dropouts 0.

    Args:
        new_head_seed: None opens a trained reward model, head included. A seed turns a language model into an
            untrained one: its head is drawn from N(0, 1/(H+1)), standard deviation 1/sqrt(H+1), bias 0
            (Huang et al. 2024, "The N implementation details of RLHF with PPO"), the same on every rank. A folder that
            already is a reward model keeps its head, and is trained further in the units of its scores (_fold_scale).
        lora: freezes all but the head, and adds adapters that are drawn from `lora_seed`.
        keep_start: for RewardModel.keep_start.

    Raises:
        UserError: no such model, or it lacks the expected head.
    """
    holds: Holds = "reward_model" if new_head_seed is None else "new_reward_model"
    config = check_model(path, max_tokens, holds, trust_remote_code)
    is_trained = has_scalar_head(config)
    align_special_tokens(config, tokenizer)
    model = from_pretrained(
        AutoModelForSequenceClassification,
        path,
        config,
        dtype,
        engine_config,
        kernels,
        trust_remote_code=trust_remote_code,
    )
    reward_model = RewardModel(model)
    if new_head_seed is not None and is_trained:
        _fold_scale(reward_model, engine_config)
    elif new_head_seed is not None:
        _init_head(model.score, new_head_seed, engine_config)
    if keep_start:
        reward_model.keep_start(engine_config)
    if lora is not None:
        add_adapters(model, lora, path, lora_seed)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return reward_model


def _init_head(head: nn.Linear, seed: int, engine_config: dict[str, Any] | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    with gathered(list(head.parameters()), engine_config), torch.no_grad():
        std = (head.weight.shape[1] + 1) ** -0.5
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
        if head.bias is not None:
            head.bias.zero_()


def _fold_scale(reward_model: RewardModel, engine_config: dict[str, Any] | None) -> None:
    """Move the scale of a normalised model into its head; values stay what they are.

    A loss of score differences makes sigmoid(difference) a probability in the units of training. So the scale is 1
    during training: the scale of an exported folder always converts back to those units.
    """
    offset, scale, head = reward_model.score_offset, reward_model.score_scale, reward_model.model.score
    if scale == 1.0:
        return
    with gathered(list(head.parameters()), engine_config), torch.no_grad():
        for parameter in head.parameters():
            parameter.div_(scale)
    reward_model.model.config.update({"score_offset": offset / scale, "score_scale": 1.0})
