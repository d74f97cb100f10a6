"""Model FLOPs agree with torch's own counter; rates divide them by seconds, ranks and the device's peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.helpers import tiny
from tristage.config import EngineSpec, LoraSettings
from tristage.machine.peaks import peak_flops
from tristage.models.flops import ModelFlops, Work, model_flops
from tristage.training import speed as speed_module
from tristage.training.speed import Speed, peak_gib

CPU = torch.device("cpu")


def spec(path: Any, **more: Any) -> EngineSpec:
    needed = {"name": "model", "prefix": "", "path_key": "model", "deepspeed": "zero2", "tokens": 8, "rows": 1}
    return EngineSpec(path=str(path), **({"holds": "policy", "scored": 8} | needed | more))


def counted(model: Any, tokens: int, backward: bool) -> float:
    """torch's count with attention written as two products, and all logits."""
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, tokens, dtype=torch.long)).logits
        if backward:
            logits.sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("architecture", ("llama", "opt", "gpt2"))
def test_model_flops_are_those_that_torch_counts(architecture: str, tmp_path: Any) -> None:
    folder = tiny.write_model(tmp_path / "model", architecture=architecture)
    flops, tokens = model_flops(spec(folder)), 8
    assert flops is not None
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    # torch counts every key: tokens^2 pairs
    work = Work(rows=1, tokens=tokens, pairs=tokens**2, scored=tokens)
    assert counted(model, tokens, backward=False) == flops.forward(work)
    # the gradient of the embeddings' output, which the first layer's backward gives, needs a product less where frozen
    assert counted(model, tokens, backward=True) == pytest.approx(flops.forward_and_backward(work), rel=0.01)


def test_work_counts_real_tokens_and_the_keys_that_each_sees() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]).bool()
    scored = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()  # the last row is a filler
    assert Work.of(mask, scored) == Work(rows=2, tokens=5, pairs=(1 + 2 + 3) + (1 + 2), scored=3)
    packed = Work.of(torch.ones(1, 5).bool(), torch.ones(1, 5).bool(), torch.tensor([[0, 1, 0, 1, 2]]))
    assert packed == Work(rows=2, tokens=5, pairs=(1 + 2) + (1 + 2 + 3), scored=5)


def test_adapters_halve_the_backward_and_unknown_families_have_no_flops(tmp_path: Any) -> None:
    folder = tiny.write_model(tmp_path / "model")
    whole, adapters = model_flops(spec(folder)), model_flops(spec(folder, lora=LoraSettings()))
    assert whole is not None and whole.backward == 2 and adapters is not None and adapters.backward == 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text('{"model_type": "mamba"}')
    assert model_flops(spec(tmp_path / "none")) is None
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    assert model_flops(spec(tmp_path / "odd")) is None  # ZeroDivisionError in transformers


def test_rates_are_of_all_ranks_and_utilisation_of_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.sft_config(tmp_path, tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows")["sft"])
    speed = Speed(config, CPU)
    speed.models = {"model": ModelFlops(2e12, 0.0, 0.0, 2.0), "reference": ModelFlops(1e12, 0.0, 0.0, 2.0)}
    speed.peak = 1e12
    own = [Work(1, 3, 6, 3), Work(1, 2, 3, 2)]
    monkeypatch.setattr(speed_module.dist, "world_size", lambda: 2)
    monkeypatch.setattr(speed_module.dist, "all_gather_rows", lambda row: torch.cat([row, row]))
    metrics = speed.step(own, {"time/step": 4.0}, reference=True)
    assert metrics["throughput/tokens_per_second"] == 10 / 4
    assert metrics["throughput/samples_per_second"] == 4 / 4
    assert metrics["throughput/tflops"] == pytest.approx(10 * (3 * 2 + 1) / 4 / 2)  # TFLOPs of 10 tokens, 4 s, 2 ranks
    assert metrics["throughput/mfu"] == pytest.approx(metrics["throughput/tflops"])
    assert metrics["memory/peak_gib"] == pytest.approx(peak_gib(CPU), rel=0.05)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Some GPU", None),
    ],
)
def test_peaks_are_found_by_the_driver_s_names(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
