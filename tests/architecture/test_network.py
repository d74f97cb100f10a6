"""What listens during a run: the store where ranks meet, and gloo. On one machine both are on loopback.

In the sources one place listens, `dist._listen` on the interface of an address; else sockets are bound on loopback, for
a moment, to see that a port is free. torch's own store listens on all interfaces, so it is given that socket.
"""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.answering import web
from tristage.dist import joining
from tristage.errors import UserError
from tristage.machine.arrival import free_port

REPO = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("tristage", "benchmarks", "step*_*") for path in REPO.glob(f"{folder}/**/*.py"))
MODULES = {"socketserver", "http.server", "xmlrpc.server", "wsgiref", "asyncio", "uvicorn", "flask", "fastapi"}
CALLS = {"bind", "listen", "accept", "create_server", "serve_forever"}
# Calls of torch that would make a store of their own, unless they are given one, or the socket that it listens at.
NEEDED = {"TCPStore": "master_listen_fd", "init_process_group": "store"}
LISTENS = {"create_server((here, port), family=family, backlog=socket.SOMAXCONN)"}  # in dist._listen
WEB = {"fastapi", "uvicorn", "bind((HOST, port))"}  # of `tristage chat --web`: HOST is 127.0.0.1


def servers(tree: ast.AST) -> list[str]:
    """Imports that serve, and calls that open a port other than `bind(("127.0.0.1", ...))`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            call = ast.unparse(node).removeprefix(ast.unparse(node.func.value) + ".")
            found += [] if call.startswith("bind(('127.0.0.1', ") else [call]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NEEDED:
            given = {keyword.arg for keyword in node.keywords}
            found += [] if NEEDED[node.func.attr] in given else [f"{node.func.attr} without {NEEDED[node.func.attr]}"]
    return found


def test_servers_are_seen() -> None:
    text = "import asyncio\nfrom http.server import X\ns.bind(('', 0))\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
    text += "d.TCPStore('a', 1)\nd.init_process_group('gloo')\nd.init_process_group('gloo', store=s)\n"
    torch_calls = {"TCPStore without master_listen_fd", "init_process_group without store"}
    assert set(servers(ast.parse(text))) == {"asyncio", "http.server", "bind(('', 0))", "listen()", *torch_calls}
    assert len(servers(ast.parse(text))) == 6


def test_nothing_opens_a_port_but_the_store_of_the_ranks() -> None:
    assert len(SOURCES) > 40
    found = {path.name: servers(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {name: set(calls) for name, calls in found.items() if calls} == {"joining.py": LISTENS, "web.py": WEB}
    assert web.HOST == "127.0.0.1"


# -- what ranks listen at ----------------------------------------------------------------------------------


def _listening(rank: int, address: str, ranks_here: str) -> tuple[list[str], dict[str, str | None]]:
    """The addresses that this rank listens at once it has sent something, and the interfaces that libraries take."""
    os.environ.update(MASTER_ADDR=address, LOCAL_WORLD_SIZE=ranks_here)
    for name in INTERFACES:
        os.environ.pop(name, None)
    dist.init("cpu", 20)
    assert dist.sum_over_ranks({"x": 1.0}, torch.device("cpu")) == {"x": 2.0}
    found = psutil.Process().net_connections("inet")
    return [at.laddr.ip for at in found if at.status == psutil.CONN_LISTEN], {x: os.environ.get(x) for x in INTERFACES}


INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("address", ["127.0.0.1", socket.gethostname()])
def test_ranks_of_one_machine_listen_on_loopback_alone(address: str) -> None:
    (first, interfaces), (second, _) = run_ranks(2, _listening, address, "2")
    assert len(first) == 2 and len(second) == 1, "the store and gloo on rank 0, gloo on the other"
    assert {*first, *second} == {"127.0.0.1"}
    assert interfaces == dict.fromkeys(INTERFACES, "lo")  # gloo's default is the interface that the host's name has


def own_address() -> str:
    """An address of this machine that is not loopback."""
    found = [item for items in psutil.net_if_addrs().values() for item in items if item.family == socket.AF_INET]
    return next((item.address for item in found if not item.address.startswith("127.")), "")


@pytest.mark.skipif(not own_address(), reason="this machine has no interface but loopback")
def test_ranks_of_several_nodes_meet_at_the_interface_that_the_address_names() -> None:
    (first, interfaces), _ = run_ranks(2, _listening, own_address(), "1")
    assert own_address() in first and "0.0.0.0" not in first and "::" not in first
    assert interfaces == dict.fromkeys(INTERFACES)  # between nodes these are the user's


def test_an_address_of_no_interface_is_reported(monkeypatch, capfd) -> None:
    """As where nodes see each other through address translation: they must meet all the same."""
    monkeypatch.setenv("RANK", "0")
    assert joining._listen("192.0.2.77", int(free_port())) is None
    assert "192.0.2.77 is not the address of an interface of " in capfd.readouterr().out


def test_a_port_in_use_is_picked_again_where_the_launcher_had_picked_it(tmp_path, monkeypatch, capfd) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(joining.torch_dist, "is_initialized", lambda: False)  # of tests before
    (tmp_path / "port_picked").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        place |= {"MASTER_PORT": str(other.getsockname()[1]), "PYTHON_TRISTAGE_RUN": str(tmp_path)}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            dist.init("cpu", 1)
        assert ended.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["port_taken"]
        assert "was taken before the ranks met; picking another" in capfd.readouterr().out
        with pytest.raises(UserError, match="is in use; give another as --master_port"):
            dist.init("cpu", 1)  # one that the user named
