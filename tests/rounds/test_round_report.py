"""`rlhf round report` on rounds of random models, whose numbers are known from how the labels were made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from helpers.rounds import RoundsWorld, finish_round, make_world
from pipeline.errors import UserError
from pipeline.evaluation.answers import load_sampler, sample_answers
from pipeline.evaluation.divergence import divergence
from pipeline.rollout.rewards import TextScorer
from pipeline.rounds.findings import findings
from pipeline.rounds.folder import open_rounds
from pipeline.rounds.report import RoundReportOptions, write_round_report
from pipeline.training.identity import weights_sha256

import pytest
from safetensors.torch import load_file, save_file

QUESTIONS = [f"My parcel number {n} is late." for n in range(20)]
ANSWERS = ["We are sorry.", "It will come on Monday, I hope.", "No.", "A new one is on its way to you today."]


def labels_by(reward: Path, policies: list[Path], labelers: tuple[str, ...] = ("ana", "ben")) -> list[dict[str, Any]]:
    """Rankings that a reward model orders without an error; of two policies the first one's answers are the better ones."""
    rows = []
    for question in QUESTIONS:
        scores = TextScorer(str(reward))([question] * 4, ANSWERS)
        order = sorted(range(4), key=lambda i: -scores[i])
        ranks = [order.index(i) + 1 for i in range(4)]
        sources = [{"weights_sha256": weights_sha256(policies[rank > 2])} for rank in ranks]
        row = {"prompt": question, "responses": ANSWERS, "ranks": ranks, "sources": sources}
        rows += [{**row, "labeler": name} for name in labelers]
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> RoundsWorld:
    """Two finished rounds. Each one's labels are what the reward model from before it says."""
    world = make_world(tmp_path_factory.mktemp("rounds"), tokenizer)
    sft = world.base / "sft"
    first = finish_round(world, 1, labels_by(world.base / "reward", [sft, sft]))
    finish_round(world, 2, labels_by(first / "reward", [first / "ppo", sft]))
    return world


