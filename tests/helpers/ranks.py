"""Run a function on several gloo ranks in processes of their own: `run_ranks(2, module.function, argument)`.

The function gets (rank, *arguments) with the process group's environment set, and returns something picklable;
the results come back in rank order. It must be importable (a module-level function of a test file).
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_one_rank, args=(rank, num_ranks, port, queue, function, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} of {num_ranks} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=20 if len(results) == num_ranks else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(num_ranks)]


def _one_rank(rank: int, num_ranks: int, port: int, queue: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from tristage import dist

    torch.set_num_threads(1)
    try:
        result = function(rank, *arguments)
        queue.put((rank, result, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        dist.shutdown()
