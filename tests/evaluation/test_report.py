"""`rlhf report` on finished runs of tiny random models: what it measures, what it says of a broken run, whose code it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import change_lineage, make_run, write_history
from pipeline.evaluation.report import ReportOptions, write_report

import pytest
import torch
from safetensors.torch import load_file, save_file

JUDGES = {
    "counts": "def score(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n",
    "raises": "def score(prompts, responses, rows):\n    raise KeyError('no such\\ncolumn')\n",
    "leaves": "import sys\n\ndef score(prompts, responses, rows):\n    sys.exit(3)\n",
    "nans": "def score(prompts, responses, rows):\n    return [float('nan')] * len(responses)\n",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    run = make_run(tmp_path_factory.mktemp("finished") / "run", tokenizer)
    write_history(run, [0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4], error=0.02)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside its data; the current folder is another one."""
    shutil.copytree(finished.parent, tmp_path / "place")
    moved = tmp_path / "place" / "run"
    for stage in ("pretrain", "sft", "reward", "ppo"):
        change_lineage(moved, stage, recipe={"data_root": str(tmp_path / "place")})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return moved


def report(run: Path, **options: Any) -> dict[str, Any]:
    write_report(str(run), ReportOptions(**{"num_prompts": 8, "best_of": 0, **options}))
    text = (run / "report" / "report.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return values


def told(found: dict[str, Any], level: str) -> str:
    return "\n".join(finding["text"] for finding in found["verdict"] if finding["level"] == level)


def judge_module(folder: Path, name: str) -> str:
    """A judge in a module of its own name, so that no test gets another's module from Python's cache."""
    module = f"{name}_{abs(hash(str(folder))) % 10**8}"
    (folder / f"{module}.py").write_text(JUDGES[name], encoding="utf-8")
    return f"{module}:score"


def test_every_number_of_a_report(run: Path) -> None:
    found = report(run, num_prompts=60, best_of=2)
    assert found["notes"] == []
    assert {row["judge"] for row in found["win_rates"]} == {"rubric", "reward"}
    assert {(r["candidate"], r["baseline"]) for r in found["win_rates"]} == {
        ("sft", "pretrain"), ("best_of_2", "sft"), ("best_of_2", "pretrain"),
        ("ppo", "best_of_2"), ("ppo", "sft"), ("ppo", "pretrain"),
    }  # fmt: skip
    assert found["win_rates"][0]["judge"] == "rubric", "independent judges come first"
    assert [point["n"] for point in found["best_of_n"]["curve"]] == [1, 2]
    assert found["best_of_n"]["curve"][1]["reward"] == pytest.approx(found["best_of_n"]["reward"], abs=1e-4)
    assert set(found["alignment_tax"]["perplexity"]) == {"pretrain", "sft", "ppo"}
    assert found["stages"]["ppo"]["reward"] == found["stages"]["ppo"]["score"] == 0.5
    (over,) = found["over_optimisation"]
    assert (over["judge"], over["step"], over["fell"]) == ("rubric", 10, True)
    assert "over-optimised from rollout 10" in told(found, "bad")


def test_reward_is_after_the_rule_and_reward_model_before_it(run: Path) -> None:
    found = report(run)
    unfinished = finished = 0
    for sample in found["samples"]:
        for answer in sample["responses"].values():
            if answer["stopped"]:
                finished += 1
                assert answer["scores"]["reward"] == answer["scores"]["reward_model"]
            else:
                unfinished += 1
                assert answer["scores"]["reward"] == -1.0 != answer["scores"]["reward_model"]
    assert unfinished
    assert found["judges"]["meaning"]["reward"].startswith(
        "what PPO trained on: 1 × reward model reward; answers without"
    )


def test_a_weighted_sum_is_called_reward_and_its_parts_by_their_names(run: Path) -> None:
    """The reward is what PPO trains on, in win rates, samples and the best-of curve alike; the function in it is no judge."""
    sources = [
        {"model": str(run / "reward"), "function": None, "weight": 0.5},
        {"model": None, "function": "rubric:score", "weight": 2.0},
    ]
    change_lineage(run, "ppo", recipe={"reward": sources, "missing_eos": "none"})
    found = report(run, best_of=2)
    for sample in found["samples"]:
        for answer in sample["responses"].values():
            scores = answer["scores"]
            total = 0.5 * scores["reward_model"] + 2.0 * scores["rubric"]
            assert scores["reward"] == pytest.approx(total, abs=2e-3)
    assert found["best_of_n"]["by"] == "reward"
    assert found["judges"]["independent"] == []
    assert "0.5 × reward model reward + 2 × rubric:score" in found["judges"]["meaning"]["reward"]


def test_few_prompts_make_no_headline(run: Path) -> None:
    found = report(run, num_prompts=4)
    assert "only 4 held-out prompts were answered: too few" in told(found, "warning")
    assert not [finding for finding in found["verdict"] if "beats" in finding["text"]]
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "ppo over sft" not in page.split("<nav")[0]


def test_a_run_that_was_moved_judges_by_its_own_reward_model(run: Path) -> None:
    sources = [{"model": "runs/gone/reward", "function": None, "weight": 1.0}]
    parents = json.loads((run / "ppo" / "lineage.json").read_text())["parents"]
    change_lineage(
        run, "ppo", recipe={"reward": sources}, parents=[parents[0], {**parents[1], "path": "runs/gone/reward"}]
    )
    found = report(run)
    assert "reward" in {row["judge"] for row in found["win_rates"]}
    assert found["notes"] == []


# ---------------------------------------------------------------------------------------------- whose code runs


def test_code_that_only_the_folder_names_does_not_run(run: Path, tmp_path: Path) -> None:
    """A judge beside the run's recipe, an executable of Python's own library, a judge in the run's folder: none is called."""
    (tmp_path / "theirs").mkdir()
    marker = tmp_path / "ran"
    for folder in (tmp_path / "theirs", run, run / "ppo"):
        (folder / "planted_judge.py").write_text(
            f"open({str(marker)!r}, 'w').close()\n{JUDGES['counts']}", encoding="utf-8"
        )
    change_lineage(
        run, "ppo", config=str(tmp_path / "theirs" / "ppo.yaml"),
        recipe={"judges": ["planted_judge:score", "subprocess:call", "os:system", "torch.hub:load"]},
    )  # fmt: skip
    found = report(run)
    assert not marker.exists()
    notes = "\n".join(found["notes"])
    assert "judge planted_judge:score: left out: only the run's folder names this code" in notes
    assert "say --recipe DIR (the folder that holds planted_judge.py) or --judge planted_judge:score" in notes
    for name in ("subprocess:call", "os:system", "torch.hub:load"):
        assert f"judge {name}: left out" in notes
    assert {row["judge"] for row in found["win_rates"]} == {"reward"}


def test_a_reward_function_that_only_the_folder_names_does_not_run(run: Path) -> None:
    sources = [{"model": None, "function": "nowhere_reward:score", "weight": 1.0}]
    change_lineage(run, "ppo", recipe={"reward": sources})
    found = report(run)
    assert any("the reward that PPO trained on cannot be computed here" in note for note in found["notes"])
    assert {row["judge"] for row in found["win_rates"]} == {"rubric", "reward_model"}


def test_trusted_folders_give_judges(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    beside, here = judge_module(tmp_path / "recipe", "counts"), judge_module(tmp_path / "here", "counts")
    change_lineage(run, "ppo", recipe={"judges": [beside, here]})
    found = report(run, recipe_dir=str(tmp_path / "recipe"))
    assert found["notes"] == []
    assert set(found["judges"]["independent"]) == {beside.split(":")[0], here.split(":")[0]}


def test_the_current_folder_is_not_trusted_inside_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = judge_module(run, "counts")
    change_lineage(run, "ppo", recipe={"judges": [inside]})
    monkeypatch.chdir(run)
    assert any(inside in note and "only the run's folder names" in note for note in report(run)["notes"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", "raised KeyError"),
        ("leaves", "it ended with sys.exit(3)"),
        ("nans", "gave nan for prompt"),
    ],
)
def test_a_judge_that_fails_is_a_note(run: Path, tmp_path: Path, name: str, why: str) -> None:
    judge = judge_module(tmp_path / "here", name)
    found = report(run, judges=[judge])
    (note,) = [note for note in found["notes"] if judge.split(":")[0] in note]
    assert why in note
    assert judge.split(":")[0] not in {row["judge"] for row in found["win_rates"]}
    assert {"rubric", "reward"} <= {row["judge"] for row in found["win_rates"]}


def test_a_judge_that_is_the_reward_model_is_not_called_independent(run: Path) -> None:
    found = report(run, judges=[str(run / "reward")])
    assert any("is the reward model that PPO trained on" in note for note in found["notes"])
    assert found["judges"]["independent"] == ["rubric"]


# ---------------------------------------------------------------------------------------------- broken runs


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name][..., 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_finite_are_not_reported_as_answers(run: Path) -> None:
    poison(run / "ppo")
    poison(run / "reward")
    found = report(run)
    notes = "\n".join(found["notes"])
    assert "ppo: does not answer here: its weights are not finite" in notes
    assert "ppo: its perplexity was not measured: its weights are not finite" in notes
    assert set(found["alignment_tax"]["perplexity"]) == {"pretrain", "sft"}
    assert "reward" not in {row["judge"] for row in found["win_rates"]}


def test_metrics_that_are_not_finite_are_a_note_and_valid_json(run: Path) -> None:
    change_lineage(run, "sft", metrics={"loss": float("nan")})
    found = report(run)
    assert "sft: not finite in its metrics: loss; the stage diverged" in found["notes"]
    assert found["stages"]["sft"]["loss"] is None


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"recipe": 3}', "[" * 100_000, "nothing", '{"stage": "sft", "status": "complete", "parents": 1}'],
    ids=["list", "empty", "recipe", "deep", "no JSON", "parents"],
)
def test_a_lineage_of_another_shape_is_a_note(run: Path, content: str) -> None:
    (run / "sft" / "lineage.json").write_text(content, encoding="utf-8")
    found = report(run)
    (note,) = [note for note in found["notes"] if note.startswith("sft: left out: ")]
    assert str(run / "sft" / "lineage.json") in note
    assert set(found["stages"]) == {"pretrain", "reward", "ppo"}


