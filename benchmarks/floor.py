"""How far a PPO iteration is from what its arithmetic and its reads of memory cost on this machine, by phase.

    python -m benchmarks.floor [OUT.json] [--repetitions N] [--smallest]

Two rates are measured on one core: of matrix products in float32 at the sizes of training, and of reading weights at
the sizes of decoding. With them, per response of P prompt and R response tokens, T together:

    rollout   the prompt's forward, then R decoding steps, each of which costs the larger of its arithmetic and its
              reads: all weights once for all rows, and each row's keys and values
    score     the forward of reference, reward model and critic: the actor's log-probabilities come from the sampler
              or the update; the head at response positions only
    update    forward and backward of actor and critic (three forwards), and AdamW's reads and writes

The iteration itself, at ZeRO-2 on two ranks, is measured in the same run: 4 rows per rank, and 32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.against_peers import EXPERIMENTS, OURS, WIDE, command_line, with_folder, write_result
from benchmarks.models import SMALLEST, Sizes
from benchmarks.turns import Contestant, Record

RANKS, ADAM_BYTES = 2, 28  # read weight, gradient and two moments, write weight and moments, float32


# -- rates -------------------------------------------------------------------------------------------------------------


def shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """(in, out) of the matrices of the actor, its head last."""
    width = sizes.width
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return layer * sizes.layers + [(width, sizes.vocabulary)]


def best_time(function: Callable[[], Any], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@torch.no_grad()
def rates(sizes: Sizes, repetitions: int) -> dict[str, float]:
    """FLOP/s of products with 1024 tokens, and bytes/s of weights read by products with 4 rows and by a plain sum."""
    weights = [torch.randn(out, into) for into, out in shapes(sizes)]
    numbers = sum(weight.numel() for weight in weights)

    def products(rows: int) -> Callable[[], Any]:
        inputs = {into: torch.randn(rows, into) for into, _ in shapes(sizes)}
        return lambda: [torch.nn.functional.linear(inputs[weight.shape[1]], weight) for weight in weights]

    reads = [best_time(products(4), 3 * repetitions), best_time(lambda: [w.sum() for w in weights], 3 * repetitions)]
    flops = 2 * 1024 * numbers / best_time(products(1024), repetitions)
    return {"flops": flops, "bytes": 4 * numbers / min(reads)}


# -- arithmetic --------------------------------------------------------------------------------------------------------


def trunk_flops(width: int, layers: int, tokens: int, context: float) -> float:
    """Of a forward of `tokens` tokens that attend to `context` tokens on average."""
    return tokens * layers * (24 * width**2 + 4 * width * context)


def floor(sizes: Sizes, rows: int, rate: dict[str, float], ranks: int = RANKS) -> dict[str, float]:
    """Seconds per response of each phase."""
    prompt, response, width, layers = sizes.prompt, sizes.response, sizes.width, sizes.layers
    total, head = prompt + response, 2 * width * sizes.vocabulary
    forward = trunk_flops(width, layers, total, total / 2) + response * head
    critic = trunk_flops(sizes.reward_width, sizes.reward_layers, total, total / 2)
    weights = 12 * width**2 * layers + width * sizes.vocabulary
    context = prompt + response / 2
    step_flops = rows * (trunk_flops(width, layers, 1, context) + head)
    step_bytes = 4 * (weights + rows * 2 * layers * width * context)
    decoding = response * max(step_flops / rate["flops"], step_bytes / rate["bytes"]) / rows
    trained = weights + 12 * sizes.reward_width**2 * sizes.reward_layers + sizes.reward_width * sizes.vocabulary
    return {
        "rollout": trunk_flops(width, layers, prompt, prompt / 2) / rate["flops"] + decoding,
        "score": (forward + 2 * critic) / rate["flops"],
        "update": 3 * (forward + critic) / rate["flops"] + ADAM_BYTES * trained / ranks / rows / rate["bytes"],
    }


# -- the command -------------------------------------------------------------------------------------------------------


def phases(contestant: Contestant, repetitions: int, rows: int) -> dict[str, float]:
    """Median CPU seconds per response of each phase, after a warm-up."""
    contestant.step()
    found: list[Record] = [record for _ in range(repetitions) for record in contestant.step()]
    return {phase: statistics.median(record["phases"][phase] for record in found) / rows
            for phase in found[0]["phases"]}  # fmt: skip


def measure(folder: str, sizes: Sizes, repetitions: int) -> dict[str, Any]:
    cases = {}
    for rows in (4, WIDE):
        with Contestant(OURS, EXPERIMENTS["zero2"].job | {"rows": rows, "folder": folder}, RANKS) as contestant:
            found = phases(contestant, repetitions, rows)
        rate = rates(sizes, 3 + repetitions)  # close in time to what it is compared with
        cases[str(rows)] = {"rates": rate, "floor": floor(sizes, rows, rate), "measured": found}
    return cases


def show(rows: str, case: dict[str, Any]) -> None:
    rate = case["rates"]
    print(f"{rows} rows per rank; {rate['flops'] / 1e9:.0f} GFLOP/s, {rate['bytes'] / 1e9:.1f} GB/s")
    for phase, least in case["floor"].items():
        print(f"  {phase:8} {case['measured'][phase]:.3f} s per response, floor {least:.3f}, "
              f"{case['measured'][phase] / least:.2f} times", flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = command_line(__doc__, repetitions=3).parse_args(argv)
    torch.set_num_threads(1)
    sizes = SMALLEST if options.smallest else Sizes()
    cases = with_folder(sizes, lambda folder: measure(folder, sizes, options.repetitions))
    for rows, case in cases.items():
        show(rows, case)
    write_result(options.out, "floor", argv, {OURS: sys.executable}, cases=cases)


if __name__ == "__main__":
    main()
