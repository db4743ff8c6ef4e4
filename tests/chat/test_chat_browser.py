"""The chat page in a browser: by mouse and by keys, two models, hostile answers, phone and dark, accessibility.

They need Debian's chromium and playwright, and are skipped with a word where one is missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.browser import accessible, chromium, in_chromium, shoot
from helpers.launches import ROOT
from helpers.runs import make_run

pytestmark = in_chromium
MODEL = os.environ.get("CHAT_MODEL")  # a run whose answers can be read, for the screenshots


@contextlib.contextmanager
def serving(*words: object) -> Iterator[str]:
    """The address of `rlhf chat --web`."""
    command = [sys.executable, "-m", "pipeline.cli", "chat", *map(str, words), "--web", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield next(match[1] for line in process.stdout if (match := re.search(r"serving at (\S+);", line)))
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def page_of(url: str, **options: Any) -> Iterator[Any]:
    """A page that makes no error, writes nothing to the console, and asks nobody else."""
    faults: list[str] = []
    with chromium() as browser:
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        # The browser itself writes a line where the server refuses a question.
        page.on("console", lambda message: faults.append(message.text) if "422" not in message.text else None)
        page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((url, "data:")) else None)
        page.goto(url)
        yield page
    assert not faults


def wait_idle(page: Any) -> None:
    page.wait_for_selector("#send:not([hidden])")


def answers(page: Any) -> list[str]:
    return page.locator("#log .answer .text").all_inner_texts()


def test_a_conversation(tmp_path: Path, tokenizer: Any) -> None:
    run = MODEL or make_run(tmp_path / "run", tokenizer)
    with serving(run, "--system", "Be brief.", "--max-tokens", "24") as url, page_of(url) as page:
        assert page.input_value("#system") == "Be brief."
        page.fill("#question", "My kettle arrived broken.\n<b>What now?</b>")
        page.keyboard.press("Enter")
        wait_idle(page)
        assert page.locator("#log .turn .text").inner_text() == "My kettle arrived broken.\n<b>What now?</b>"
        assert page.locator("#log b").count() == 0
        page.fill("#question", "When does it come?")
        page.locator("#send").click()
        wait_idle(page)
        first = answers(page)
        assert len(first) == 2
        shoot(page, "chat-desktop-light")
        accessible(page)
        page.locator("#retry").click()
        wait_idle(page)
        assert (len(answers(page)), answers(page)[0]) == (2, first[0])
        page.fill("#question", "word " * 500)
        page.keyboard.press("Enter")
        page.wait_for_selector("#message:not([hidden])")
        wait_idle(page)
        assert "begin a new one" in page.inner_text("#message") or MODEL
        page.locator("#new").click()
        assert answers(page) == []
        page.fill("#question", "Hello")
        page.keyboard.press("Enter")
        page.locator("#stop").click()
        wait_idle(page)


def test_two_models_beside_each_other(tmp_path: Path, tokenizer: Any) -> None:
    run = Path(MODEL or make_run(tmp_path / "run", tokenizer))
    phone = {"viewport": {"width": 400, "height": 850}, "color_scheme": "dark"}
    with serving(run, "--compare", run / "sft", "--max-tokens", "24") as url, page_of(url, **phone) as page:
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        page.fill("#question", "My kettle arrived broken.")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Go on from this one").nth(1).click()
        assert page.locator(".answer.better h2").inner_text() == f"{run}/sft"
        shoot(page, "chat-phone-dark")
        accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        chosen = answers(page)[1]
        page.fill("#question", "When?")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelectorAll('.answer').length === 4")
        wait_idle(page)
        if chosen.strip() and not MODEL:
            assert [m["role"] for m in sent[-1]["messages"]] == ["user", "assistant", "user"]
        assert [body["model"] for body in sent] == [0, 1, 0, 1]
        accessible(page)
