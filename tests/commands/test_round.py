"""`rlhf round new` and `round train`: what a round is made of, what it refuses, and where it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.labeling import read_jsonl
from helpers.launches import CARDS, lineage, rlhf, rlhf_here
from helpers.rounds import RoundsWorld, finish_round, label_everything, make_world
from pipeline.commands.round_steps import ppo_flags, reward_flags
from pipeline.rounds.folder import open_rounds
from pipeline.training.identity import weights_sha256

import pytest
import yaml
from safetensors.torch import load_file, save_file


@pytest.fixture
def world(tmp_path: Path, tokenizer: Any) -> RoundsWorld:
    return make_world(tmp_path, tokenizer)


def new(world: RoundsWorld, code: int = 0) -> str:
    return "".join(rlhf_here("round", "new", world.run, "--recipe", world.recipe, code=code))


def train(world: RoundsWorld, *words: str, code: int = 2) -> str:
    """Refused before a stage is launched."""
    return "".join(rlhf_here("round", "train", world.run, *words, code=code))


def asked(run: Path, n: int) -> set[str]:
    return {json.dumps(row["prompt"]) for row in read_jsonl(run / f"round-{n}" / "prompts.jsonl")}


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({k: v * 1.1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def change_recipe(world: RoundsWorld, name: str = "round", **values: Any) -> None:
    path = world.recipe / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def test_a_round_asks_unseen_prompts_of_the_newest_policies(world: RoundsWorld) -> None:
    said = new(world)
    folder = world.run / "round-1"
    assert f"rlhf label {folder / 'labeling'}" in said
    assert yaml.safe_load((folder / "labeling" / "label.yaml").read_text()) == {"title": "Round 1", "strength": False}
    assert (folder / "labeling" / "answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    finish_round(world, 1)
    new(world)
    assert asked(world.run, 1)
    assert asked(world.run, 1).isdisjoint(asked(world.run, 2))
    hashes = [weights_sha256(path) for path in (folder / "ppo", world.base / "sft")]
    rows = read_jsonl(world.run / "round-2" / "labeling" / "answers.jsonl")
    for row in rows:
        assert all(source["weights_sha256"] == hashes[source["draw"] % 2] for source in row["sources"])
    held_out = {json.dumps(f"My parcel number {n} never arrived. What now?") for n in range(60)} - {
        json.dumps(record["prompt"][0]["content"]) for record in open_rounds(world.run).candidates()
    }
    assert held_out
    assert not held_out & (asked(world.run, 1) | asked(world.run, 2))


def test_a_round_that_was_interrupted_begins_with_the_same_prompts_and_answers(world: RoundsWorld) -> None:
    new(world)
    folder = world.run / "round-1"
    answers, ledger = (folder / "answers.jsonl").read_bytes(), (world.run / "ledger.jsonl").read_bytes()
    shutil.rmtree(folder / "labeling")  # as a kill before the folder was there leaves it
    (folder / "prompts.jsonl").unlink()
    for left in folder.glob("answers*"):
        left.unlink()
    new(world)
    assert (folder / "answers.jsonl").read_bytes() == answers
    assert (world.run / "ledger.jsonl").read_bytes() == ledger
    assert f"round 1 waits for labels (rlhf label {folder / 'labeling'})" in new(world, code=2)


def test_prompts_end_with_one_line(world: RoundsWorld) -> None:
    change_recipe(world, prompts_per_round=1000)
    assert "unseen prompts were left" in new(world)
    finish_round(world, 1)
    assert "no prompts left: the rounds so far had all" in new(world, code=2)


def test_a_model_that_changed_is_refused(world: RoundsWorld) -> None:
    change_weights(world.base / "reward")
    assert "weights changed after the stage finished" in new(world, code=2)


def test_an_exchanged_external_model_is_refused(world: RoundsWorld) -> None:
    for stage in ("sft", "reward"):
        (world.base / stage / "lineage.json").unlink()
    new(world)
    label_everything(world.run / "round-1" / "labeling")
    change_weights(world.base / "sft")
    assert "is another model than the one that round 1 began with" in train(world)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("round", {"sft": "runs/no/such"}, "does not exist"),
        ("round", {"answer": 3}, "unknown key 'answer'; did you mean 'answers'?"),
        ("round", {"answers": 1}, "out of range"),
        ("round", {"weights": [1.0, 0.0]}, "weights: 0.0 is out of range"),
        ("round", {"label": {"overlaps": 2}}, "unknown key 'overlaps'"),
        ("round", {"guidelines": "no/such.md"}, "does not exist"),
        ("ppo", {"rewards": []}, "unknown key 'rewards'"),
    ],
)
def test_a_wrong_recipe_is_one_line(world: RoundsWorld, name: str, values: dict[str, Any], message: str) -> None:
    change_recipe(world, name, **values)
    said = new(world, code=2)
    assert message in said.splitlines()[-1]


def test_a_folder_without_rounds_or_a_recipe_without_a_file_is_one_line(world: RoundsWorld) -> None:
    assert "is no run of rounds" in train(world)
    (world.recipe / "ppo.yaml").unlink()
    assert "holds no ppo.yaml; a recipe of rounds has round.yaml, reward.yaml, ppo.yaml" in new(world, code=2)


def test_training_waits_for_labels(world: RoundsWorld) -> None:
    new(world)
    assert "holds no labels yet" in train(world)
    change_recipe(world, label={"strength": False, "overlap": 2})
    folder = world.run / "round-1" / "labeling"
    (folder / "label.yaml").write_text("overlap: 2\nstrength: false\n")
    label_everything(folder)
    assert "12 of 12 items lack labels; go on labeling, or say --partial" in train(world)
    assert not (world.run / "round-1" / "labels").exists()


def test_labels_of_another_round_are_refused_and_not_kept(world: RoundsWorld) -> None:
    new(world)
    label_everything(world.run / "round-1" / "labeling")
    finish_round(world, 1)
    new(world)
    shutil.rmtree(world.run / "round-2" / "labeling")
    shutil.copytree(world.run / "round-1" / "labeling", world.run / "round-2" / "labeling")
    said = train(world)
    assert "rankings.jsonl:1: these are not the labels of round 2 (12 labels of round 1)" in said
    assert not (world.run / "round-2" / "labels" / "rankings.jsonl").exists()


def test_frozen_labels_that_changed_are_refused(world: RoundsWorld) -> None:
    new(world)
    label_everything(world.run / "round-1" / "labeling")
    change_recipe(world, "ppo", reward=[{"function": "rubric:score"}])
    assert "names 0 reward models" in train(world)  # labels are frozen by then
    frozen = world.run / "round-1" / "labels" / "rankings.jsonl"
    frozen.write_text(frozen.read_text() + "\n")
    assert "changed after the round's training began" in train(world)


def test_reward_models_train_on_the_rounds_in_the_window_by_their_weights(world: RoundsWorld) -> None:
    for number in (1, 2, 3):
        finish_round(world, number)
    change_recipe(world, window=3, weights=[1.0, 0.5], earlier_comparisons=False)
    entries = [json.loads(text) for text in reward_flags(open_rounds(world.run, str(world.recipe)), 4)["datasets"]]
    assert [(entry["name"], entry["weight"]) for entry in entries] == [
        ("round-4", 1.0),
        ("round-3", 0.5),
        ("round-2", 0.5),
    ]
    change_recipe(world, window=1, weights=[], earlier_comparisons=True)
    entries = [json.loads(text) for text in reward_flags(open_rounds(world.run, str(world.recipe)), 4)["datasets"]]
    assert [entry["path"].split("/")[-1] for entry in entries] == ["rankings.jsonl", "demo_comparisons"]


def test_stages_start_from_what_the_recipe_says(world: RoundsWorld) -> None:
    finish_round(world, 1)
    first, sft = world.run / "round-1", str(world.base / "sft")
    run = open_rounds(world.run, str(world.recipe))
    assert reward_flags(run, 2)["parent"] == ppo_flags(run, 2)["parent"] == [sft]
    assert "reference" not in ppo_flags(run, 2)
    change_recipe(world, reward_from="last", policy_from="last", reference="sft")
    run = open_rounds(world.run, str(world.recipe))
    flags = ppo_flags(run, 2)
    assert reward_flags(run, 2)["parent"] == [str(first / "reward")]
    assert (flags["parent"], flags["reference"]) == ([str(first / "ppo")], [sft])
    assert flags["reward"] == [str(world.run / "round-2" / "reward")]


@pytest.mark.full
def test_two_rounds_from_prompts_to_report(chain: Path, tmp_path: Path) -> None:
    """Real stages at tiny size; the second round's KL is measured from SFT although PPO starts from the last policy."""
    recipe, run = tmp_path / "recipe", tmp_path / "rounds"
    recipe.mkdir()
    small = {"precision": "fp32", "threads": 1, "logging_steps": 1, "save_steps": 4}
    rounds = {
        "sft": str(chain / "sft"), "reward": str(chain / "reward"), "prompts_per_round": 20, "answers": 3,
        "label": {"strength": False}, "reward_from": "last", "policy_from": "last", "earlier_comparisons": False,
    }  # fmt: skip
    reward = {
        "parent": str(chain / "sft"), "output_dir": "runs/r", "datasets": [{"path": str(CARDS / "demo_comparisons")}],
        "max_steps": 4, "max_tokens": 160, "held_out_fraction": 0.3, "learning_rate": 1e-3, **small,
    }  # fmt: skip
    prompts = str(CARDS / "demo_prompts")
    ppo = {
        "parent": str(chain / "sft"), "output_dir": "runs/p", "datasets": [{"path": prompts}], "judges": ["rubric:score"],
        "eval_datasets": [{"path": prompts, "split": "test", "max_rows": 16}], "reward": str(chain / "reward"),
        "total_rollouts": 2, "prompts_per_rollout": 16, "minibatches": 2, "max_prompt_tokens": 64,
        "max_response_tokens": 24, "learning_rate": 1e-3,
        **small,
    }  # fmt: skip
    for name, values in (("round", rounds), ("reward", reward), ("ppo", ppo)):
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for number in (1, 2):
        rlhf("round", "new", run, "--recipe", recipe)
        label_everything(run / f"round-{number}" / "labeling")
        rlhf("round", "train", run, "--partial")
        rlhf("round", "report", run, "--num-prompts", 16)
    found = json.loads((run / "report" / "report.json").read_text())
    assert [entry["round"] for entry in found["rounds"]] == [1, 2]
    second = lineage(run / "round-2" / "ppo")
    assert {parent.get("as") for parent in second["parents"]} == {None, "reference"}
    assert second["parents"][0]["weights_sha256"] == lineage(run / "round-1" / "ppo")["weights_sha256"]
    reported = found["rounds"][1]
    four_errors = 4 * 2**0.5 * reported["kl_standard_error"]  # of two means, each over 16 sampled answers
    assert reported["kl"] == pytest.approx(second["metrics"]["kl"], abs=four_errors)
