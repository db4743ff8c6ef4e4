"""Live chat in a browser: by mouse, by keys alone on a phone in the dark, hostile answers, two labelers at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.browser import PHONE, accessible, chromium, in_chromium, page_of, wait_shown
from helpers.live_chat import Chat, Reply
from pipeline.labeling.serve import Address, listen

import pytest
import uvicorn

pytestmark = in_chromium
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> \u202egnp.exe"
KETTLE = [
    "I am sorry that your kettle arrived broken. We will send you a new one today.",
    "Please send it back, and we will repair it. " + "It may take a few days. " * 12,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@contextlib.contextmanager
def served(chat: Chat) -> Iterator[str]:
    """The address of a chat that a thread of this process serves."""
    with listen(Address(host="127.0.0.1", port=0, public_url=None)) as listening:
        server = uvicorn.Server(uvicorn.Config(chat.app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def say(model: int, messages: list[dict[str, str]], before: int) -> Reply:
    question = messages[-1]["content"]
    if question.startswith("hostile"):
        return Reply(HOSTILE + str(model))
    if question.startswith("same"):
        return Reply("Always the same.")
    return Reply(KETTLE[model], "length" if model else "stop")


def ready(page: Any, state: str) -> None:
    """Wait until the page asks for a question, or for a choice."""
    shown = {"ask": "#question:not(:disabled)", "choose": "#choice input:not(:disabled)"}[state]
    page.wait_for_selector(shown, timeout=10_000)
    page.wait_for_selector("#submit:not(:disabled)", timeout=10_000)


def test_a_chat_by_mouse(tmp_path: Path, browser: Any) -> None:
    chat = Chat(tmp_path, say, system="You answer customers of a shop.", compare_every=2, quality=True)
    with served(chat) as url, page_of(browser, url, chat.tokens[0]) as watched:
        page = watched.page
        ready(page, "ask")
        page.fill("#question", "My kettle arrived <b>broken</b>.")
        page.reload()
        ready(page, "ask")
        assert page.input_value("#question") == "My kettle arrived <b>broken</b>."
        page.locator("#submit").click()
        wait_shown(page, KETTLE[0])
        ready(page, "ask")
        watched.shoot("live-ask-desktop")
        accessible(page)
        page.fill("#question", "hostile")
        page.locator("#submit").click()
        ready(page, "choose")
        assert set(page.locator(".answer .text").all_text_contents()) == {
            f"{HOSTILE}{n}".replace("\u202e", "U+202E") for n in (0, 1)
        }
        assert page.locator(".text script, .text img, .text b").count() == 0
        page.get_by_text("B is better").click()
        page.locator("#strength").get_by_text("significantly").click()
        page.locator("#quality-0").get_by_text("6").click()
        wait_shown(page, "Draft saved")
        page.reload()
        page.wait_for_selector("#choice :checked")
        watched.shoot("live-choose-desktop")
        accessible(page)
        page.locator("#submit").click()
        ready(page, "ask")
        wait_shown(page, "the better one of two answers")
        page.locator("#undo").click()
        page.wait_for_selector("#choice :checked")
        ready(page, "choose")
        page.locator("#submit").click()
        ready(page, "ask")
        page.fill("#question", "Thanks")
        page.locator("#submit").click()
        page.wait_for_function("() => document.querySelectorAll('.turn.assistant').length === 3")
        ready(page, "ask")
        page.locator("#back").click()
        wait_shown(page, "it can only be read")
        assert page.locator("#submit").is_disabled()
        page.locator("#forward").click()
        ready(page, "ask")
        page.locator("#new").click()
        page.wait_for_function("() => document.querySelectorAll('.turn').length === 1")
        watched.shoot("live-new-desktop")
        accessible(page)
    (row,) = chat.exported()
    better, worse = row["shown"][1], row["shown"][0]
    assert (row["ranks"][better], row["ranks"][worse], row["strength"], row["quality"][worse]) == (1, 2, 4, 6)
    assert [m["content"] for m in row["prompt"]] == [
        chat.project.settings.system,
        "My kettle arrived <b>broken</b>.",
        KETTLE[0],
        "hostile",
    ]


def test_a_chat_by_keys_alone_on_a_phone_in_the_dark(tmp_path: Path, browser: Any) -> None:
    chat = Chat(tmp_path, say, max_turns=3)
    options = {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with served(chat) as url, page_of(browser, url, chat.tokens[0], **options) as watched:
        page = watched.page
        press = page.keyboard.press
        ready(page, "ask")
        page.keyboard.type("My kettle is broken.")  # the question has the focus
        press("Enter")
        ready(page, "choose")
        watched.shoot("live-choose-phone-dark")
        accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        press("n")  # not before the choice
        press("a")
        press("3")
        press("Enter")
        ready(page, "ask")
        page.keyboard.type("same as ever")
        press("Enter")
        wait_shown(page, "nothing to compare")
        ready(page, "ask")
        watched.shoot("live-ask-phone-dark")
        accessible(page)
        page.keyboard.type("Line one")
        press("Shift+Enter")
        page.keyboard.type("line two")
        press("Enter")
        ready(page, "choose")
        press("s")
        press("Enter")
        wait_shown(page, "This conversation has all its turns")
        press("u")  # the skip is taken back, and a tie given
        ready(page, "choose")
        press("t")
        press("Enter")
        wait_shown(page, "a tie; the conversation goes on from answer A")
        page.wait_for_selector("#new:not(:disabled)")
        press("n")
        ready(page, "ask")
        assert page.locator(".turn").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    first, last = chat.exported()
    assert ([first["ranks"][place] for place in first["shown"]], first["strength"]) == ([1, 2], 3)
    assert (last["ranks"], last["prompt"][-1]["content"]) == ([1, 1], "Line one\nline two")


def test_two_labelers_at_once_see_who_waits(tmp_path: Path, browser: Any) -> None:
    gate = threading.Event()
    chat = Chat(tmp_path, lambda model, _messages, _before: Reply(KETTLE[model], gate=gate), "ana ben", compare_every=2)
    with (
        served(chat) as url,
        page_of(browser, url, chat.tokens[0]) as ana,
        page_of(browser, url, chat.tokens[1]) as ben,
    ):
        for watched in (ana, ben):
            ready(watched.page, "ask")
            watched.page.fill("#question", "My kettle is broken.")
            watched.page.keyboard.press("Enter")
            wait_shown(watched.page, "The answer is being written." if watched is ana else "Waiting: 1 before you.")
        ben.shoot("live-waiting-desktop")
        accessible(ben.page)
        started = time.monotonic()
        assert ben.page.reload().ok
        assert time.monotonic() - started < 5, "the server answers while a model writes"
        wait_shown(ben.page, "Waiting: 1 before you.")
        gate.set()
        for watched in (ana, ben):
            wait_shown(watched.page, KETTLE[0])
            ready(watched.page, "ask")
