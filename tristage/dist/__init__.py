"""Ranks: who they are, what they exchange, and the watchdog. The only package that imports torch.distributed."""

from tristage.dist.collectives import all_gather_rows, barrier, broadcast, gather_objects, is_main, local_rank, max_over_ranks, node_suffix, print0, rank, sum_over_ranks, world_size
from tristage.dist.joining import EXIT_PORT_TAKEN, LOOPBACK, check_device, current_device, init, shutdown, uses_gpu

__all__ = [
    "EXIT_PORT_TAKEN",
    "LOOPBACK",
    "all_gather_rows",
    "barrier",
    "broadcast",
    "check_device",
    "current_device",
    "gather_objects",
    "init",
    "is_main",
    "local_rank",
    "max_over_ranks",
    "node_suffix",
    "print0",
    "rank",
    "shutdown",
    "sum_over_ranks",
    "uses_gpu",
    "world_size",
]
