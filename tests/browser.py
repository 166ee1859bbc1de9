"""Pages in headless Chromium, driven by playwright; a test that needs them is skipped where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""WebGL2 on the processor."""


@dataclass
class OpenedPage:
    """A page in the browser."""

    page: Any
    """Of playwright."""
    requests: list[str] = field(default_factory=list)
    """Addresses asked for, but for those of data in the page."""
    problems: list[str] = field(default_factory=list)
    """Errors of scripts, and messages on the console that are errors."""


@contextmanager
def opened(file: Path) -> Iterator[OpenedPage]:
    """A page from the disk; without a sandbox, as it is the tests' own and runs in containers too."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        own = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not Path(own).exists():
            pytest.skip("there is no browser: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox", *_SOFTWARE_GL])
        try:
            found = OpenedPage(browser.new_page(viewport={"width": 1300, "height": 900}))
            found.page.set_default_timeout(240_000)  # software rendering on a busy machine
            found.page.on(
                "request",
                lambda request: None if request.url.startswith("data:") else found.requests.append(request.url),
            )
            found.page.on("pageerror", lambda error: found.problems.append(str(error)))
            found.page.on("console", lambda said: found.problems.append(said.text) if said.type == "error" else None)
            found.page.goto(file.as_uri())
            yield found
        finally:
            browser.close()
