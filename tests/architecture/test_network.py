"""No server but torch's, where ranks meet: sockets are bound for a moment, on loopback, to see that a port is free."""

from __future__ import annotations

import ast
from pathlib import Path

REPO = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("tristage", "benchmarks", "step*_*") for path in REPO.glob(f"{folder}/**/*.py"))
MODULES = {"socketserver", "http.server", "xmlrpc.server", "wsgiref", "asyncio", "uvicorn", "flask", "fastapi"}
CALLS = {"bind", "listen", "accept", "create_server", "serve_forever"}


def servers(tree: ast.AST) -> list[str]:
    """Imports that serve, and calls that open a port other than `bind(("127.0.0.1", ...))`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            call = f"{node.func.attr}({', '.join(ast.unparse(argument) for argument in node.args)})"
            found += [] if call.startswith("bind(('127.0.0.1', ") else [call]
    return found


def test_servers_are_seen() -> None:
    text = "import asyncio\nfrom http.server import X\ns.bind(('', 0))\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
    assert sorted(servers(ast.parse(text))) == ["asyncio", "bind(('', 0))", "http.server", "listen()"]


def test_nothing_opens_a_port() -> None:
    assert len(SOURCES) > 40
    found = {path.name: servers(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {name: calls for name, calls in found.items() if calls} == {}
