"""`rlhf run`, `rlhf check` and `rlhf report` as their users call them."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, STAGES, TINY, environment, lineage, rlhf

import psutil
import pytest
import yaml

RLHF = [sys.executable, "-m", "pipeline.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, recipes: Path) -> Path:
    """The demo's recipes at tiny size, as a recipe folder. Their run is another one than the demo's, which may be here."""
    folder = tmp_path_factory.mktemp("tiny-recipe")
    for stage in STAGES:
        values = {**yaml.safe_load((recipes / f"{stage}.yaml").read_text()), **TINY[stage]}
        if stage == "reward":
            values["parent"] = "./runs/demo/sft/"  # another spelling of what sft.yaml writes
        text = yaml.safe_dump(values).replace("runs/demo", "runs/tiny-recipe")
        (folder / f"{stage}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Path:
    """What `rlhf run` of the recipe leaves."""
    folder = tmp_path_factory.mktemp("run")
    for stage in STAGES:
        shutil.copytree(chain / stage, folder / stage)
    return folder


@pytest.mark.parametrize("last", ["sft", pytest.param("ppo", marks=pytest.mark.full)])
def test_a_run_hands_each_stage_to_the_next(recipe: Path, tmp_path: Path, last: str) -> None:
    (tmp_path / "recipe").mkdir()
    for stage in STAGES:
        values = yaml.safe_load((recipe / f"{stage}.yaml").read_text())
        few: dict[str, Any] = (
            {"total_rollouts": 2} if stage == "ppo" else dict.fromkeys(("max_steps", "eval_steps", "save_steps"), 5)
        )
        if stage == "sft":
            few["parent"] = "./runs/tiny-recipe/pretrain/"  # another spelling of what pretrain.yaml writes
        (tmp_path / "recipe" / f"{stage}.yaml").write_text(yaml.safe_dump({**values, **few}))
    run = tmp_path / "run"
    done = rlhf("run", tmp_path / "recipe", "--output-dir", run, "--to", last)
    stages = STAGES[: STAGES.index(last) + 1]
    told = [line for line in done.stdout.splitlines() if re.match(r"(pretrain|sft|reward|ppo): ", line)]
    assert [line.split(":")[0] for line in told] == list(stages), "one clear line a stage"
    for stage, parent in (("sft", "pretrain"), ("reward", "sft"), ("ppo", "sft")):
        if stage in stages:
            assert lineage(run / stage)["parents"][0]["weights_sha256"] == lineage(run / parent)["weights_sha256"]
    if last == "ppo":
        assert lineage(run / "ppo")["parents"][1]["weights_sha256"] == lineage(run / "reward")["weights_sha256"]


@pytest.mark.full
def test_a_second_run_skips_what_is_done(run: Path, recipe: Path) -> None:
    done = rlhf("run", recipe, "--output-dir", run)
    assert done.stdout.count("already complete") == 4


@pytest.mark.full
def test_part_of_a_run(run: Path, recipe: Path, tmp_path: Path) -> None:
    for stage in ("sft", "reward"):
        shutil.copytree(run / stage, tmp_path / stage)
    rlhf("run", recipe, "--output-dir", tmp_path, "--from", "ppo", "--to", "ppo")
    assert lineage(tmp_path / "ppo")["weights_sha256"] == lineage(run / "ppo")["weights_sha256"], (
        "the same inputs, the same weights"
    )
    assert (
        "has no stage 'dpo'; it has: pretrain, sft, reward, ppo" in rlhf("run", recipe, "--from", "dpo", code=2).stderr
    )
    assert "comes after --to sft" in rlhf("run", recipe, "--from", "ppo", "--to", "sft", code=2).stderr
    assert "no recipe folder" in rlhf("run", tmp_path / "none", code=2).stderr


@pytest.mark.full  # `test_the_true_exit_code_and_no_traceback` is the quick one
def test_a_failing_stage_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    done = rlhf("run", recipe, "--output-dir", tmp_path, "--from", "sft", code=2)
    assert "error: sft: parent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "reward").exists()


@pytest.mark.full
def test_an_interrupted_run_resumes(run: Path, recipe: Path, tmp_path: Path) -> None:
    """SIGTERM to `rlhf run` ends stage and command with 143; the same command goes on."""
    shutil.copytree(run / "pretrain", tmp_path / "pretrain")
    process = subprocess.Popen(
        [*RLHF, "run", str(recipe), "--output-dir", str(tmp_path), "--to", "sft"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "sft").glob("checkpoint-*[0-9]/manifest.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"run the same command again to resume: rlhf run {recipe} --output-dir {tmp_path} --to sft\n" in out
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    rlhf("run", recipe, "--output-dir", tmp_path, "--to", "sft")
    assert lineage(tmp_path / "sft")["weights_sha256"] == lineage(run / "sft")["weights_sha256"]
    assert lineage(tmp_path / "sft")["resumed_from"][0] > 0


# ---------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    done = rlhf("report", run, "--num-prompts", 12)
    assert done.stdout.startswith("report: ")
    assert "Warning" not in done.stderr
    found: dict[str, Any] = json.loads((run / "report" / "report.json").read_text())
    return found


def test_the_report_has_every_figure(report: dict[str, Any]) -> None:
    stages = report["stages"]
    assert stages["pretrain"]["perplexity"] > 1
    assert stages["pretrain"]["bits_per_byte"] > 0
    assert stages["sft"]["loss"] > 0
    assert 0 < stages["reward"]["accuracy"] < stages["reward"]["noise_ceiling"] < 1
    assert set(stages["reward"]["accuracy_by_labeler"]) == {"ana", "ben", "chloe", "dev", "erik"}
    assert 0 < stages["reward"]["held_out_labeler_accuracy"] <= 1
    assert stages["ppo"]["kl"] > 0
    assert stages["ppo"]["response_tokens"] > 0
    assert set(report["seconds"]) == set(STAGES)
    assert set(report["lineage"]) == set(STAGES)
    assert report["notes"] == []
    pairs = {(row["candidate"], row["baseline"], row["judge"]) for row in report["win_rates"]}
    names = ("pretrain", "sft", "best_of_8", "ppo")
    assert pairs == {(c, b, j) for i, c in enumerate(names) for b in names[:i] for j in ("reward", "rubric")}
    assert report["best_of_n"]["n"] == 8
    assert report["best_of_n"]["kl"] == pytest.approx(math.log(8) - 7 / 8)
    chosen = next(
        r for r in report["win_rates"] if (r["candidate"], r["baseline"], r["judge"]) == ("best_of_8", "sft", "reward")
    )
    assert chosen["win_rate"] > 0.6, "the judge chose them itself"
    for row in report["win_rates"]:
        assert 0 <= row["ci95"][0] <= row["win_rate"] <= row["ci95"][1] <= 1
        assert row["prompts"] == 12
    assert len(report["samples"]) == 12
    for sample in report["samples"]:
        assert set(sample["responses"]) == set(names)
        assert set(sample["responses"]["ppo"]["scores"]) == {"reward", "reward_model", "rubric"}
    steps = [point["step"] for point in report["frontier"]]
    assert steps == [0, 3, 6]
    assert report["frontier"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert {"kl", "reward", "rubric"} <= set(report["frontier"][0])


def test_win_rates_are_recounted(report: dict[str, Any]) -> None:
    """The table's number is what the samples' scores say."""
    row = next(
        r for r in report["win_rates"] if (r["candidate"], r["baseline"], r["judge"]) == ("ppo", "sft", "rubric")
    )
    wins = [
        (s["responses"]["ppo"]["scores"]["rubric"], s["responses"]["sft"]["scores"]["rubric"])
        for s in report["samples"]
    ]
    assert row["win_rate"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in wins) / len(wins))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.svgs = 0
        self.external: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href") and value and value.startswith(("http", "//")):
                self.external.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(run: Path, report: dict[str, Any]) -> None:
    page = Page()
    page.feed((run / "report" / "index.html").read_text())
    assert page.svgs >= 9
    assert page.external == [], "one file that opens anywhere"
    for words in (
        report["samples"][0]["prompt"],
        "Win rates",
        "optimizer step",
        "nats per response",
        report["lineage"]["ppo"]["weights_sha256"][:12],
    ):
        assert words in page.text


def test_the_report_tells_of_changes(run: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        shutil.copytree(run / stage, tmp_path / stage)
    record = lineage(tmp_path / "sft")
    record["weights_sha256"] = "0" * 64
    (tmp_path / "sft" / "lineage.json").write_text(json.dumps(record))
    (tmp_path / "ppo" / "lineage.json").unlink()
    rlhf("report", tmp_path, "--num-prompts", 4)
    notes = json.loads((tmp_path / "report" / "report.json").read_text())["notes"]
    assert any("sft: its weights changed" in note for note in notes)
    assert any("ppo: not finished" in note for note in notes)
    assert any("reward: was trained from another sft" in note for note in notes)
    assert "holds no finished stage" in rlhf("report", tmp_path / "report", code=2).stderr


def test_a_stage_that_cannot_answer_is_a_note(run: Path, tmp_path: Path) -> None:
    """One broken judge and one stage without a template: the report says so and tells the rest."""
    for stage in STAGES:
        shutil.copytree(run / stage, tmp_path / stage)
    (tmp_path / "pretrain" / "chat_template.jinja").unlink()
    rlhf("report", tmp_path, "--num-prompts", 4, "--best-of", 0, "--judge", "no_such_judge:score")
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("pretrain: does not answer here" in note for note in found["notes"])
    assert any("judge no_such_judge:score" in note for note in found["notes"])
    assert {(row["candidate"], row["baseline"]) for row in found["win_rates"]} == {("ppo", "sft")}
    assert found["best_of_n"] is None


def test_a_missing_accelerate_file_is_named(recipe: Path, tmp_path: Path) -> None:
    done = rlhf("run", recipe, "--output-dir", tmp_path / "run", "--accelerate", tmp_path / "none.yaml", code=2)
    assert "none.yaml: cannot be read as an accelerate config" in done.stderr


# ---------------------------------------------------------------------------------------------- check


def test_check_shows_rows_and_lengths(recipe: Path) -> None:
    done = rlhf("check", recipe)
    for words in ("demo_corpus", "demo_prompts", "ppo"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("sft", {"max_tokens": 8}, "exceed max_tokens (8)"),
        ("ppo", {"max_prompt_tokens": 5}, "exceed max_prompt_tokens (5)"),
        ("ppo", {"judges": ["nothing:score"]}, "cannot be imported"),
        ("reward", {"datasets": [{"path": "data_cards/demo_corpus"}]}, "needs `prompt`, `chosen`, `rejected`"),
        ("sft", {"parent": "runs/none"}, "does not exist"),
    ],
)
def test_check_finds_what_is_wrong(
    recipe: Path, tmp_path: Path, stage: str, change: dict[str, Any], words: str
) -> None:
    for name in STAGES:
        values = yaml.safe_load((recipe / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, **(change if name == stage else {})}))
    done = rlhf("check", tmp_path, code=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
