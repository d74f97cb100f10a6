"""What a GPU can compute at most: dense bf16 products (fp16 where there is no bf16), from the makers' data sheets."""

from __future__ import annotations

TERA = 1e12
# A part of the name that the driver gives -> TFLOP/s; the first that fits counts.
PEAK_TFLOPS = (
    *(("B200", 2250), ("H200", 989), ("GH200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989)),
    *(("H800", 989), ("A100", 312), ("A800", 312), ("A40", 150), ("A30", 165), ("A10G", None), ("A10", 125)),
    *(("L40S", 362), ("L4", 121), ("RTX 4090", 165), ("RTX 3090", 71), ("V100", 125), ("T4", 65)),
)


def peak_flops(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None of one that is not known."""
    words = name.replace("-", " ").split()
    for part, tflops in PEAK_TFLOPS:
        wanted = part.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return None if tflops is None else tflops * TERA
    return None