def test_names_and_answers_of_any_letters_do_not_break_the_page(run: Path) -> None:
    """`$…$` in a labeler's name is no formula; "<!--<script>" in a prompt does not swallow the page's data."""
    hostile = "x<!--<script></script>-->\u2028$\\frac{1$ </script><script>alert(1)</script> \U0001f600 \x07"
    names = {"$\\frac{1$ & co": 0.7, "Öre_^{": 0.6, "_hidden": 0.5, "名前": 0.4, "<b>": 0.3}
    change_lineage(
        run,
        "reward",
        metrics={"accuracy_by_labeler": names, "kept_out_labelers": ["<b>"], "noise_ceiling_by_labeler": names},
    )
    (run.parent / "prompts.jsonl").write_text(json.dumps({"prompt": hostile}) + "\n", encoding="utf-8")
    found = report(run)
    assert found["samples"][0]["prompt"] == hostile
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    data = page.split('id="report-data">')[1].split("</script>")[0]
    assert json.loads(data) == found
    assert "<" not in data
    assert page.count("<script") == 2


def test_whole_dialogues_stand_in_samples(run: Path) -> None:
    dialogue = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "Ana."},
        {"role": "user", "content": "And she?"},
    ]
    (run.parent / "prompts.jsonl").write_text(json.dumps({"prompt": dialogue}) + "\n", encoding="utf-8")
    found = report(run)
    assert found["samples"][0]["messages"] == dialogue
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    for message in dialogue:
        assert f"<dd>{message['content']}</dd>" in page


