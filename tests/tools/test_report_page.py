"""Test the report's page in a real browser, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.report.compare.make import make_report
from tests.support.runs import learned, write_run, write_sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
HOSTILE = "<img src=x onerror=\"document.title='owned'\">$x^2$</script><script>document.title='owned'</script>"


def write_report(folder: Path) -> Path:
    """Write the report on the runs in ``folder``; return its page."""
    make_report([str(folder)], compose(["action=report"]).report)
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sweep of three batches and three seeds, a crashed run, and a second task. Return the report's page."""
    folder = write_sweep(tmp_path_factory.mktemp("runs") / "sweep")
    write_run(folder / "crashed", learned(64, 9, steps=20), batch=64, lr=3.0, seed=9, state="crashed")
    write_run(folder / "other", learned(64, 0), task="images")
    return write_report(folder)


@contextmanager
def opened(browser: Browser, file: Path, **context: Any) -> Iterator[Page]:
    """Open a page; fail on its errors and on any request over a network."""
    shown = browser.new_context(**context)
    page, problems = shown.new_page(), list[str]()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else problems.append(asked.url))
    page.goto(file.as_uri())
    yield page
    shown.close()
    assert problems == []


def drawn(page: Page, title: str) -> Locator:
    """Return the panel with this title, once it is drawn."""
    panel = page.locator(".panel", has_text=title).first
    panel.scroll_into_view_if_needed()
    panel.locator(".scatterlayer .trace").first.wait_for(state="attached")
    return panel


def hovered(page: Page, panel: Locator) -> str:
    """Return what a panel says of its first point."""
    box = panel.locator(".point").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    panel.locator(".hoverlayer .hovertext").first.wait_for()
    return panel.locator(".hoverlayer").text_content() or ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_panel_is_drawn_and_nothing_is_wider_than_the_screen(
    browser: Browser, sweep_page: Path, size: dict[str, Any], scheme: str
) -> None:
    with opened(browser, sweep_page, color_scheme=scheme, **size) as page:
        plots = page.locator(".plot")
        for number in range(plots.count()):
            plots.nth(number).scroll_into_view_if_needed()
            plots.nth(number).locator(".scatterlayer .trace").first.wait_for(state="attached")
        assert plots.count() > 12
        assert page.evaluate("document.documentElement.scrollWidth") <= size["viewport"]["width"]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, paper[4:-1].split(","))) / 3
        assert (brightness > 200) == (scheme == "light")


def test_findings_tables_and_marks_are_there(browser: Browser, sweep_page: Path) -> None:
    with opened(browser, sweep_page, **DESKTOP) as page:
        assert page.locator("h2").all_text_contents() == ["digits", "images"]
        assert "val/accuracy at the end" in page.locator(".findings").first.inner_text()
        assert "1 run crashed" in page.locator(".warnings").inner_text()
        table = page.locator("table").first
        assert table.locator("tbody tr").count() == 4
        assert table.locator("td b").count() == 6  # three accuracies that are alike, steps, samples, time
        page.locator("summary").first.click()
        assert page.locator("details").first.locator("tbody tr").count() == 10
        assert drawn(page, "Training loss by steps").locator(".scatterlayer .trace").count() == 11  # with a cross


def test_a_chip_hides_and_shows_its_group_in_every_panel(browser: Browser, sweep_page: Path) -> None:
    with opened(browser, sweep_page, **DESKTOP) as page:
        panels = [drawn(page, f"Training loss by {axis}") for axis in ("steps", "samples")]
        chip = page.locator(".chip", has_text="batch 256")
        for shown, traces in (("false", 8), ("true", 11)):
            chip.click()
            assert chip.get_attribute("aria-pressed") == shown
            assert [panel.locator(".scatterlayer .trace").count() for panel in panels] == [traces, traces]
        crashed = page.locator(".chip", has_text="LR 3")
        assert crashed.get_attribute("aria-pressed") == "true"  # though batch 64 has a better LR
        crashed.click()
        assert panels[0].locator(".scatterlayer .trace").count() == 9  # without its cross


