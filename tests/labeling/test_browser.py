"""The pages in a browser: every mode by mouse and by keys alone, phone and dark, two labelers at once, accessibility.

They need Debian's chromium and playwright, and are skipped with a word where one is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.browser import PHONE, accessible, chromium, in_chromium, page_of, wait_shown
from helpers.labeling import Client, add_labeler, comparisons, labeling_folder, read_jsonl, rlhf, serving

import pytest

pytestmark = in_chromium
FLAGS = ["Hallucination", "Harmful advice"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


def wait_done(page: Any, count: int) -> None:
    wait_shown(page, f"{count} done")
    page.wait_for_function(
        "() => !document.getElementById('submit').disabled || !document.getElementById('empty').hidden"
    )


def exported(folder: Path, kind: str = "rankings") -> list[dict[str, Any]]:
    assert rlhf("label", "export", "--folder", folder).returncode == 0
    return read_jsonl(folder / "export" / f"{kind}.jsonl")


def ranks_as_shown(row: dict[str, Any]) -> list[int | None]:
    return [row["ranks"][place] for place in row["shown"]]


# ------------------------------------------------------------------------------------------------ two answers


def test_two_answers_by_mouse(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(4), quality=True, flags=FLAGS, better_answer=True)
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana")) as watched:
        page = watched.page
        page.get_by_text("B is better").click()
        page.locator("#strength").get_by_text("significantly").click()
        page.locator("#answer-0").get_by_text(FLAGS[0]).click()
        page.locator("#quality-1").get_by_text("6").click()
        page.locator("#response").fill("A better <b>one</b>")
        wait_shown(page, "Draft saved")
        watched.shoot("compare-desktop-light")
        accessible(page)
        page.reload()
        page.wait_for_selector("#choice :checked")  # the draft came back
        assert page.input_value("#response") == "A better <b>one</b>"
        page.locator("#submit").click()
        wait_done(page, 1)
        page.locator("#choice").get_by_text("Tie").click()
        page.locator("#submit").click()
        wait_done(page, 2)
        page.locator("#choice").get_by_text("Both bad").click()
        page.locator("#submit").click()
        wait_done(page, 3)
        page.locator("#skip").click()
        page.get_by_text("The prompt makes no sense").click()
        page.locator("#skip-now").click()
        wait_shown(page, "Nothing left for you")
        accessible(page)
    first, tie, bad = exported(folder)
    assert (ranks_as_shown(first), first["margin"]) == ([2, 1], 1.0)
    assert first["flags"][first["shown"][0]] == [FLAGS[0]]
    assert first["quality"][first["shown"][1]] == 6
    assert first["seconds"] > 0
    assert (tie["ranks"], tie.get("both_bad"), bad["ranks"], bad["both_bad"]) == ([1, 1], None, [1, 1], True)
    assert [row["response"] for row in exported(folder, "demonstrations")] == ["A better <b>one</b>"]


def test_two_answers_by_keys_alone(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(5), quality=True, flags=FLAGS)
    (folder / "guidelines.md").write_text("# Be kind\n\n- to *everybody*")
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana")) as watched:
        page = watched.page
        press = page.keyboard.press
        page.wait_for_selector(".answer")
        press("Enter")
        wait_shown(page, "Choose A, B or a tie first.")
        press("g")
        wait_shown(page, "to everybody")
        accessible(page)
        press("Escape")
        press("a")
        press("Enter")
        wait_shown(page, "Say how much better it is")
        press("3")
        press("Shift+5")
        press("f")
        press("Space")
        press("Enter")
        wait_done(page, 1)
        press("ArrowRight")
        press("1")
        press("Enter")
        wait_done(page, 2)
        press("t")
        press("Enter")
        wait_done(page, 3)
        press("[")  # back to the tie, and make it "both bad"
        wait_shown(page, "This is your label")
        press("x")
        press("Enter")
        wait_shown(page, "Question 3")
        page.wait_for_function("() => !document.getElementById('undo').disabled")
        press("u")  # undo: the item is open again, with its draft
        wait_shown(page, "Undone")
        wait_done(page, 2)
        assert page.locator("#choice :checked").get_attribute("value") == "bad"
        press("Enter")
        wait_done(page, 3)
        press("s")
        press("ArrowDown")
        press("Enter")
        page.wait_for_function("() => !document.querySelector('dialog[open]')")
        wait_shown(page, "Question 4")
        page.wait_for_function("() => !document.getElementById('submit').disabled")
        press("b")
        press("4")
        press("Control+Enter")
        wait_shown(page, "Nothing left for you")
        press("?")
        wait_shown(page, "Keys of one letter are on")
        accessible(page)
    rows = exported(folder)
    assert [(ranks_as_shown(row), row.get("strength"), row.get("both_bad")) for row in rows] == [
        ([1, 2], 3, None),
        ([2, 1], 1, None),
        ([1, 1], None, True),
        ([2, 1], 4, None),
    ]
    assert rows[0]["quality"][rows[0]["shown"][0]] == 5
    assert rows[0]["flags"][rows[0]["shown"][0]] == [FLAGS[0]]


# ------------------------------------------------------------------------------------------------ rankings


def drag(page: Any, chip: int, lane: str) -> None:
    page.locator(f'.lane[data-rank="{lane}"]').scroll_into_view_if_needed()
    start, end = page.locator(f"#chip-{chip}").bounding_box(), page.locator(f'.lane[data-rank="{lane}"]').bounding_box()
    page.mouse.move(start["x"] + 10, start["y"] + 10)
    page.mouse.down()
    page.mouse.move(end["x"] + 200, end["y"] + end["height"] / 2, steps=8)
    page.mouse.up()


def test_a_ranking_with_a_tie_and_an_unranked_answer_by_dragging(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(2, 4))
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana")) as watched:
        page = watched.page
        page.wait_for_selector(".answer")
        page.locator("#submit").click()
        wait_shown(page, "Rank at least two answers")
        for chip, lane in ((0, "2"), (1, "1"), (2, "2"), (3, "3"), (3, "")):
            drag(page, chip, lane)
        watched.shoot("rank-desktop-light")
        accessible(page)
        page.locator("#submit").click()
        wait_done(page, 1)
        for number, rank in enumerate((4, 4, 1, 2)):  # or by the answers' own buttons
            page.locator(f"#ranks-{number} input[value='{rank}']").click()
        page.locator("#submit").click()
        wait_shown(page, "Nothing left for you")
    dragged, clicked = exported(folder)
    assert ranks_as_shown(dragged) == [2, 1, 2, None]
    assert ranks_as_shown(clicked) == [3, 3, 1, 2]


def test_a_ranking_with_a_tie_and_an_unranked_answer_by_keys_alone(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(2, 4))
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana")) as watched:
        page = watched.page
        page.wait_for_selector(".answer")
        for key in ("2", "1", "2", "3", "d", "0", "Enter"):
            page.keyboard.press(key)
        wait_done(page, 1)
        page.locator("#chip-0").focus()  # the lanes by Tab and arrows
        for _ in range(4):
            page.keyboard.press("ArrowUp")
        page.locator("#chip-1").focus()
        for _ in range(4):
            page.keyboard.press("ArrowUp")
        page.locator("#chip-2").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        wait_shown(page, "Nothing left for you")
    first, second = exported(folder)
    assert ranks_as_shown(first) == [2, 1, 2, None]
    assert ranks_as_shown(second) == [1, 1, 2, None]


# ------------------------------------------------------------------------------------------------ other modes and sizes


def test_an_answer_is_written_by_keys_on_a_phone_in_the_dark(tmp_path: Path, browser: Any) -> None:
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        *comparisons(1),
        *comparisons(1, 4),
    ]
    folder = labeling_folder(tmp_path, rows, quality=True, flags=FLAGS)
    options = {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana"), **options) as watched:
        page = watched.page
        page.wait_for_selector("#response")
        page.keyboard.press("w")
        page.keyboard.type("Hello there. g s u ?")
        watched.shoot("write-phone-dark")
        accessible(page)
        page.keyboard.press("Control+Enter")
        wait_done(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.get_by_text("A is better").tap()
        page.locator("#strength").get_by_text("slightly").tap()
        watched.shoot("compare-phone-dark")
        accessible(page)
        page.locator("#submit").tap()
        wait_done(page, 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        watched.shoot("rank-phone-dark")
        accessible(page)
        for number in (0, 2):
            page.locator(f"#ranks-{number} input[value='1']").tap()
        page.locator("#submit").tap()
        wait_shown(page, "Nothing left for you")
    (written,) = exported(folder, "demonstrations")
    assert (written["response"], written["prompt"]) == ("Hello there. g s u ?", rows[0]["prompt"])
    assert [ranks_as_shown(row) for row in exported(folder)] == [[1, 2], [1, None, 1, None]]


def test_two_labelers_at_once_and_the_leads_page(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(3), overlap=2)
    with serving(folder) as server:
        tokens = [add_labeler(folder, name) for name in ("ana", "ben")]
        with page_of(browser, server.url, tokens[0]) as ana, page_of(browser, server.url, tokens[1]) as ben:
            for count in (1, 2, 3):
                for watched, key in ((ana, "a"), (ben, "b")):
                    watched.page.wait_for_selector(".answer")
                    for pressed in (key, "2", "Enter"):
                        watched.page.keyboard.press(pressed)
                for watched in (ana, ben):
                    wait_done(watched.page, count)
        for scheme in ("light", "dark"):
            with page_of(browser, server.url, server.lead, color_scheme=scheme) as lead:
                lead.page.wait_for_selector("table")
                lead.shoot(f"lead-{scheme}")
                accessible(lead.page)
                if scheme == "dark":
                    link = lead.page.locator("a[href^='/lead/items/']").first
                    if link.count():
                        link.click()
                        accessible(lead.page)
                        lead.shoot("lead-item-dark")
                        lead.page.get_by_text("Judge it yourself").click()
                        lead.page.wait_for_selector(".answer")
                    lead.page.goto(f"{server.url}/lead")
                    lead.page.get_by_text("Export new labels").click()
                    wait_shown(lead.page, "6 new rankings")
    assert len(read_jsonl(folder / "export" / "rankings.jsonl")) == 6


# ------------------------------------------------------------------------------------------------ hostile text, lost connections


HOSTILE = [
    "<script>document.title = 'owned'; alert(1)</script><img src=x onerror=alert(2)>",
    "</div></main><h1>Free</h1> {{ 7 * 7 }} ${7 * 7} <!-- -->",
    "\u202egnp.exe\u202c right to left, \u2066isolated\u2069, \u200fmark",
    "control \x01\x08\x1b[31m characters and \u2028 a separator",
    "one long line " + "x" * 1_000_000,
    "\n".join(f"line {n}" for n in range(10_000)),
    "شكرا لك على رسالتك.",
    "emoji 👩‍👩‍👧 and नमस्ते stay whole",
]


def test_hostile_answers_are_shown_as_text(tmp_path: Path, browser: Any) -> None:
    rows = [{"prompt": HOSTILE[0] + str(n), "responses": HOSTILE[2 * n : 2 * n + 2]} for n in range(4)]
    folder = labeling_folder(tmp_path, rows, title=HOSTILE[0][:60])
    with serving(folder) as server, page_of(browser, server.url, add_labeler(folder, "ana")) as watched:
        page = watched.page
        for count in range(4):
            page.wait_for_selector(".answer")
            shown = page.locator(".answer .text").all_text_contents()
            expected = {as_signs(text) for text in HOSTILE[2 * count : 2 * count + 2]}
            assert set(shown) == expected
            assert page.locator(".text script, .text img, .text h1, main h1").count() == 0
            assert HOSTILE[0] in page.locator("#prompt").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
            watched.shoot(f"hostile-{count}")
            page.keyboard.press("t")
            page.keyboard.press("Enter")
            wait_done(page, count + 1)


def as_signs(text: str) -> str:
    """The text with a name in the place of each character that steers."""
    steering = "\u202e\u202c\u2066\u2069\u200f\x01\x08\x1b\u2028"
    return "".join(f"U+{ord(character):04X}" if character in steering else character for character in text)


def test_a_label_is_sent_again_until_the_server_answers(tmp_path: Path, browser: Any) -> None:
    folder = labeling_folder(tmp_path, comparisons(2))
    with serving(folder) as server:
        token = add_labeler(folder, "ana")
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/in/{token}")
        page.wait_for_selector(".answer")
        lost = []

        def lose_the_confirmation(route: Any) -> None:
            lost.append(route.fetch().status)
            route.abort()

        page.route("**/api/label", lose_the_confirmation, times=1)
        for key in ("a", "1", "Enter"):
            page.keyboard.press(key)
        wait_shown(page, "Not saved yet; trying again")
        wait_done(page, 1)
        assert lost == [200]
        assert Client(server.url, token).get("/api/history")["labels"][0]["id"] == 1
        context.close()
    assert len(exported(folder)) == 1
