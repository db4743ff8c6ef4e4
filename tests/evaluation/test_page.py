"""The report's page as its readers get it: in a browser, on a phone, in the dark, with every section."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from helpers.runs import make_run, write_history
from pipeline.evaluation.page import duration, energy, metric_rows, number, proxy_and_gold, share
from pipeline.evaluation.plots import bars, curve
from pipeline.evaluation.report import ReportOptions, write_report

import pytest

SECTIONS = (
    "verdict",
    "win-rates",
    "curves",
    "alignment-tax",
    "agreement",
    "samples",
    "extremes",
    "metrics",
    "energy",
    "lineage",
)
PHONE, DESKTOP = 390, 1280
LONGEST = 9000  # pixels of the page on a phone, sections folded


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    run = make_run(tmp_path_factory.mktemp("page") / "run", tokenizer)
    write_history(run, [0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4], error=0.02)
    return write_report(str(run), ReportOptions(num_prompts=60, best_of=2, watts=50.0)) / "index.html"


def test_the_page_asks_nobody(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|action)\s*=\s*["\'](?:https?:)?//', text)
    assert "@import" not in text
    assert text.count("data:text/csv;base64,") == text.count("<figcaption>") >= 4, "every plot hands out its data"


def test_the_verdict_comes_first_and_the_contents_lead_to_every_section(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = [text.index(f'id="{section}"') for section in SECTIONS]
    assert places == sorted(places)
    for section in SECTIONS[1:]:
        assert f'href="#{section}"' in text
        assert f'<details id="{section}"' in text, "it folds"
    assert "over-optimised from rollout" in text[: text.index("<nav")]


def test_every_label_of_a_plot_has_the_colour_of_the_page() -> None:
    for plot in (
        bars("Labelers $\\frac{1$", "share", {"model": {"$x^{$": 0.5, "名前": 0.4}, "noise": {"$x^{$": 0.9}}),
        curve("Loss", "step", "nats", {"training": [(0.0, 1.0), (1.0, 0.5)], "held out": [(1.0, 0.7)]}, ["0", "1"]),
    ):
        labels = re.findall(r"<text[^>]*>", plot.svg)
        assert len(labels) > 5
        for label in labels:
            assert re.search(r"fill: currentColor", label), label
        assert "#010203" not in plot.svg
        assert "$x^{$" in plot.svg or "Loss" in plot.svg


def test_reward_and_judges_share_a_plot() -> None:
    points = [
        {"step": 10 * i, "kl": 3.0 * i, "reward": a, "rubric": b}
        for i, (a, b) in enumerate(zip([0.0, 1.0, 2.0, 4.0], [0.5, 0.9, 0.7, 0.5], strict=True))
    ]
    plot = proxy_and_gold(points, ["rubric"])
    found = {
        name: [row["share of its largest move"] for row in plot.rows if row["series"] == name]
        for name in ("reward (trained)", "rubric")
    }
    assert found == {"reward (trained)": [0.0, 0.25, 0.5, 1.0], "rubric": pytest.approx([0.0, 1.0, 0.5, 0.0])}


def test_numbers_in_units_that_people_use() -> None:
    assert [duration(s) for s in (0.001, 12.34, 90, 5400, 200_000)] == [
        "under 0.01 s",
        "12.3 s",
        "1.5 min",
        "1.5 h",
        "2.3 days",
    ]
    assert [energy(x) for x in (3.05e-5, 0.4, 2500.0)] == ["0.0305 Wh", "0.4 kWh", "2,500 kWh"]
    assert [share(x) for x in (0.5, None)] == ["50.0%", "not identified"]
    assert [number(x) for x in (None, 0.0, 0.12345, 1234.5, 1.5e9, 1234567, True)] == [
        "–", "0", "0.123", "1,234", "1.50e+09", "1,234,567", "True",
    ]  # fmt: skip
    assert metric_rows({"a": {"b": 1, "c": {"d": {"e": 2}}}, "calibration": {"x": 1}}) == [
        ("a.b", 1),
        ("a.c.d", {"e": 2}),
    ]


def in_browser(page: Path, folder: Path, width: int, dark: bool) -> str:
    """The title that a probe in the page writes: how far it is wider than the window, its height, labels darker than the paper."""
    probe = """<script>addEventListener('load', () => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (r + g + b) / 765; };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const ends = [...document.querySelectorAll('svg text')].filter(t => Math.abs(light(getComputedStyle(t).fill) - paper) < 0.4);
      document.title = ['probe', document.documentElement.scrollWidth - innerWidth, document.documentElement.scrollHeight, ends.length,
        document.querySelectorAll('svg text').length, paper < 0.5].join(' ');
      if (parent !== window) parent.postMessage(document.title, '*');
    });</script>"""
    shown = folder / "page.html"
    shown.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{probe}</body>"), encoding="utf-8")
    frame = folder / "frame.html"  # chromium's own windows are no narrower than 500 pixels
    frame.write_text(
        "<meta name=color-scheme content='light dark'><script>addEventListener('message', e => { document.title = e.data; });</script>"
        f"<iframe src='page.html' style='border:0;width:{width}px;height:2000px'></iframe>",
        encoding="utf-8",
    )
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--window-size={width},900",
        f"--user-data-dir={folder / f'{width}-{dark}'}", "--virtual-time-budget=5000", "--dump-dom",
        *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []), f"file://{frame}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors, errors
    (title,) = re.findall(r"<title>probe (.*?)</title>", done.stdout)
    return str(title)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing is cut off, a phone need not scroll for ever, and every label can be read in the light and in the dark."""
    wide, height, unreadable, labels, is_dark = in_browser(page, tmp_path, width, dark).split()
    assert int(wide) <= 0, f"{wide} pixels are cut off at a width of {width}"
    assert int(height) < LONGEST
    assert (int(unreadable), is_dark) == (0, str(dark).lower())
    assert int(labels) > 50
