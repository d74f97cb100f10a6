"""Prepare a launch: the `deepspeed` command, the port where the ranks meet, and what other nodes need.

DeepSpeed sends arguments and variables to other nodes in a shell command, through pdsh and ssh, with quotes around some
of them. So arguments that a shell would change are sent as base64 (`arrival.decode` restores them), and variables are
escaped.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from tristage.config import read_values, shipped_path
from tristage.errors import UserError
from tristage.launch.nodes import check_reachable, own_address_of, read_nodes
from tristage.launch.options import option
from tristage.launch.remote import SHELL_LAUNCHERS, check_launcher, check_paths, environment_file
from tristage.machine.arrival import encode, free_port


class Start(NamedTuple):
    """One start of the ranks."""

    arguments: list[str]
    """Of `deepspeed`."""
    log: Path | None
    """The file that also receives rank output; None if the config has no output, which the step will report."""
    port: str | None = None
    """At which ranks of this machine meet."""
    picked: bool = False
    """Whether the port was picked here, and may be picked again if another process takes it before the ranks meet."""
    nodes: tuple[str, ...] = ()
    """The nodes that `deepspeed` starts ranks on through ssh or mpirun."""
    environment: str | None = None
    """Lines NAME=VALUE that DeepSpeed sends to those nodes."""


def prepare(words: list[str], options: list[str], variables: Mapping[str, str]) -> Start:
    """The start that MODULE --config CONFIG [key=value ...] and launcher options describe.

    Args:
        variables: the environment that the ranks are to have.

    Raises:
        UserError: a hostfile or filter that names no nodes, a node that ssh does not reach, a variable that cannot
            be sent, a port that is taken.
    """
    nodes, output = read_nodes(options), output_of(words[2:])
    sent = [encode(word) for word in words] if nodes else words
    log = output / "logs/launch.log" if output else None
    by_hand = "--no_ssh" in options  # the user starts the launcher on each node, with --node_rank
    if nodes and not by_hand:
        check_reachable(nodes, option(options, "--hostfile"), option(options, "--ssh_port"))
        launcher, over_mpi = check_launcher(options), None
        check_paths(options)
        first, given = next(iter(nodes)), option(options, "--master_addr")
        address = given or own_address_of(first, option(options, "--ssh_port"))
        if launcher not in SHELL_LAUNCHERS:
            over_mpi = {"MASTER_ADDR": address or first, "MASTER_PORT": option(options, "--master_port") or "29500"}
        elif address and not given:
            options = [*options, "--master_addr", address]  # else DeepSpeed takes the first that the node lists
        environment = environment_file(dict(variables), over_mpi)
        return Start([*options, "--module", *sent], log, nodes=tuple(nodes), environment=environment)
    picked = not by_hand and option(options, "--master_port") is None
    if (port := option(options, "--master_port")) is None:
        port = "29500" if by_hand else free_port()  # by hand, all nodes must know it
        options = [*options, "--master_port", port]
    if not by_hand:
        check_port(port)
    return Start([*options, "--module", *sent], log, port, picked)


def check_port(port: str) -> None:
    """Check that ranks on this machine can meet at `port`. Raises UserError."""
    number = int(port) if port.isdecimal() else 0
    if not 0 < number < 2**16:
        raise UserError(f"--master_port {port}: not a port; give a number from 1024 to 65535, or leave it out")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            raise UserError(
                f"--master_port {port} of this machine cannot be used ({error.strerror}); give another, or none"
            ) from None


def output_of(words: Sequence[str]) -> Path | None:
    """The run's folder by `words` (CONFIG, key=value ...); None if there is none, which the step will report."""
    given = [word.removeprefix("output=") for word in words[1:] if word.startswith("output=")]
    try:
        output = yaml.safe_load(given[-1]) if given else read_values(shipped_path(words[0]))["output"]
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return None
    return Path(output) if isinstance(output, str) else None
