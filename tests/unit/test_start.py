"""What a rank imports and opens before and in its first step: seconds of every start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny
from tristage.data.sets import load_sets
from tristage.models.tokenizer import load_tokenizer

# Each takes 0.1 to 1.2 CPU seconds, and no step without LoRA, Parquet, plots or torch.compile needs it.
NOT_NEEDED = (  # nor scipy, which transformers imports wherever it is installed
    *("peft", "bitsandbytes", "pandas", "sklearn", "matplotlib", "datasets", "trl"),
    *("torch._inductor.compile_fx", "torch._inductor.select_algorithm"),
)
RUN = """
import json, sys
import transformers
opened = []
load = transformers.AutoTokenizer.from_pretrained
transformers.AutoTokenizer.from_pretrained = lambda path, **rest: opened.append(path) or load(path, **rest)
from step1_sft.train import main
main(sys.argv[1:])
from tristage import dist
dist.shutdown()
print(json.dumps({"modules": sorted(sys.modules), "tokenizers": opened}))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of one rank that trains one step at ZeRO 2 and exports: the modules it imported, the tokenizers it opened."""
    base: Path = tmp_path_factory.mktemp("start")
    settings = tiny.sft_config(base, tiny.write_model(base / "model"), tiny.write_rows(base / "rows")["sft"], 2)
    load_sets(settings, load_tokenizer(settings.model))  # tokenised before: pyarrow imports pandas to write rows
    words = ["--config", settings.file, "max_steps=1"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    ran = subprocess.run([sys.executable, "-c", RUN, *words], env=alone, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result: dict[str, list[str]] = json.loads(ran.stdout.splitlines()[-1])
    return result


def test_a_rank_imports_nothing_heavy_that_a_step_does_not_need(start: dict[str, list[str]]) -> None:
    assert not set(NOT_NEEDED) & set(start["modules"])
    assert "deepspeed.runtime.zero.muon.original_muon" in start["modules"]  # imported without torch's compiler


def test_the_tokenizer_is_opened_once(start: dict[str, list[str]]) -> None:
    assert len(start["tokenizers"]) == 1
