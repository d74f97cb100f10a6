"""The nodes of a hostfile: which, how many ranks each, whether ssh reaches them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tristage.errors import UserError
from tristage.launch.options import count_of, option
from tristage.machine.arrival import SAFE

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+#.*)?")
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's, used if it exists


def read_nodes(options: Sequence[str]) -> dict[str, list[int]]:
    """The slots of each node that the options select, in the hostfile's order; {} without a hostfile.

    Raises:
        UserError: no such file, a line that is not `HOST slots=N`, a filter that names an unknown node or slot.
    """
    file = option(options, "--hostfile") or DEFAULT_HOSTFILE
    if file == DEFAULT_HOSTFILE and not os.path.isfile(file):
        return {}
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such hostfile; give one with a line `HOST slots=N` for each node")
    nodes: dict[str, list[int]] = {}
    for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line)
        if not match or match[1] in nodes or not SAFE.fullmatch(match[1]) or match[1].startswith("-"):
            raise UserError(f"{file}:{number}: {line!r} is not `HOST slots=N`, or HOST is listed twice; fix that line")
        nodes[match[1]] = list(range(int(match[2])))
    include, exclude = option(options, "--include"), option(options, "--exclude")
    for text in filter(None, (include, exclude)):
        for node, slots in _filter(text).items():
            if node not in nodes or not set(slots) <= set(nodes[node]):
                raise UserError(f"{text}: {file} has no such node or slot as {node}; it has {', '.join(nodes)}")
    if include:
        kept = _filter(include)
        nodes = {node: kept[node] or slots for node, slots in nodes.items() if node in kept}
    if exclude:
        dropped = _filter(exclude)
        nodes = {
            node: [slot for slot in slots if node not in dropped or (dropped[node] and slot not in dropped[node])]
            for node, slots in nodes.items()
        }
    nodes = {node: slots for node, slots in nodes.items() if slots}
    if limit := option(options, "--num_nodes"):
        nodes = dict(list(nodes.items())[: count_of(limit)])
    if count := option(options, "--num_gpus") or option(options, "--num_accelerators"):
        nodes = {node: list(range(count_of(count))) for node in nodes}
    if not nodes:
        raise UserError(f"{file}: no nodes selected; add lines `HOST slots=N`, or relax --include or --exclude")
    return nodes


def _filter(text: str) -> dict[str, list[int]]:
    """`a@b:0,2` -> {"a": [], "b": [0, 2]}."""
    parts = (part.partition(":") for part in text.split("@"))
    try:
        return {node: [int(slot) for slot in slots.split(",") if slot] for node, _, slots in parts}
    except ValueError:
        raise UserError(f"{text}: not a choice of nodes; write NODE or NODE:SLOT,SLOT with @ between nodes") from None


def check_reachable(nodes: Sequence[str] | dict[str, list[int]], hostfile: str | None, port: str | None) -> None:
    """Check that ssh reaches every node without a password. DeepSpeed checks the first only.

    Raises:
        UserError: names the first that does not answer, with ssh's reason.
    """

    def ask(node: str) -> str | None:
        done = over_ssh(node, port, "true")
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, nodes))
    for node, why in zip(nodes, answers, strict=True):
        if why is not None:
            raise UserError(
                f"{hostfile}: node {node} does not answer to ssh ({why}); make `ssh {node} true` work without a "
                "password, or leave the node out (--exclude)"
            )


def over_ssh(node: str, port: str | None, command: str) -> subprocess.CompletedProcess[str]:
    """Run `command` on `node`, if ssh needs no password there."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *(["-p", port] if port else [])]
    return subprocess.run([*ssh, node, command], stdin=subprocess.DEVNULL, capture_output=True, text=True)


def own_address_of(node: str, port: str | None) -> str | None:
    """The address that the hostfile's name `node` has, if it is one of the node's own interfaces.

    None where it is not (address translation, a name that only ssh knows): other nodes might not reach it.
    """
    try:
        named = {str(item[4][0]) for item in socket.getaddrinfo(node, None, socket.AF_INET)}
    except OSError:
        return None
    own = over_ssh(node, port, "hostname -I").stdout.split()
    return next((address for address in own if address in named), None)