def test_axes_change_between_linear_and_logarithmic(browser: Browser, sweep_page: Path) -> None:
    with opened(browser, sweep_page, **DESKTOP) as page:
        panel = drawn(page, "Training loss by samples")
        plot, kind = panel.locator(".plot"), "(plot) => plot.layout.xaxis.type"
        for before, after in (("log", "linear"), ("linear", "log")):
            assert plot.evaluate(kind) == before
            panel.get_by_role("button", name=f"x: {before}").click()
            assert plot.evaluate(kind) == after
            assert panel.get_by_role("button", name=f"x: {after}").count() == 1


def test_a_point_says_its_run_and_values(browser: Browser, sweep_page: Path) -> None:
    with opened(browser, sweep_page, **DESKTOP) as page:
        said = hovered(page, drawn(page, "val/accuracy by samples"))
        assert "val/accuracy" in said
        assert "samples" in said
        assert "seed" in said


def test_texts_beside_points_do_not_overlap_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    for rule, quality in {"linear": 1.0, "none": 0.7}.items():
        for batch in (16, 64):
            lines = learned(batch, 0, quality=quality, steps=25_600 // batch)
            write_run(tmp_path / f"{rule}-{batch}", lines, batch=batch, lr__rule=rule)
    with opened(browser, write_report(tmp_path), **PHONE) as page:
        texts = drawn(page, "Time against samples").locator(".textpoint").all()
        boxes = [box for text in texts if (box := text.bounding_box())]
        assert len(boxes) == 4
        for one, other in combinations(boxes, 2):
            beside = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            below = one["y"] + one["height"] <= other["y"] + 2 or other["y"] + other["height"] <= one["y"] + 2
            assert beside or below


def test_colours_follow_the_scheme_while_the_page_is_open(browser: Browser, sweep_page: Path) -> None:
    with opened(browser, sweep_page, color_scheme="light", **DESKTOP) as page:
        panel = drawn(page, "Training loss by steps")
        colour = "(plot) => [plot.layout.font.color, plot.data[0].line.color]"
        light = panel.locator(".plot").evaluate(colour)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("(before) => document.querySelector('.plot').layout.font.color !== before", arg=light[0])
        dark = panel.locator(".plot").evaluate(colour)
        assert all(one != other for one, other in zip(light, dark, strict=True))


def test_text_of_runs_is_never_run(browser: Browser, tmp_path: Path) -> None:
    for batch in (16, 64):
        lines = [line | {f"val/{HOSTILE}": 0.5} if "val/loss" in line else line for line in learned(batch, 0)]
        run = write_run(tmp_path / f"batch-{batch}", lines, task=HOSTILE, batch=batch, task__note=f"{HOSTILE}{batch}")
        (run / "events.jsonl").write_text('{"event": "crashed", "cause": "<b id=mine>\\u001b[2J"}\n')
    with opened(browser, write_report(tmp_path), **DESKTOP) as page:
        for number in range(page.locator(".plot").count()):
            page.locator(".plot").nth(number).scroll_into_view_if_needed()
        drawn(page, "Training loss by steps")
        assert "owned" not in page.title().replace(HOSTILE, "")
        assert page.locator("img, #mine").count() == 0
        assert HOSTILE in page.locator(".chip").first.inner_text()


def test_a_name_is_no_template(browser: Browser, tmp_path: Path) -> None:
    name = "%{y} 5% &lt;"
    for batch in (16, 64):
        lines = [line | {f"val/{name}": 0.5} if "val/loss" in line else line for line in learned(batch, 0)]
        write_run(tmp_path / f"batch-{batch}", lines, batch=batch, task__note=f"{name}{batch}")
    with opened(browser, write_report(tmp_path), **DESKTOP) as page:
        said = hovered(page, drawn(page, f"val/{name} by steps"))
        assert said.count(name) == 2  # of the axis and of the run


def test_one_run_has_a_page(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", learned(64, 0))
    with opened(browser, write_report(run), **DESKTOP) as page:
        assert drawn(page, "Training loss by steps").locator(".scatterlayer .trace").count() == 1
        assert page.locator(".chip").count() == 0
