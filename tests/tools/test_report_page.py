"""Test the report's page in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_the_browser_starts(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content("<title>report</title>")
    assert page.title() == "report"
