"""What a launcher works out before it starts ranks; called by launch/common.sh.

    python -m tristage.launch.prepare FOLDER MODULE CONFIG [key=value ...] -- [deepspeed launcher options]

writes the arguments of `deepspeed` (FOLDER/command, each ended by a NUL), the path of the log (FOLDER/log),
the port where ranks on this machine alone will meet (FOLDER/port) and, for ranks on other nodes, the variables that
they need (FOLDER/env, which DeepSpeed reads) and the nodes' names (FOLDER/nodes). FOLDER/launcher says whose it is, and
what killed runs left is removed (leftovers). DeepSpeed hands arguments and
variables to other nodes in the text of a shell command, through pdsh and ssh, with quotes around some of them: here
arguments that a shell would change travel as base64 (`run.entry_point` restores them), and variables are escaped.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from tristage.arrival import encode, free_port
from tristage.errors import UserError
from tristage.launch import leftovers
from tristage.launch.nodes import check_reachable, own_address_of, read_nodes
from tristage.launch.options import option, split_words
from tristage.launch.remote import SHELL, check_launcher, check_paths, environment_file


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence for what a user must mend."""
    folder, module, config, *rest = argv
    settings, options = split_words(rest)
    leftovers.sign(Path(folder), launcher=os.getppid())
    leftovers.remove(Path(folder).parent)
    try:
        prepare(Path(folder), [module, "--config", config, *settings], options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(folder: Path, words: list[str], options: list[str]) -> None:
    """Write `folder`/command, /log and, for several nodes, /nodes and /env, else /port.

    `words`: MODULE --config CONFIG [key=value ...].

    Raises:
        UserError: a hostfile or filter that names no nodes, a node that ssh does not reach, a variable that cannot
            travel, a port that is taken.
    """
    nodes = read_nodes(options)
    by_hand = "--no_ssh" in options  # on each node, with --node_rank
    if nodes and not by_hand:
        check_reachable(nodes, option(options, "--hostfile"), option(options, "--ssh_port"))
        launcher = check_launcher(options)
        check_paths(options)
        (folder / "nodes").write_text("".join(f"{node}\n" for node in nodes))
        (folder / "env").touch(mode=0o600)
        first = next(iter(nodes))
        address = option(options, "--master_addr") or own_address_of(first, option(options, "--ssh_port"))
        if launcher in SHELL:
            (folder / "env").write_text(environment_file(dict(os.environ)))
            if address and option(options, "--master_addr") is None:
                options = [*options, "--master_addr", address]  # else DeepSpeed takes the first that the node lists
        else:
            address = address or first
            meeting = {"MASTER_ADDR": address, "MASTER_PORT": option(options, "--master_port") or "29500"}
            (folder / "env").write_text(environment_file(dict(os.environ), meeting))
    else:
        if (port := option(options, "--master_port")) is None:
            port = "29500" if by_hand else free_port()  # all nodes must know it
            options = [*options, "--master_port", port]
            if not by_hand:
                (folder / "port_picked").touch()  # dist renames it to port_taken if it is, and common.sh starts again
        if not by_hand:
            check_port(port)
        (folder / "port").write_text(port)
    sent = [encode(word) for word in words] if nodes else words
    (folder / "command").write_text("".join(f"{word}\0" for word in [*options, "--module", *sent]))
    output = output_of(words[2:])
    (folder / "log").write_text(str(output / "logs/launch.log") if output else "")


def check_port(port: str) -> None:
    """Ranks can meet there, on this machine. Raises UserError."""
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
    """The run's folder by `words` (CONFIG, key=value ...); None where they do not say, which the step will."""
    given = [word.removeprefix("output=") for word in words[1:] if word.startswith("output=")]
    try:
        found = yaml.safe_load(given[-1]) if given else yaml.safe_load(Path(words[0]).read_text())["output"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return Path(found) if isinstance(found, str) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
