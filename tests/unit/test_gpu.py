"""A GPU that torch cannot use is reported, with the reason; a machine without one is not."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from tristage.dist import gpu


@pytest.fixture(autouse=True)
def unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pci(root: Path, vendor: str, kind: str) -> None:
    card = root / "sys/bus/pci/devices/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text(f"{vendor}\n")
    (card / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize(
    "vendor, kind, is_gpu",
    [
        pytest.param("0x10de", "0x030000", True, id="graphics card"),
        pytest.param("0x10de", "0x030200", True, id="accelerator"),
        pytest.param("0x10de", "0x040300", False, id="sound"),
        pytest.param("0x8086", "0x030000", False, id="another vendor"),
    ],
)
def test_an_nvidia_gpu_is_seen_on_the_bus(tmp_path: Path, vendor: str, kind: str, is_gpu: bool) -> None:
    assert gpu.problem(tmp_path) == ""
    pci(tmp_path, vendor, kind)
    assert bool(gpu.problem(tmp_path)) == is_gpu


def nvidia(root: Path) -> Path:
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    return root


def test_a_torch_without_cuda_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    told = gpu.problem(nvidia(tmp_path))
    assert told.endswith(f"torch {torch.__version__} is built without CUDA; install a build with it")


def test_the_drivers_own_words_are_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    too_old = "The NVIDIA driver on your system is too old (found version 11040). Please update it.\nMore."
    with mock.patch.object(torch.cuda, "init", side_effect=RuntimeError(too_old)):
        told = gpu.problem(nvidia(tmp_path))
    assert told.endswith("The NVIDIA driver on your system is too old (found version 11040); see `nvidia-smi`")


def test_a_gpu_that_the_user_hid_or_that_torch_uses_is_not_reported(tmp_path, monkeypatch) -> None:
    nvidia(tmp_path)
    assert gpu.problem(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.problem(tmp_path) == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.problem(tmp_path) == ""
