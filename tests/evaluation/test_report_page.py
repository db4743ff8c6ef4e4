"""The report as its readers get it: opened in a browser, with every section; and two runs compared."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here

import pytest

SECTIONS = ("win-rates", "curves", "alignment-tax", "samples", "figures", "lineage")


@pytest.fixture(scope="module")
def report(chain: Path) -> Path:
    rlhf_here(
        "report", chain, "--num-prompts", 12, "--best-of", 3, "--judge", chain / "reward", "--against", chain / "sft"
    )
    return chain / "report"


def test_figures_of_the_report(report: Path, chain: Path) -> None:
    found: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    judges = {row["judge"] for row in found["win_rates"]}
    assert {"reward", "rubric"} <= judges
    assert any(row["baseline"] == str(chain / "sft") for row in found["win_rates"]), (
        "a model outside the run answers too"
    )
    twin = [row for row in found["win_rates"] if (row["candidate"], row["baseline"]) == ("sft", str(chain / "sft"))]
    assert all(row["win_rate"] == 0.5 for row in twin), "the same weights and numbers tie with themselves"
    tax = found["alignment_tax"]["perplexity"]
    assert set(tax) == {"pretrain", "sft", "ppo", str(chain / "sft")}
    assert tax["sft"] == pytest.approx(tax[str(chain / "sft")])
    measured = found["stages"]["pretrain"]["perplexity"]
    assert found["alignment_tax"]["perplexity"]["pretrain"] == pytest.approx(measured, rel=0.2)
    curve = found["best_of_n"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 3]
    assert curve[0]["reward"] < curve[1]["reward"] < curve[2]["reward"]
    assert curve[2]["reward"] == pytest.approx(found["best_of_n"]["reward"], abs=1e-4)


def test_the_page_asks_nobody(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|action)\s*=\s*["\'](?:https?:)?//', page)
    assert "@import" not in page
    assert page.count("data:text/csv;base64,") == page.count("<figcaption>") >= 8, "every plot hands out its data"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_browser(report: Path, tmp_path: Path) -> None:
    shown = tmp_path / "page.html"
    # What a browser finds: whether anything is wider than the page, at a desktop's and at a phone's width.
    probe = "<script>addEventListener('load', () => { document.title = 'wide ' + (document.documentElement.scrollWidth - innerWidth); });</script>"
    shown.write_text(
        (report / "index.html").read_text(encoding="utf-8").replace("</body>", f"{probe}</body>"), encoding="utf-8"
    )
    for width in (1280, 500):  # chromium's windows are no narrower
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},900",
            f"--user-data-dir={tmp_path / str(width)}",
            "--dump-dom",
            f"file://{shown}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        dom = done.stdout
        for section in SECTIONS:
            assert f'id="{section}"' in dom, section
        errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not errors, errors
        (wide,) = re.findall(r"<title>wide (-?\d+)</title>", dom)
        assert int(wide) <= 0, f"{wide} pixels are cut off at a width of {width}"


def test_two_runs_compared(chain: Path, tmp_path: Path) -> None:
    same = rlhf_here("compare", chain, chain)[0]
    assert same.count("the same weights, nothing differs") == 4
    other = tmp_path / "other"
    shutil.copytree(chain / "reward", other / "reward")
    path = other / "reward" / "lineage.json"
    lineage = json.loads(path.read_text())
    lineage["recipe"]["learning_rate"] = 0.25
    lineage["metrics"]["accuracy"] = 0.99
    lineage["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(lineage))
    found = json.loads(rlhf_here("compare", chain, other, "--json")[0])
    assert found["only"][str(chain)] == ["pretrain", "sft", "ppo"]
    reward = found["stages"]["reward"]
    assert reward["recipe"] == {"learning_rate": [5e-4, 0.25]}
    assert set(reward["result"]) == {"accuracy"}
    assert (reward["same_weights"], "data" in reward) == (False, False)
    said = rlhf_here("compare", chain / "reward", other / "reward")[0]
    assert "reward: other weights" in said
    assert "learning_rate" in said
    assert "holds no finished stage" in rlhf_here("compare", chain, tmp_path, code=2)[1]
    assert "no stage in common" in rlhf_here("compare", chain / "sft", other, code=2)[1]
