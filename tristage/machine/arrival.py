"""What a rank does first: decode its arguments, read its place from variables. Imports the standard library only."""

from __future__ import annotations

import base64
import os
import re
import socket

ENCODED = "base64:"
SAFE = re.compile(r"[\w@+=:,./-]*", re.ASCII)  # the same before and after pdsh (%h is its own) and any shell
FROM_OPENMPI = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "WORLD_SIZE": "SIZE", "LOCAL_SIZE": "LOCAL_SIZE"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def encode(word: str) -> str:
    """`word`, or its base64 where a shell would change it."""
    if SAFE.fullmatch(word) and word and not word.startswith(ENCODED):
        return word
    return ENCODED + base64.urlsafe_b64encode(word.encode()).decode()


def decode(word: str) -> str:
    """The word that was passed to `encode`."""
    if not word.startswith(ENCODED):
        return word
    return base64.urlsafe_b64decode(word.removeprefix(ENCODED)).decode()


def adopt_rank_of_mpirun() -> None:
    """Copy Open MPI's variables for a rank to those that torch reads, where DeepSpeed's launcher has not set them."""
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ.update({name: os.environ[f"OMPI_COMM_WORLD_{theirs}"] for name, theirs in FROM_OPENMPI.items()})
