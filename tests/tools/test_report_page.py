"""Test the report's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.report.compare.make import make_report
from tests.support.runs import write_sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a sweep over three batches and three seeds."""
    sweep = write_sweep(tmp_path_factory.mktemp("runs") / "sweep")
    report = make_report([str(sweep)], compose(["action=report"]).report)
    assert report.directory == sweep / "report"
    return sweep / "report" / "report.html"


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, sweep_page: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Open the page, fail on its errors, and on any request of the network."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    opened, problems = context.new_page(), list[str]()
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on(
        "request", lambda asked: problems.append(asked.url) if not asked.url.startswith(("file:", "data:")) else 0
    )
    opened.goto(sweep_page.as_uri())
    yield opened
    context.close()
    assert problems == []


def test_panels_are_drawn_as_they_come_into_view(page: Page) -> None:
    page.locator("h3", has_text="Training loss").scroll_into_view_if_needed()
    first = page.locator(".plot").first
    first.locator(".scatterlayer .trace").first.wait_for()
    assert first.locator(".scatterlayer .trace").count() == 9


def test_a_chip_hides_its_group(page: Page) -> None:
    first = page.locator(".plot").first
    first.scroll_into_view_if_needed()
    first.locator(".scatterlayer .trace").first.wait_for()
    chip = page.locator(".chip", has_text="batch 64")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert first.locator(".scatterlayer .trace").count() == 6