def test_the_command_says_the_bad_news_first(run: Path) -> None:
    said = rlhf_here("report", run, "--num-prompts", 8, "--best-of", 0)[0]
    assert said.startswith("report: over-optimised from rollout 10")
    assert "--num-prompts 0 is out of range" in rlhf_here("report", run, "--num-prompts", 0, code=2)[1]
    assert "is no folder" in rlhf_here("report", run, "--recipe", "nowhere", code=2)[1]
    assert "holds no finished stage" in rlhf_here("report", run / "ppo", code=2)[1]


def test_a_parent_of_the_same_stage_is_that_of_another_run(run: Path) -> None:
    """A round's policy starts from the round before, which is no sign that anything changed here."""
    parents = json.loads((run / "ppo" / "lineage.json").read_text())["parents"]
    other = {**parents[0], "weights_sha256": "0" * 64}
    change_lineage(run, "ppo", parents=[*parents, {**other, "stage": "ppo"}])
    assert not any("another ppo" in note for note in report(run)["notes"])
    change_lineage(run, "ppo", parents=[{**other, "stage": "sft"}])
    assert "ppo: was trained from another sft than the one that lies here now" in report(run)["notes"]


def test_changed_weights_and_data_are_notes(run: Path) -> None:
    weights = load_file(run / "ppo" / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, run / "ppo" / "model.safetensors", metadata={"format": "pt"})
    (run.parent / "documents.jsonl").write_text('{"text": "another"}\n', encoding="utf-8")
    found = report(run)
    assert "ppo: its weights changed after the stage finished; the metrics below may not be theirs" in found["notes"]
    assert f"pretrain: its data {run.parent / 'documents.jsonl'} changed after the stage finished" in found["notes"]
    assert "weights changed since" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert torch.isfinite(weights[name]).all()


def test_streamed_pretraining_text_is_not_read_for_the_report(run: Path) -> None:
    change_lineage(run, "pretrain", recipe={"datasets": [{"hub": "nobody/corpus", "streaming": True}]})
    found = report(run)
    assert "alignment tax not measured: pretraining's data was streamed, and is not read again" in found["notes"]
    assert found["alignment_tax"] is None
