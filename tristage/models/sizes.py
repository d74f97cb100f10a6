"""The size of a model by its config.json: it is built on the meta device, where weights take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.causal_lm import has_plain_head
from tristage.models.loading import load_config_without_dropout
from tristage.models.lora import adapter_parameters, inner_linear_parameters
from tristage.models.scalar_head import register_scalar_head

INNER_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
# Tensors as wide as the MLP that autograd keeps around its activation: ReLU's output alone; input and output;
# the tanh formula that transformers writes out keeps what lies between as well.
KEPT_BY_ACTIVATION = {"relu": 1, "gelu_new": 5, "gelu_fast": 5}


@dataclass(frozen=True)
class ModelShape:
    """Counts of parameters and the widths that activations have."""

    parameters: int
    linear: int  # of the inner linear layers, those that quantisation packs
    adapters: int  # trainable parameters that LoRA adds
    head: int  # of the output projection, or of the scalar head
    largest: int  # of the largest single module without its children: what ZeRO-3 gathers at once
    layers: int
    hidden: int
    heads: int
    query: int  # width of the queries: heads x their dimension
    key_value: int  # width of the keys, and of the values
    inner: int  # width of the MLP
    inner_kept: int  # tensors of that width that autograd keeps: 4 where the MLP is gated
    vocabulary: int
    rms_norm: bool
    query_norm: bool  # queries and keys are normalised (Qwen3)
    attention_matrix: bool  # held in memory: the family has no fused attention
    plain_head: bool  # logits come in chunks
    experts: bool  # a token passes some of the layers alone


def model_shape(
    path: str, scalar_head: bool = False, lora: LoraSettings | None = None, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of the model in a folder or of an id, with one label in place of words where `scalar_head`.

    Raises:
        UserError: no config.json to be read, or a family that has no such model.
    """
    config: Any = load_config_without_dropout(path, trust_remote_code)
    config.num_labels = 1
    register_scalar_head(config)
    auto_class: Any = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: no model can be made of this config ({str(error).splitlines()[0]})") from None
    text, names = config.get_text_config(), [name for name, _ in model.named_modules()]
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise UserError(f"{path}: memory is planned for models with attention; {config.model_type} has none")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    activation = getattr(text, "hidden_act", None) or getattr(text, "activation_function", None) or "gelu"
    gated = any(name.endswith("gate_proj") for name in names)
    head = model.score if scalar_head else model.get_output_embeddings()
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=inner_linear_parameters(model),
        adapters=0 if lora is None else adapter_parameters(model, lora),
        head=sum(p.numel() for p in head.parameters()),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        query=heads * head_dim,
        key_value=key_value,
        inner=next((w for name in INNER_WIDTHS if (w := getattr(text, name, None))), 4 * text.hidden_size),
        inner_kept=4 if gated else KEPT_BY_ACTIVATION.get(activation, 2),
        vocabulary=text.vocab_size,
        rms_norm=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        query_norm=any(name.endswith("q_norm") for name in names),
        attention_matrix=not getattr(model, "_supports_sdpa", False),
        plain_head=has_plain_head(config),
        experts=any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")),
    )
