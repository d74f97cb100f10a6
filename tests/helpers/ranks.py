"""Run a function on several gloo ranks in processes of their own: `run_ranks(2, module.function, argument)`.

The function gets (rank, *arguments) with the process group's environment set, and returns something picklable;
the results come back in rank order. It must be importable (a module-level function of a test file). Ranks are forked
from a server that has imported what takes seconds (on a machine with GPUs they start anew: CUDA outlives no fork).
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.reduction import DupFd  # type: ignore[attr-defined]
from typing import Any

import torch

from tristage.machine.arrival import free_port

STEPS = ("step1_sft", "step2_reward_model", "step2_dpo", "step3_ppo")


def process_context() -> Any:
    """multiprocessing as it starts ranks."""
    context = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "forkserver")
    context.set_forkserver_preload([f"{step}.train" for step in STEPS])
    return context


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    context = process_context()
    queue = context.Queue()
    environment = dict(os.environ) | {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(num_ranks):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments_of_rank = (rank, own, queue, function, arguments)
        processes.append(context.Process(target=_Rank(), args=arguments_of_rank, daemon=True))
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


class _Rank:
    """The target of a rank's process. Pickled as it starts, with the test's own terminal (or what captures it)."""

    def __getstate__(self) -> dict[str, Any]:
        return {"streams": [DupFd(1), DupFd(2)]}

    def __call__(
        self, rank: int, environment: dict[str, str], queue: Any, function: Any, arguments: tuple[Any, ...]
    ) -> None:
        for number, stream in enumerate(self.streams, start=1):
            os.dup2(stream.detach(), number)
        os.environ.clear()
        os.environ.update(environment)
        from tristage import dist
        from tristage.models.quiet import quiet_libraries

        quiet_libraries()  # as entry_point does
        torch.set_num_threads(1)
        try:
            queue.put((rank, function(rank, *arguments), None))
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))
        finally:
            dist.shutdown()
