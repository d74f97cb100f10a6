"""Whether a machine has a GPU, by its device files and its PCI bus. Nothing is imported, torch least of all."""

from __future__ import annotations

from pathlib import Path

OTHER_DEVICES = ("dev/kfd", "dev/dxg")  # ROCm's, and those of WSL


def may_have_gpu(root: Path = Path("/")) -> bool:
    """False where importing torch to look for a GPU would be in vain."""
    return has_nvidia_gpu(root) or any((root / device).exists() for device in OTHER_DEVICES)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver or the PCI bus shows one (class 0x03: display controllers)."""
    if any(root.glob("dev/nvidia[0-9]*")):
        return True
    cards = [card for card in root.glob("sys/bus/pci/devices/*") if _read(card / "vendor") == "0x10de"]
    return any(_read(card / "class").startswith("0x03") for card in cards)


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
