"""The dimensions that families of models were published with, for tests that have no weights of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tristage.models.tokenizer import load_tokenizer

OPT = {"vocab_size": 50272, "max_position_embeddings": 2048}


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return "opt", OPT | sizes | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


def _llama(kind: str, hidden: int, inner: int, layers: int, heads: int, keys: int, words: int, **more: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    positions = {"num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 4096}
    return kind, sizes | positions | more


# id -> (model type, dimensions), and millions of parameters as the papers and model cards have them
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "bigscience/bloom-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    "bigscience/bloom-1b1": ("bloom", {"hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    "meta-llama/Llama-2-7b-hf": _llama("llama", 4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Meta-Llama-3-8B": _llama("llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen/Qwen3-1.7B-Base": _llama("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}
MILLIONS = {
    **{"facebook/opt-350m": 331, "facebook/opt-1.3b": 1316, "facebook/opt-6.7b": 6658, "facebook/opt-13b": 12853},
    **{"facebook/opt-30b": 29975, "facebook/opt-66b": 65720},
    **{"bigscience/bloom-560m": 559, "bigscience/bloom-1b1": 1065},
    **{"meta-llama/Llama-2-7b-hf": 6738, "meta-llama/Meta-Llama-3-8B": 8030, "Qwen/Qwen3-1.7B-Base": 1721},
    "HuggingFaceTB/SmolLM2-135M-Instruct": 135,
}


def write_config(folder: Path, name: str) -> str:
    """A folder that holds the config.json of a published model, and nothing else."""
    kind, dimensions = PUBLISHED[name]
    AutoConfig.for_model(kind, **dimensions).save_pretrained(folder)
    return str(folder)


def shrunk(name: str, tokenizer_of: str) -> Any:
    """The config of the same architecture, a few thousand parameters large, for the tokenizer of a folder."""
    kind, dimensions = PUBLISHED[name]
    tokenizer = load_tokenizer(tokenizer_of)
    keys_are_shared = dimensions.get("num_key_value_heads") != dimensions.get("num_attention_heads")
    small = {
        **{"hidden_size": 48, "ffn_dim": 96, "intermediate_size": 96, "num_hidden_layers": 2, "n_layer": 2},
        **{"num_attention_heads": 2, "n_head": 2, "head_dim": 24, "vocab_size": len(tokenizer)},
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48 if dimensions.get("word_embed_proj_dim") == dimensions["hidden_size"] else 24,
        "num_key_value_heads": 1 if keys_are_shared else 2,
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    values = dimensions | {key: value for key, value in small.items() if key in dimensions}
    return AutoConfig.for_model(kind, **values, **special)
