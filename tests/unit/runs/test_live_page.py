"""The page of a run that is rewritten: how often, what is escaped, when it renews itself; and in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.errors import StorageError
from mpscl_ray.runs import live_page
from mpscl_ray.runs.curves import curves
from mpscl_ray.runs.live_page import Content, LivePage, LiveTable
from tests.browser import opened

REFRESH = '<meta http-equiv="refresh"'


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.mark.parametrize(("took_s", "pause_s"), [(0.0, 20.0), (1.0, 100.0)])
def test_a_page_is_rarely_written_and_takes_little_of_the_time(tmp_path: Path, took_s: float, pause_s: float) -> None:
    clock = Clock()
    written = 0

    def content() -> Content:
        nonlocal written
        written += 1
        clock.time += took_s
        return Content("run", "running", 0.5)

    page = LivePage(tmp_path / "progress.html", content, clock)
    page.update()
    clock.time += pause_s - 1
    page.update()
    assert written == 1
    clock.time += 1
    page.update()
    assert written == 2
    page.update(at_once=True)
    assert written == 3


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(live_page, "write_atomically", full)
    LivePage(tmp_path / "progress.html", lambda: Content("run", "running", 0.5)).update()
    assert not list(tmp_path.iterdir())


def test_the_page_renews_itself_until_the_work_is_done() -> None:
    assert REFRESH in live_page.live_page(Content("run", "running", 0.99))
    assert REFRESH not in live_page.live_page(Content("run", "finished", 1.0))


def test_texts_are_escaped_and_rows_lead_to_their_pages() -> None:
    table = LiveTable(
        ["run", "state"], [["<i>one</i>", "running"], ["two", "waiting"]], ["cells/one/progress.html", ""]
    )
    text = live_page.live_page(Content("<b>run</b>", "running", 0.5, notices=["a < b"], tables=[table]))
    assert "<b>" not in text
    assert "<i>" not in text
    assert "<li>a &lt; b</li>" in text
    assert '<td><a href="cells/one/progress.html">&lt;i&gt;one&lt;/i&gt;</a></td>' in text
    assert "<td>two</td>" in text


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    records = [
        {"global_step": step, "phase": "source_only", "train/loss_segmentation": 1 / step, "val/entropy": 0.5}
        for step in range(1, 30)
    ]
    file = tmp_path / "progress.html"
    LivePage(file, lambda: Content("run", "running", 0.5, curves=curves(records))).update()
    with opened(file) as seen:
        assert seen.page.locator("#curves canvas").count() == 2
        assert seen.page.locator(".u-title").all_inner_texts()[1] == "training losses"
        # A click on a name hides its curve.
        name = seen.page.locator("#curves .u-series", has_text="segmentation")
        name.locator("th").click()
        assert "u-off" in (name.get_attribute("class") or "")
        assert seen.requests == [file.as_uri()]
        assert seen.problems == []
