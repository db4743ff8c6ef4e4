"""The demo's synthetic data is reproducible, keeps its held-out combinations apart, and scores as stated."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "demo"))

import labelers
import rubric

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "data_cards"
TRAINING = (
    "demo_corpus/train.jsonl",
    "demo_demonstrations/train.jsonl",
    "demo_comparisons/train.jsonl",
    "demo_prompts/train.jsonl",
)
HELD_OUT = "demo_prompts/held_out.jsonl"

PROMPT = "Hello, my desk lamp arrived broken. What can you do?"
PERFECT = "We are sorry that your desk lamp arrived broken. We will send you a replacement this week."


@cache
def read(path: str) -> list[dict]:
    with (CARDS / path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def texts(row: dict) -> list[str]:
    if "text" in row:
        return [row["text"]]
    return [f"{row['prompt']} {answer}" for answer in row.get("responses") or [row.get("response", "")]]


# ------------------------------------------------------------------------------------------ the files


def test_generator_reproduces_the_committed_files():
    command = [sys.executable, str(ROOT / "scripts" / "make_demo_data.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_held_out_combination_meets_in_a_training_text():
    held_out = {rubric.subject(row["prompt"]) for row in read(HELD_OUT)}
    assert 0.15 < len(held_out) / len(rubric.COMBINATIONS) < 0.25
    for path in TRAINING:
        for row in read(path):
            for text in texts(row):
                problems = rubric.problems_in(text)
                met = {(item, problem) for item in rubric.items_in(text) for problem in problems}
                assert not met & held_out, (path, row)


def test_training_prompts_cover_every_item_and_every_problem():
    subjects = {rubric.subject(row["prompt"]) for row in read("demo_prompts/train.jsonl")}
    assert {item for item, _ in subjects} == set(rubric.ITEMS)
    assert {problem for _, problem in subjects} == {problem.name for problem in rubric.PROBLEMS}


def test_prompts_are_distinct_and_name_one_item_and_one_problem():
    rows = read("demo_prompts/train.jsonl") + read(HELD_OUT)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert rubric.subject(row["prompt"]) in rubric.COMBINATIONS
        assert len(rubric.items_in(row["prompt"])) == len(rubric.problems_in(row["prompt"])) == 1


@pytest.mark.parametrize("path", [*TRAINING[1:], HELD_OUT])
def test_ids_are_unique(path):
    ids = [row["id"] for row in read(path)]
    assert len(set(ids)) == len(ids)


def test_demonstrations_are_of_mixed_quality():
    rows = read("demo_demonstrations/train.jsonl")
    scores = [rubric.rubric(row["prompt"], row["response"]) for row in rows]
    assert 0.6 < sum(scores) / len(scores) < 0.7
    assert 0.05 < sum(score > 0.95 for score in scores) / len(scores) < 0.10
    assert 0.35 <= min(scores) < 0.4
    assert max(len(rubric.words_in(row["response"])) for row in rows) <= 45


@pytest.mark.parametrize("path", [*TRAINING, HELD_OUT])
def test_cards_state_the_true_row_counts(path):
    card = (CARDS / path).with_name("README.md").read_text(encoding="utf-8")
    stated = re.search(rf"\| `{Path(path).name}` \|[^|]*\| *([\d,]+) \|", card)
    assert stated is not None
    assert int(stated.group(1).replace(",", "")) == len(read(path))


# ------------------------------------------------------------------------------------------ the rubric


def test_a_perfect_answer_has_every_part():
    assert rubric.rubric(PROMPT, PERFECT) > 0.95
    assert set(rubric.parts(PROMPT, PERFECT).values()) == {1.0}


@pytest.mark.parametrize(
    ("part", "response"),
    [
        ("names_item", PERFECT.replace("desk lamp", "order")),
        ("names_item", PERFECT.replace("desk lamp", "kettle")),
        ("fits_problem", PERFECT.replace("arrived broken", "gave you trouble")),
        ("right_remedy", PERFECT.replace("send you a replacement", "look into it")),
        ("right_remedy", PERFECT.replace("send you a replacement", "give you a full refund")),
        ("right_remedy", PERFECT.replace("a replacement", "a replacement and give you a full refund")),
        ("right_remedy", PERFECT.replace("We will send", "We will not send")),
        ("polite", PERFECT.replace("We are sorry", "We see")),
        ("polite", f"{PERFECT} This is not our problem."),
        ("no_repetition", f"{PERFECT} We will send you a replacement this week."),
        ("short", f"{PERFECT} {' '.join(f'word{i}' for i in range(30))}."),
    ],
)
def test_a_defect_costs_exactly_its_part(part, response):
    judged = rubric.parts(PROMPT, response)
    assert judged[part] == 0.0
    cost = sum(rubric.WEIGHTS[name] * (1.0 - value) for name, value in judged.items())
    assert rubric.rubric(PROMPT, response) == pytest.approx(1.0 - cost)
    for name in set(rubric.PARTS) - {part, "short"}:
        assert judged[name] == 1.0, name


def test_naming_several_things_is_worth_half():
    judged = rubric.parts(PROMPT, PERFECT + " Your kettle smells.")
    assert judged["names_item"] == judged["fits_problem"] == 0.5


def test_endless_apologies_are_not_polite():
    assert rubric.parts(PROMPT, "Sorry. So sorry. We are sorry. Thank you. Thanks!")["polite"] == 0.5


def test_stuttering_is_repetition():
    assert rubric.parts(PROMPT, PERFECT.replace("you a", "you you a"))["no_repetition"] < 1.0


@pytest.mark.parametrize("response", ["", "  \n", "...", "?!"])
def test_an_empty_answer_gets_nothing(response):
    assert rubric.rubric(PROMPT, response) == 0.0


@pytest.mark.parametrize("prompt", ["", "What time is it?", "\x00 ☃ \ud83d", "kettle " * 1000])
def test_any_string_is_accepted(prompt):
    judged = rubric.parts(prompt, PERFECT)
    assert judged["right_remedy"] == judged["fits_problem"] == judged["names_item"] == 0.0
    assert 0.0 <= rubric.rubric(PROMPT, prompt) <= 1.0


def test_each_problem_is_told_from_every_other_one():
    for problem in rubric.PROBLEMS:
        for phrase in problem.stated + problem.said:
            assert rubric.subject(f"My kettle {phrase}.") == ("kettle", problem.name)
        for phrase in problem.stated + problem.said + problem.nouns:
            assert rubric.problems_in(phrase) == [problem.name]
            assert not rubric.remedies_in(phrase)
        for remedy in problem.remedies:
            assert rubric.remedies_in(remedy) == [problem.name]
            assert not rubric.problems_in(remedy)


def test_weights_sum_to_one():
    assert sum(rubric.WEIGHTS.values()) == pytest.approx(1.0)
    for labeler in labelers.LABELERS.values():
        assert sum(labeler.taste.values()) == pytest.approx(1.0)


def test_score_has_the_signature_of_a_reward():
    assert rubric.score([PROMPT, PROMPT], [PERFECT, ""], [{}, {}]) == [rubric.rubric(PROMPT, PERFECT), 0.0]


# ---------------------------------------------------------------------------------------- the labelers


def test_truth_uses_the_labeler_of_the_row_and_else_the_rubric():
    response = PERFECT.replace("We are sorry", "We see")
    rows = [{"labeler": "ben"}, {}, {"labeler": "nobody"}]
    plain = rubric.rubric(PROMPT, response)
    expected = [labelers.utility(PROMPT, response, "ben"), plain, plain]
    assert labelers.truth([PROMPT] * 3, [response] * 3, rows) == expected
    assert expected[0] < plain


def test_a_labeler_sorts_and_ties():
    worse = "This is not our problem."
    ranks = labelers.rank(PROMPT, [worse, PERFECT, worse], "ana", random.Random(0))
    assert ranks[1] == 1
    assert min(ranks[0], ranks[2]) == 2
    assert labelers.rank(PROMPT, [PERFECT], "ana", random.Random(0)) == [1]


def test_rankings_are_well_formed():
    for row in read("demo_comparisons/train.jsonl"):
        assert 4 <= len(row["responses"]) == len(row["ranks"]) <= 6
        assert len(set(row["responses"])) == len(row["responses"])
        assert set(row["ranks"]) == set(range(1, max(row["ranks"]) + 1))


def test_every_labeler_ranks_and_some_sets_are_shared():
    sets: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in read("demo_comparisons/train.jsonl"):
        sets[(row["prompt"], *row["responses"])].append(row["labeler"])
    ranked = [labeler for names in sets.values() for labeler in names]
    assert set(ranked) == set(labelers.LABELERS)
    assert labelers.KEPT_OUT == "erik"
    assert all(ranked.count(name) == len(ranked) // 5 for name in labelers.LABELERS)
    assert all(len(set(names)) == len(names) <= 3 for names in sets.values())
    assert 0.2 < sum(len(names) > 1 for names in sets.values()) / len(sets) < 0.3


def test_no_labeler_can_be_predicted_perfectly_and_none_is_noise():
    right: dict[str, list[float]] = defaultdict(list)
    for row in read("demo_comparisons/train.jsonl"):
        values = [labelers.utility(row["prompt"], response, row["labeler"]) for response in row["responses"]]
        for i, j in combinations(range(len(values)), 2):
            if row["ranks"][i] != row["ranks"][j]:
                gap = (values[i] - values[j]) * (row["ranks"][j] - row["ranks"][i])
                right[row["labeler"]].append(0.5 if abs(gap) < 1e-9 else float(gap > 0))
    for name, hits in right.items():
        assert 0.78 < sum(hits) / len(hits) < 0.88, name
