"""An export from ZeRO-3: rank 0 holds the weights once while it gathers, merges and writes them."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.config import BatchPlan, LoraSettings, OptimizerSettings
from tristage.engine import engine_config, train_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.saving import save_model
from tristage.models.tokenizer import load_tokenizer

CASES: dict[str, LoraSettings | None] = {"whole": None, "lora": LoraSettings(rank=4, alpha=8)}
MIB = 2**20
M_MMAP_THRESHOLD = -3


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM its peak since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def save_large(rank: int, folder: str) -> dict[str, int]:
    """{case: bytes above what the rank holds anyway} at the peak of save_model."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, and is not counted
    dist.init("cpu")
    template = json.loads(Path(tiny.deepspeed_json(3)).read_text())
    config = engine_config(template, "float32", BatchPlan.make(2, 1, 2))
    tokenizer = load_tokenizer(f"{folder}/large")
    found = {}
    for case, lora in CASES.items():
        model = load_causal_lm(
            f"{folder}/large", tokenizer, dtype=torch.float32, engine_config=config, lora=lora, lora_seed=0
        )
        engine = train_engine(model, config, OptimizerSettings(learning_rate=1e-3), total_steps=1)
        gc.collect()
        forget_peak()
        before = memory("VmRSS")
        save_model(engine, tokenizer, Path(folder) / case)
        found[case] = memory("VmHWM") - before
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("large")
    tokenizer = load_tokenizer(tiny.write_model(folder / "tiny"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    return folder, run_ranks(2, save_large, str(folder))


@pytest.mark.parametrize("case", CASES)
def test_rank_0_holds_one_copy_of_the_weights_at_most_above_its_partition(
    case: str, large: tuple[Path, list[dict[str, int]]]
) -> None:
    folder, (main, other) = large
    size = (folder / case / "model.safetensors").stat().st_size
    print(f"{case}: {size / MIB:.0f} MiB; peaks above: rank 0 {main[case] / MIB:.0f}, rank 1 {other[case] / MIB:.0f}")
    assert size > 95 * MIB
    assert 0.9 * size < main[case] < 1.2 * size
    assert other[case] < 0.2 * size


@pytest.mark.parametrize("case", CASES)
def test_what_was_gathered_is_what_was_loaded(case: str, large: tuple[Path, list[dict[str, int]]]) -> None:
    folder, _ = large
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in (case, "large"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
