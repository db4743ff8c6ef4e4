"""What gives a response its score: functions of every shape that people write, and reward models at their own end token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from helpers.ppo_training import one_rollout, with_training
from helpers.worlds import make_policy
from pipeline import ppo
from pipeline.config.rewards import RewardSource
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import init_head, load_scalar_model, score_ids, set_offset
from pipeline.models.tokenizers import load_tokenizer
from pipeline.rollout.rewards import Answers, RewardPart, Scorer, ScoringSetup, build_scorer, call_function
from pipeline.training.run import Run

import numpy as np
import pytest
import torch

PROMPTS = [[{"role": "user", "content": "Hi"}]] * 2
TEXTS = ["yes", "no"]


def returning(value: Any) -> Any:
    def function(prompts: Any, responses: Any, rows: Any) -> Any:
        return value

    return function


def call(function: Any) -> list[float]:
    return call_function(function, "m:f", PROMPTS, TEXTS, [{"answer": 1}, {}])


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 2],
        (1.0, 2.0),
        torch.tensor([1.0, 2.0]),
        np.array([1.0, 2.0], dtype=np.float32),
        [np.float64(1.0), torch.tensor(2.0)],
        (x for x in (1.0, 2.0)),
    ],
    ids=["list", "tuple", "tensor", "array", "items", "generator"],
)
def test_any_sequence_of_numbers_is_taken(returned: Any) -> None:
    assert call(returning(returned)) == [1.0, 2.0]


async def asynchronous(prompts: Any, responses: Any, rows: Any) -> list[float]:
    return [1.0, 2.0]


def trl_style(completions: Any, **kwargs: Any) -> list[float]:
    return [1.0, 2.0]


def reads_a_column(prompts: Any, responses: Any, rows: Any) -> list[float]:
    return [float(row["answer"]) for row in rows]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (returning(None), "returned None; a list of 2 scores is needed"),
        (returning(1.0), "returned 1.0; a list of 2 scores is needed"),
        (returning("12"), "returned '12'; a list of 2 scores is needed"),
        (returning({"a": 1.0}), "a list of 2 scores is needed"),
        (returning(torch.tensor(1.0)), "returned 1.0; a list of 2 scores is needed"),
        (returning([1.0]), "returned 1 scores for 2 responses"),
        (returning([1.0, None]), "returned None for row 1; a number is needed"),
        (returning([[1.0], [2.0]]), "returned [1.0] for row 0; a number is needed"),
        (asynchronous, "is async; write an ordinary function"),
        (trl_style, "does not take (prompts, responses, rows)"),
        (reads_a_column, "test_rewards.py:"),
    ],
)
def test_what_is_no_list_of_scores_gets_one_line(function: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        call(function)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_functions_own_error_names_its_line() -> None:
    with pytest.raises(UserError, match=r"test_rewards\.py:\d+: reward function 'm:f' raised KeyError: 'answer'"):
        call(reads_a_column)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_must_be_finite(value: float) -> None:
    def compute(answers: Answers) -> torch.Tensor:
        return torch.tensor([0.0, value])

    scorer = Scorer([RewardPart("m:f", 1.0, compute)])
    with pytest.raises(UserError, match="for prompt 'Hi', response 'no'; scores must be finite"):
        scorer(Answers(PROMPTS, [[1], [1]], [[2], [3]], TEXTS, [{}, {}]))


def test_functions_are_not_rounded_to_bf16(tmp_path: Path) -> None:
    """Python rewards run outside autocast, where 0.9999 would become 1."""
    policy = make_policy(tmp_path / "sft", "abcd")

    def use(training: ppo.Training, run: Run[Any]) -> dict[str, float]:
        return one_rollout(training, run)[1]

    body = "import torch\n    return (torch.tensor([[0.9999]]) @ torch.tensor([[1.0]])).item()"
    small = {"prompts_per_rollout": 4, "minibatches": 1, "total_rollouts": 1, "precision": "bf16"}
    metrics = with_training(tmp_path / "run", policy, body, use, **small)
    assert metrics["score"] == pytest.approx(0.9999, abs=1e-6)


def test_a_reward_model_reads_at_the_token_that_it_was_trained_on(tmp_path: Path) -> None:
    """A response that ended at a stop token of the recipe is scored as if it had ended at the template's end of answer."""
    policy = make_policy(tmp_path / "sft", "abcd")
    model: Any = load_scalar_model(str(policy))
    init_head(model, 1.0, 0)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "reward")
    tokenizer = load_tokenizer(str(policy))
    tokenizer.save_pretrained(tmp_path / "reward")
    encoder = ChatEncoder(tokenizer)
    stop = encoder.text_ids("d")[0]
    prompt, body = encoder.prompt_ids(PROMPTS[0]), encoder.text_ids("ab")
    setup = ScoringSetup(encoder, torch.device("cpu"), stop_ids=[encoder.eos_id, stop])
    scorer = build_scorer([RewardSource(model=str(tmp_path / "reward"))], setup)
    responses = [[*body, encoder.end_id], [*body, stop], body]
    scores = scorer(Answers(PROMPTS[:1] * 3, [prompt] * 3, responses, ["ab"] * 3, [{}] * 3)).scores
    assert scores[0] == scores[1]
    assert scores[2] != scores[0], "a response that did not end is read where it was cut"


def test_scores_far_from_zero_keep_their_digits_under_autocast(tmp_path: Path) -> None:
    """A raw level of 30 leaves bf16 steps of 0.125; the head and its offset are fp32."""
    policy = make_policy(tmp_path / "sft", "abcd")
    model: Any = load_scalar_model(str(policy))
    init_head(model, 1.0, 0)
    rows = [[3, 6 + i % 4, 4, 6 + i // 4 % 4, 6 + i // 16, 1] for i in range(64)]
    plain = score_ids(model, rows, 0)
    head = model.score
    with torch.no_grad():
        states = load_causal_lm(str(policy)).base_model(torch.tensor([rows[0]])).last_hidden_state[0, -1]
        head.weight.add_(30 * states / states.norm() ** 2)
    set_offset(model, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_ids(model, rows, 0)
    raw = scores + 30.0
    assert (raw != raw.bfloat16().float()).float().mean() > 0.5, "more digits than bf16 has"
    assert len(plain) == len(scores)
