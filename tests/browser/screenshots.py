"""Pictures of a page at two widths, light and dark.

    python -m tests.browser.screenshots PAGE.html OUT [HEIGHT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser.chromium import ARGUMENTS, CHROMIUM

WIDTHS = {"narrow": 390, "wide": 1280}


def main(page: str, out: str, height: str = "0") -> None:
    """`height` of the picture in pixels; 0: the whole page."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for name, width in WIDTHS.items():
            for scheme in ("light", "dark"):
                view = browser.new_page(viewport={"width": width, "height": int(height) or 900}, color_scheme=scheme)
                view.goto(Path(page).resolve().as_uri() if "://" not in page else page)
                if not int(height):
                    for y in range(0, view.evaluate("document.body.scrollHeight"), 600):  # figures are drawn when seen
                        view.evaluate(f"scrollTo(0, {y})")
                        view.wait_for_timeout(150)
                view.wait_for_timeout(500)
                view.screenshot(path=f"{out}/{name}_{scheme}.png", full_page=not int(height))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
