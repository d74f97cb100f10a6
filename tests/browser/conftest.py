"""A browser for the tests; where there is none they are skipped, and say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import ARGUMENTS, CHROMIUM


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: bash tests/browser/install.sh")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(page, width, scheme): a view of a file or an address; any error or foreign request in it fails the test."""
    problems: list[str] = []
    views: list[Any] = []

    def opened(page: Path | str, width: int = 1280, scheme: str = "light") -> Any:
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.on("pageerror", lambda error: problems.append(f"error: {error}"))
        view.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        address = page.as_uri() if isinstance(page, Path) else page
        home = address.partition("?")[0].rstrip("/")
        own = (home, "data:", "blob:")
        view.on("request", lambda sent: None if sent.url.startswith(own) else problems.append(sent.url))
        view.goto(address)
        views.append(view)
        return view

    yield opened
    for view in views:
        view.close()
    assert problems == []
