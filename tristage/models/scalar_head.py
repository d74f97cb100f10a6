"""A scalar head for families that transformers has none for, such as Granite and Mamba.

It is made as transformers makes its own (Llama's, say), and the folders that are saved are alike. To open one without
tristage:

    class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel): ...
    AutoModelForSequenceClassification.register(GraniteConfig, GraniteForSequenceClassification, exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
"""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import MODEL_MAPPING as BACKBONES
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


def register_scalar_head(config: PretrainedConfig) -> None:
    """From now on AutoModelForSequenceClassification opens models of this config's family."""
    family: Any = type(config)
    if family in CLASSIFIERS or family not in BACKBONES:
        return
    backbone = BACKBONES[family]
    if not isinstance(backbone, type):  # several backbones: it is unknown which one
        return
    parent: Any = next(cls for cls in backbone.__mro__[1:] if issubclass(cls, PreTrainedModel))
    name = f"{backbone.__name__.removesuffix('Model')}ForSequenceClassification"
    own = {"base_model_prefix": parent.base_model_prefix, "__module__": __name__}
    head = type(name, (GenericForSequenceClassification, parent), own)
    AutoModelForSequenceClassification.register(family, head, exist_ok=True)  # transformers has the config
