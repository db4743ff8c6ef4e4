"""Pages in Debian's chromium, driven by playwright: what they must not do, screenshots, accessibility.

Whoever imports this is skipped with a word where chromium or playwright is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PHONE = {"width": 390, "height": 844}
SHOTS = os.environ.get("LABELING_SCREENSHOTS")  # a folder for screenshots to look at
in_chromium = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclass
class Watched:
    """A page, and what it did that no page may: errors, words in the console, requests elsewhere."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def shoot(self, name: str) -> None:
        shoot(self.page, name)


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


@contextlib.contextmanager
def page_of(browser: Any, url: str, token: str, **options: Any) -> Iterator[Watched]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    watched = Watched(page)
    page.on("pageerror", lambda error: watched.faults.append(str(error)))
    page.on("console", lambda message: watched.faults.append(message.text))
    page.on("dialog", lambda dialog: watched.faults.append(dialog.message))
    page.on(
        "request",
        lambda request: watched.faults.append(request.url) if not request.url.startswith((url, "data:")) else None,
    )
    page.goto(f"{url}/in/{token}")
    yield watched
    assert not watched.faults
    context.close()


def wait_shown(page: Any, text: str) -> None:
    try:
        page.wait_for_function("text => document.body.innerText.includes(text)", arg=text, timeout=10_000)
    except playwright.TimeoutError:
        raise AssertionError(f"{text!r} is not in the page: {page.inner_text('body')[:2000]}") from None


def accessible(page: Any) -> None:
    """Deque's axe finds nothing serious in the page as it is now."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    (source,) = Path(axe.__file__).parent.rglob("axe.min.js")
    page.evaluate(source.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run()")["violations"]
    serious = [
        (fault["id"], fault["nodes"][0]["html"][:200]) for fault in found if fault["impact"] in ("serious", "critical")
    ]
    assert not serious
