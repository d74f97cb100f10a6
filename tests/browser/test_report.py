"""A report in a real browser: what is drawn, sorted and filtered, at two widths, in light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import write_ppo, write_run, write_samples
from tristage.reporting.report import write_report

EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a pipeline."""
    out = tmp_path_factory.mktemp("pipeline")
    losses = [{"step": step, "sft/loss": 3.0 / step} for step in range(1, 50)]
    write_run(out / "step1_sft", "step1_sft", losses, [{"step": at, "sft/loss": 3.0 - at / 49} for at in (0, 49)])
    before, after = [0.1 * i for i in range(30)], [0.1 * i + 1 + i % 2 for i in range(30)]
    run = write_ppo(out / "step3_ppo", [before, after], [before, after])
    texts = [(f"Question {i} {'x' * 90}", f"old {i}", f"new {i}") for i in range(12)]
    write_samples(run, [*texts, (EVIL, EVIL, EVIL)])
    return write_report([out])[0]


def drawn(view: Any) -> int:
    return int(view.locator(".plot .main-svg").count())


@pytest.mark.parametrize("width", (390, 1280))
def test_all_is_there_and_nothing_scrolls_sideways(visit: Visit, page: Path, width: int) -> None:
    view = visit(page, width)
    assert view.locator("h1").count() == 1 and view.locator("main h2").count() == 2
    assert view.locator(".headline").all_inner_texts()[1].startswith("Better: both")
    for place in view.locator("summary").all():
        if place.locator("..").get_attribute("open") is None:
            place.click()
    for plot in view.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert view.title() != "taken" and view.locator("img").count() == 0


def test_figures_have_words_and_are_drawn_when_seen(visit: Visit, page: Path) -> None:
    view = visit(page)
    labels = [plot.get_attribute("aria-label") for plot in view.locator(".plot").all()]
    assert all(labels) and any("sft/loss: training from 3 to" in str(label) for label in labels)
    view.wait_for_timeout(300)
    assert drawn(view) < 2 * len(labels)  # those far below wait
    view.locator(".plot").last.scroll_into_view_if_needed()
    view.locator(".plot").last.locator(".main-svg").first.wait_for()


def test_samples_sort_filter_and_turn_pages(visit: Visit, page: Path) -> None:
    view = visit(page)
    prompts = view.locator(".sample > p")
    assert prompts.count() == 10 and prompts.first.inner_text().startswith("Question 0")
    view.get_by_label("Sort by").select_option("score")
    assert EVIL in prompts.first.inner_text() and prompts.nth(1).inner_text().startswith("Question 11")
    view.get_by_label("Order").select_option("lowest first")
    assert prompts.first.inner_text().startswith("Question 0")
    view.get_by_role("button", name="Next").press("Enter")  # by keyboard
    assert prompts.count() == 3 and view.get_by_role("status").inner_text() == "11 to 13 of 13"
    view.get_by_label("Only with this text").fill("new 7")
    assert prompts.count() == 1 and prompts.first.inner_text().startswith("Question 7")
    assert view.locator(".side p").all_inner_texts() == ["old 7", "new 7"]
    view.get_by_label("Only with this text").fill("nowhere")
    assert view.get_by_role("status").inner_text() == "none has this text"
    view.get_by_label("Only with this text").fill("")
    view.get_by_label("Which").select_option("rollouts")
    assert prompts.count() == 1 and "iteration 2" in view.locator(".side h5").inner_text()


def test_dark_and_light_differ_and_keep_contrast(visit: Visit, page: Path) -> None:
    ratios = []
    for scheme in ("light", "dark"):
        view = visit(page, scheme=scheme)
        text, behind = (
            view.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        ratios.append(contrast(text, behind))
        axis = view.locator(".plot .xtick text").first
        axis.wait_for()
        assert contrast(axis.evaluate("x => getComputedStyle(x).fill"), behind) > 4.5
    assert min(ratios) > 7


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as browsers write them."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_keyboard_reaches_the_verdict_first(visit: Visit, page: Path) -> None:
    view = visit(page)
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.textContent") == "Skip to the content"
    view.keyboard.press("Enter")
    assert view.evaluate("location.hash") == "#main"