def report(world: RoundsWorld, **options: Any) -> dict[str, Any]:
    run = open_rounds(world.run, str(world.recipe))
    target = write_round_report(run, RoundReportOptions(**{"num_prompts": 16, **options}))
    found: dict[str, Any] = json.loads((target / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def found(world: RoundsWorld) -> dict[str, Any]:
    return report(world)


def test_accuracy_before_is_of_the_model_that_the_round_began_with(found: dict[str, Any]) -> None:
    for entry in found["rounds"]:
        assert entry["accuracy_before"] == 1.0
        assert entry["accuracy_after"] < 0.95


def test_each_round_has_its_numbers(found: dict[str, Any]) -> None:
    for number, entry in enumerate(found["rounds"], 1):
        keys = {"round", "rubric", "win_rate", "kl", "accuracy_before", "accuracy_after", "alpha", "labels"}
        assert keys <= entry.keys()
        assert (entry["round"], entry["labels"], entry["alpha"], entry["agreement"]) == (number, 40, 1.0, 1.0)
        assert entry["labelers"] == ["ana", "ben"]
        assert entry["kl"] > 0
        assert entry["held_out_pairs"] < entry["pairs"] == 40 * 6
    assert [entry["against"] for entry in found["rounds"]] == ["sft", "round-1"]
    starts = found["rounds"][1]["started_from"]
    assert [starts[part]["name"] for part in ("reward", "policy", "reference")] == ["sft", "sft", "sft"]


def test_policies_are_rated_by_the_judge_and_by_labelers(found: dict[str, Any]) -> None:
    assert [row["model"] for row in found["ratings"]["by_judge"]] == ["sft", "round-1", "round-2"]
    by_labelers = found["ratings"]["by_labelers"]
    assert [row["model"] for row in by_labelers] == ["sft", "round-1"]  # the newest was not labeled yet
    assert by_labelers[1]["ci95"][0] > 2  # it won every comparison


def test_the_page_needs_nothing_beside_itself(world: RoundsWorld, found: dict[str, Any]) -> None:
    page = (world.run / "report" / "index.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert found["findings"][0]["text"].split(",")[0] in page


def test_the_kl_of_a_model_from_itself_is_zero(world: RoundsWorld) -> None:
    sampler = load_sampler(world.base / "sft", {"max_response_tokens": 8})
    other = load_sampler(world.run / "round-1" / "ppo", {"max_response_tokens": 8})
    records: Any = [{"prompt": [{"role": "user", "content": q}], "row": {}} for q in QUESTIONS]
    answers = sample_answers(sampler, records)
    assert divergence(sampler, sampler, answers).kl == pytest.approx(0, abs=1e-4)
    assert divergence(sampler, other, answers).kl > 0.1


def test_another_report_is_not_overwritten(world: RoundsWorld, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"stages": {}}')
    with pytest.raises(UserError, match="is another report"):
        report(world, to=str(tmp_path))
    assert (tmp_path / "report.json").read_text() == '{"stages": {}}'


def test_without_a_reward_model_before_there_is_no_accuracy_before(tmp_path: Path, tokenizer: Any) -> None:
    world = make_world(tmp_path, tokenizer, reward=False)
    finish_round(world, 1, labels_by(world.base / "reward", [world.base / "sft"] * 2, ("ana",)))
    entry = report(world)["rounds"][0]
    assert (entry["accuracy_before"], entry["alpha"]) == (None, None)
    assert entry["accuracy_after"] is not None


def test_a_reward_model_that_was_exchanged_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    world = make_world(tmp_path, tokenizer)
    finish_round(world, 1, labels_by(world.base / "reward", [world.base / "sft"] * 2))
    (world.base / "reward" / "lineage.json").unlink()  # so that the lineage does not tell
    path = world.base / "reward" / "model.safetensors"
    save_file({k: v * 1.1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is another reward model than the one that round 1 began with"):
        report(world)


def test_no_finished_round_is_one_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no round is finished yet"):
        report(make_world(tmp_path, tokenizer))


def entry(**changes: Any) -> dict[str, Any]:
    values = {
        "round": 2, "against": "round-1", "win_rate": 0.6, "win_rate_ci95": [0.55, 0.65], "rubric": 0.8, "reward": 1.0,
        "accuracy_before": 0.6, "accuracy_before_ci95": [0.55, 0.65], "accuracy_after": 0.7, "alpha": 0.4,
        "held_out_accuracy_before": 0.6, "held_out_accuracy_after": 0.65,
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({}, "good", "another round may help"),
        ({"win_rate_ci95": [0.48, 0.6]}, "warning", "cannot be told apart"),
        ({"win_rate_ci95": [0.3, 0.45]}, "bad", "stop, and keep round 1's policy"),
        ({"rubric": 0.6, "reward": 2.0}, "bad", "exploits the reward model"),
        ({"accuracy_before_ci95": [0.45, 0.55]}, "warning", "no better than chance"),
        ({"held_out_accuracy_after": 0.6}, "warning", "taught it nothing"),
        ({"alpha": 0.05}, "warning", "labelers hardly agree"),
        ({"alpha": None}, "warning", "raise `overlap`"),
    ],
)
def test_the_findings_say_when_to_stop(changes: dict[str, Any], level: str, text: str) -> None:
    values = {
        "prompts": 200, "judge": {"name": "rubric", "independent": True}, "start": {"rubric": 0.5, "reward": 0.0},
        "rounds": [entry(rubric=0.7, reward=0.5, round=1), entry(**changes)], "unseen_prompts": 1000,
    }  # fmt: skip
    assert any(f.level == level and text in f.text for f in findings(values, 100))
    assert not any("unseen prompts" in f.text for f in findings(values, 100))
    assert any("1,000 unseen prompts are left" in f.text for f in findings(values, 2000))
